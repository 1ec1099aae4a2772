"""Builds and loads the fake driver, tells it what to do, and says which GPU a CPU tensor stands for."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsa_sel import devices, execute
from nsa_sel.devices import DeviceInfo, StandIn
from tests.host_run import build
from tests.host_run.abi import library as kernels_library

SOURCE = Path(__file__).with_name("fake_cuda.cpp")
OUT_OF_MEMORY, INVALID_IMAGE, NO_BINARY, UNSUPPORTED_PTX, NOT_FOUND = 2, 200, 209, 222, 500
ILLEGAL_ADDRESS, OUT_OF_RESOURCES = 700, 701
H100 = {"capability": 90, "sm_count": 132, "smem_per_block": 232_448, "smem_per_sm": 233_472}
A100 = {"capability": 80, "sm_count": 108, "smem_per_block": 166_912, "smem_per_sm": 167_936}


def built() -> Path:
    """Build the driver once; it is found by the name that every NVIDIA driver has."""
    command = [
        build.compiler(),
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-fPIC",
        "-shared",
        "-Wl,-soname,libcuda.so.1",
    ]
    command += ["-isystem", str(build.cuda_include()), str(SOURCE)]
    target = build.cache_folder() / f"libfakecuda-{build.digest(command, [SOURCE])}.so"
    with build.locked(build.cache_folder()):
        if not target.exists():
            build.into(target, command)
    return target


LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, *[ctypes.c_uint] * 4, ctypes.c_int, ctypes.c_void_p
)  # emu_launch


def writable_memory() -> list[tuple[int, int]]:
    """Return (start, bytes) of what this process has mapped to write to; not what is only reserved."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        start, end = (int(part, 16) for part in span.split("-"))
        if rights.startswith("rw") and end - start < 2**32:
            found.append((start, end - start))
    return found


class FakeDriver:
    """The loaded driver. Loading it first is what makes nsa_sel's own look for libcuda.so.1 end here."""

    def __init__(self, **settings: int) -> None:
        self.lib = ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL)
        self.lib.fake_record.restype = ctypes.c_char_p
        self.lib.fake_set.argtypes = [ctypes.c_char_p, ctypes.c_longlong]
        self.lib.fake_emulator.argtypes = [ctypes.c_void_p]
        self.findings: list[str] = []  # of the emulator
        self.set(**settings)

    def set(self, device: int | None = None, **settings: int) -> None:
        """Tell it a version, or attributes of all devices or of one."""
        for name, value in settings.items():
            self.lib.fake_set((name if device is None else f"{name}.{device}").encode(), value)

    def fail(self, function: str, code: int, after: int = 0) -> None:
        """Let a function fail with a code, after so many calls that succeed."""
        self.lib.fake_fail(function.encode(), code, after)

    def mend(self, function: str) -> None:
        """Let a function succeed again."""
        self.lib.fake_mend(function.encode())

    def miss(self, function: str) -> None:
        """Be a driver that does not have a function."""
        self.lib.fake_miss(function.encode())

    def emulate(self) -> None:
        """Hand launches to the kernel's sources on the emulator, which runs them and checks no races.

        Like a GPU it is given no tensors: whatever this process may write is memory to it.
        """
        emulator, lib = kernels_library("fast")
        lib.emu_launch.argtypes = [ctypes.c_char_p, *[ctypes.c_uint] * 4, ctypes.c_int, ctypes.c_void_p]

        def launch(*arguments: Any) -> int:
            emulator.unregister_all()
            for start, size in writable_memory():
                emulator.register(f"{start:x}", start, size, writable=True, tracked=False)
            emulator.reset(0, check=False)
            code = int(lib.emu_launch(*arguments))
            self.findings += emulator.findings()
            return code

        self._callback = LAUNCH(launch)
        self.lib.fake_emulator(ctypes.cast(self._callback, ctypes.c_void_p))

    def record(self) -> list[str]:
        """Return a line for each call so far."""
        return self.lib.fake_record().decode().splitlines()

    def launches(self) -> list[dict[str, str]]:
        """Return the launches so far: kernel, device, grid, block, smem, cluster, programmatic, stream."""
        found = []
        for line in self.record():
            if line.startswith("cuLaunchKernelEx nsa_sel"):
                _, kernel, *rest = line.split()
                found.append({"kernel": kernel, **dict(zip(rest[::2], rest[1::2], strict=True))})
        return found


@contextmanager
def cpu_tensors_on(capability: int = 90, index: int = 0, stream: int = 7) -> Iterator[None]:
    """Let CPU tensors stand for those of a GPU."""
    standing = StandIn(DeviceInfo("fake GPU", divmod(capability, 10), 132), index, stream)
    devices.stand_in = lambda: standing
    execute._forget_launches()  # a kept launch knows the tensors' own device, which is the CPU both times
    try:
        yield
    finally:
        devices.stand_in = None
        execute._forget_launches()
