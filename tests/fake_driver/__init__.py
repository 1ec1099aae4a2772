"""A libcuda.so.1 without a GPU, for tests of the launch path: told what to report and where to fail, it records calls.

One process has one driver, so each case runs in a process of its own: `tests/fake_driver/server.py` forks for it.
"""
