"""Where the machine code comes from: the installed package's own, or one kernel compiled again with source lines."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from nsa_sel import _build, facts
from tests.host_run import build
from tests.machine_code import listing
from tests.machine_code.native import ROOT, Program

_DECODE = re.compile(
    r"nsa_sel_decode_(?P<dtype>\w+?)_(?P<Dk>\d+)x(?P<Dv>\d+)_h(?P<tile>\d+)(?P<bulk>_bulk)?(?P<float8>_float8)?"
)
_COMBINE = re.compile(r"nsa_sel_combine_(?P<dtype>\w+)")
_DTYPES = {"float16": ("kFloat16", "__half"), "bfloat16": ("kBfloat16", "__nv_bfloat16")}


def _folder() -> Path:
    folder = ROOT / "build" / "machine_code"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def shipped(arch: str) -> dict[str, Path] | None:
    """Return the files of machine code of the installed package by kernel; None where it was built without kernels."""
    if not _build.build_info()["kernels"]:
        return None
    module = _build.machine_code()
    folder = _folder() / f"shipped-{build.digest([arch], [module])}"
    with build.locked(_folder()):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=_folder()) as parts:
                command = [str(facts.find_cuobjdump()), "-xelf", f".{arch}.", str(module)]
                subprocess.run(command, cwd=parts, check=True, capture_output=True)
                Path(parts).rename(folder)
                Path(parts).mkdir()  # for the context manager to remove
    symbols = {}
    for cubin in sorted(folder.glob("*.cubin")):
        for symbol in listing.symbols(cubin):
            symbols[symbol] = cubin
    if not symbols:
        raise RuntimeError(f"{module}: expected machine code for {arch}, got none")
    return symbols


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


def _source(kernel: str) -> str:
    if found := _DECODE.fullmatch(kernel):
        dims = f"{found['Dk']}, {found['Dv']}, {found['tile']}"
        loads, cache = "kBulk" if found["bulk"] else "kCpAsync", "kFloat8E4m3" if found["float8"] else "kSame"
        body = f"NSA_SEL_DECODE({_DTYPES[found['dtype']][0]}, {dims}, {loads}, {cache})"
    elif found := _COMBINE.fullmatch(kernel):
        call = f"{{ combine_kernel<{_DTYPES[found['dtype']][1]}>(p); }}"
        body = f"NSA_SEL_KERNEL({kernel}, CombineParams, kCombineThreads, 1) {call}"
    else:
        raise ValueError(f"kernel: expected a name as nsa_sel_decode_bfloat16_192x128_h16, got {kernel!r}")
    include = '#include "combine_kernel.cuh"\n#include "kernel_entry.cuh"\n'
    return f"{include}namespace nsa_sel {{\n{body}\n}}\n"


@functools.cache
def compiled(kernel: str, arch: str) -> Path:
    """Compile one kernel of this checkout with source lines (the code is the same without them)."""
    headers = sorted([*(ROOT / "cuda").rglob("*.*"), *(ROOT / "cpp").glob("*.h"), ROOT / "cmake" / "nvrtc.py"])
    command = [*_compiler(), "--arch", arch.removeprefix("sm_")]
    name = build.digest([*command, _source(kernel)], headers)
    target, source = _folder() / f"{name}.cubin", _folder() / f"{name}.cu"
    with build.locked(_folder()):
        if not target.exists():
            source.write_text(_source(kernel))
            build.into(target, [*command, "--depfile", str(source.with_suffix(".d")), str(source)])
    return target


@functools.cache
def program(kernel: str, arch: str) -> Program:
    """Return a kernel's instructions: the installed package's; of a build without kernels, compiled as it would be."""
    files = shipped(arch)
    return Program(listing.kernel(files[kernel] if files else compiled(kernel, arch), kernel), arch)


@functools.cache
def with_lines(kernel: str, arch: str, cubin: Path | None = None) -> Program:
    """Return a kernel compiled with source lines, for the clock's stages; `cubin` is another compile of it."""
    return Program(listing.kernel(cubin or compiled(kernel, arch), kernel, with_lines=True), arch)
