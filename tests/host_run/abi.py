"""The C interface of the kernel's library: building and loading it, planning a call."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_sel.backends._request import CACHES, DTYPES, FIELDS, LOADS
from tests.host_run import build
from tests.host_run.emulator import Emulator

ROOT = Path(__file__).resolve().parents[2]
HOST_SOURCE = "tests/host_run/kernel_host.cpp"


class _Plan(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "grid",
            "blocks_per_sm",
            "num_slots",
            "smem_bytes",
            "full_rows",
            "split_rows",
            "num_splits",
            "cluster",
            "workspace_floats",
        )
    ]


class _Limits(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int32) for n in ("sm_count", "capability", "smem_per_block", "smem_per_sm")]


@dataclass(frozen=True)
class Device:
    """The GPU that planning sees. Few SMs by default, so that persistent blocks walk over several items."""

    sm_count: int = 2
    capability: int = 80
    smem_per_block: int = 166_912
    smem_per_sm: int = 167_936


def limits_of(device: Device) -> ctypes.Structure:
    """Mirror of `DeviceLimits` in cpp/plan.h."""
    return _Limits(device.sm_count, device.capability, device.smem_per_block, device.smem_per_sm)


def library_file(kind: str, root: Path = ROOT) -> Path:
    """Build (first call) the kernel's sources: the very files in cuda/ and cpp/, or a changed copy of them."""
    kernels = sorted((root / "cuda").glob("instances/*.cu"))
    host = [*sorted((root / "cpp").glob("*.cpp")), root / HOST_SOURCE]
    return build.library(kind, [*kernels, *host], include_dirs=[root / "cuda", root / "cpp"])


@functools.cache
def library(kind: str, root: Path = ROOT) -> tuple[Emulator, Any]:
    """Load what `library_file` builds, once a process."""
    emulator = Emulator(library_file(kind, root))
    lib = emulator.lib
    lib.nsa_prepare.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int]
    lib.nsa_launch.argtypes = [ctypes.c_void_p]
    if (found := _request_fields(lib)) != FIELDS:
        raise RuntimeError(f"DecodeRequest: expected {FIELDS}, got {found}")
    return emulator, lib


def _request_fields(lib: Any) -> tuple[tuple[str, int], ...]:
    lib.nsa_request_field.restype = ctypes.c_char_p
    found, count = [], ctypes.c_int64()
    while (name := lib.nsa_request_field(len(found), ctypes.byref(count))) is not None:
        found.append((name.decode(), count.value))
    return tuple(found)


def instances(kind: str = "hook", root: Path = ROOT) -> set[tuple[str, int, int, int, str, str]]:
    """Return the compiled kernels as (dtype, Dk, Dv, head tile, loads, cache)."""
    _, lib = library(kind, root)
    found = set()
    for i in range(lib.nsa_num_instances()):
        key = (ctypes.c_int64 * 6)()
        lib.nsa_instance(i, key)
        found.add((DTYPES[key[0]], key[1], key[2], key[3], LOADS[key[4]], CACHES[key[5]]))
    return found


def plan_call(lib: Any, request: bytes, device: Device) -> dict[str, int]:
    """Make `request` the one that the next launch runs."""
    limits, plan = limits_of(device), _Plan()
    message = ctypes.create_string_buffer(512)
    if lib.nsa_prepare(request, ctypes.byref(limits), ctypes.byref(plan), message, len(message)) != 0:
        raise ValueError(message.value.decode())
    return {name: getattr(plan, name) for name, _ in _Plan._fields_}
