"""Launches the kernels of this folder on the emulator."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from tests.host_run import build
from tests.host_run.emulator import Emulator

HERE = Path(__file__).resolve().parent
SOURCES = sorted(HERE.glob("*.cu"))


def library(kind: str) -> Path:
    """Builds the faults; the sanitizers need those of memory.cu alone."""
    return build.library(kind, [HERE / "memory.cu"] if kind == "asan" else SOURCES, [HERE])


class FaultRunner:
    """A loaded library of faults, with the buffers that its kernels take."""

    def __init__(self, path: Path | str) -> None:
        self.emulator = Emulator(path)
        self.out = np.zeros(256, np.float32)
        self.input = np.arange(1024, dtype=np.float32)
        self.scratch = np.zeros(1024, np.float32)
        self.counter = np.zeros(4, np.uint32)

    def register(self) -> None:
        """Registers the four buffers afresh."""
        self.emulator.unregister_all()
        self.emulator.register("out", self.out, writable=True)
        self.emulator.register("in", self.input)
        self.emulator.register("scratch", self.scratch, writable=True)
        self.emulator.register("counter", self.counter, writable=True, tracked=False)

    def run(self, name: str, faulty: bool, schedule: int, seed: int = 1) -> list[str]:
        """Runs fault `name`, or its right twin, and returns the findings."""
        self.register()
        self.counter[:] = 0
        self.out[:] = 0
        self.emulator.reset(schedule, seed=seed)
        return self.launch(name, faulty)

    def launch(self, name: str, faulty: bool) -> list[str]:
        """Runs it on the emulator as it stands."""
        buffers = (self.out, self.input, self.scratch, self.counter)
        entry = getattr(self.emulator.lib, f"fault_{name}")
        entry(int(faulty), *(ctypes.c_void_p(b.ctypes.data) for b in buffers))
        return self.emulator.findings()
