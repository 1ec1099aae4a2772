"""Where the machine code comes from: files of kernels for one architecture, by instance."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.host_run import build
from tests.machine_code import listing
from tests.machine_code.native import ROOT, Program

_ELEMENTS = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
_LOADS = {"cp.async": "kCpAsync", "bulk": "kBulk"}


@dataclass(frozen=True)
class Instance:
    """A compiled decode kernel; `combine` kernels have a dtype alone."""

    dtype: str
    Dk: int = 0
    Dv: int = 0
    head_tile: int = 0
    loads: str = "cp.async"

    @property
    def is_combine(self) -> bool:
        """The kernel that merges the partials of split rows."""
        return self.Dk == 0

    def source(self) -> str:
        """A file that compiles this kernel alone, from the package's sources."""
        element = _ELEMENTS[self.dtype]
        if self.is_combine:
            return (
                f'#include "combine_kernel.cuh"\nnamespace nsa_sel {{\n'
                f"template __global__ void combine_kernel<{element}>(const __grid_constant__ CombineParams);\n}}\n"
            )
        traits = f"DecodeTraits<{element}, {self.Dk}, {self.Dv}, {self.head_tile}, Loads::{_LOADS[self.loads]}>"
        return (
            f'#include "decode_kernel.cuh"\nnamespace nsa_sel {{\n'
            f"template __global__ void decode_kernel<{traits}>(const __grid_constant__ DecodeParams);\n}}\n"
        )


@functools.cache
def compiled(instance: Instance, arch: str) -> Path:
    """Compile one kernel of this checkout with line information (the code is the same without it)."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    headers = sorted([*(ROOT / "cuda").rglob("*.*"), *(ROOT / "cpp").glob("*.h")])
    flags = ["-cubin", f"-arch={arch}", "-lineinfo", "-std=c++17", f"-I{ROOT / 'cuda'}", f"-I{ROOT / 'cpp'}"]
    folder = ROOT / "build" / "machine_code"
    folder.mkdir(parents=True, exist_ok=True)
    name = build.digest([nvcc, *flags, instance.source()], headers)
    target, source = folder / f"{name}.cubin", folder / f"{name}.cu"
    with build.locked(folder):
        if not target.exists():
            source.write_text(instance.source())
            build.into(target, [nvcc, *flags, str(source)])
    return target


@functools.cache
def program(instance: Instance, arch: str, cubin: Path | None = None) -> Program:
    """Return a kernel's decoded instructions, with source lines; `cubin` takes the place of this checkout's code."""
    kernels = listing.kernels(listing.listing(cubin or compiled(instance, arch), with_lines=True))
    if len(kernels) != 1:
        raise ValueError(f"cubin: expected one kernel, got {sorted(kernels)}")
    return Program(next(iter(kernels.values())), arch)
