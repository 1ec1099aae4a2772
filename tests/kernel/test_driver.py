"""The module's own launch path on a driver without a GPU: every way to launch, and every way for a driver to fail."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nsa_sel
from tests.fake_driver import cases, driver
from tests.host_run.abi import library_file

ROOT = Path(__file__).resolve().parents[2]
BUILD = nsa_sel.build_info()
HELPERS = {"inputs", "attend", "falls_back"}
NAMES = [
    name
    for name, function in inspect.getmembers(cases, inspect.isfunction)
    if function.__module__ == cases.__name__ and name not in HELPERS
]

pytestmark = [
    pytest.mark.skipif(not BUILD["kernels"], reason=f"this build has no kernels: {BUILD['reason']}"),
    pytest.mark.skipif(sys.platform != "linux", reason="ELF"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    """The process that forks for each case; what cases need is built before, once for all workers."""
    driver.built()
    library_file("fast")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fake_driver.server"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("name", NAMES)
def test_case(server: Any, name: str) -> None:
    print(name, file=server.stdin, flush=True)
    answer = json.loads(server.stdout.readline())
    assert answer == {"case": name, "failure": ""}, answer["failure"]


def test_nothing_is_loaded_at_import() -> None:
    script = "import nsa_sel; assert 'libcuda' not in open('/proc/self/maps').read()"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
