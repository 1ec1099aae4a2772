"""The CUDA kernel's own source, compiled by g++ and run on the CPU with its races, addresses and traffic observed.

`selection_attention` takes CPU tensors and the contract's keywords and returns what the kernel computed, what the
emulator found wrong while it ran, and exact counters. Needs torch, numpy, g++ and the CUDA headers; no GPU.
"""

from __future__ import annotations

from tests.host_run.kernel import Device, HostRun, Options, instances, selection_attention

__all__ = ["Device", "HostRun", "Options", "instances", "selection_attention"]
