"""Where the machine code comes from: files of kernels for one architecture, by instance."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.host_run import build
from tests.machine_code import listing
from tests.machine_code.native import ROOT, Program

_ELEMENTS = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
_DTYPES = {"float16": "kFloat16", "bfloat16": "kBfloat16"}  # enum Dtype
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
        if self.is_combine:
            name, element = f"nsa_sel_combine_{self.dtype}", _ELEMENTS[self.dtype]
            kernel = f"NSA_SEL_KERNEL({name}, CombineParams, kCombineThreads, 1) {{ combine_kernel<{element}>(p); }}"
        else:
            dims = f"{self.Dk}, {self.Dv}, {self.head_tile}"
            kernel = f"NSA_SEL_DECODE({_DTYPES[self.dtype]}, {dims}, {_LOADS[self.loads]})"
        include = '#include "combine_kernel.cuh"\n#include "kernel_entry.cuh"\n'
        return f"{include}namespace nsa_sel {{\n{kernel}\n}}\n"


@functools.cache
def _compiler() -> list[str]:
    """Return the build's own compiler as a command, with the folders of headers."""
    script = ROOT / "cmake" / "nvrtc.py"
    found = subprocess.run([sys.executable, str(script), "find"], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise RuntimeError(f"NVRTC: expected one to compile kernels with, got none: {found.stderr.strip()}")
    library, _version, *folders = found.stdout.splitlines()
    include = [f"-I{folder}" for folder in (ROOT / "cuda", ROOT / "cpp", *folders)]
    return [sys.executable, str(script), "compile", "--library", library, "--line-info", *include]


@functools.cache
def compiled(instance: Instance, arch: str) -> Path:
    """Compile one kernel of this checkout with line information (the code is the same without it)."""
    headers = sorted([*(ROOT / "cuda").rglob("*.*"), *(ROOT / "cpp").glob("*.h"), ROOT / "cmake" / "nvrtc.py"])
    folder = ROOT / "build" / "machine_code"
    folder.mkdir(parents=True, exist_ok=True)
    command = [*_compiler(), "--arch", arch.removeprefix("sm_")]
    name = build.digest([*command, instance.source()], headers)
    target, source = folder / f"{name}.cubin", folder / f"{name}.cu"
    with build.locked(folder):
        if not target.exists():
            source.write_text(instance.source())
            build.into(target, [*command, "--depfile", str(source.with_suffix(".d")), str(source)])
    return target


@functools.cache
def program(instance: Instance, arch: str, cubin: Path | None = None) -> Program:
    """Return a kernel's decoded instructions, with source lines; `cubin` takes the place of this checkout's code."""
    kernels = listing.kernels(listing.listing(cubin or compiled(instance, arch), with_lines=True))
    if len(kernels) != 1:
        raise ValueError(f"cubin: expected one kernel, got {sorted(kernels)}")
    return Program(next(iter(kernels.values())), arch)
