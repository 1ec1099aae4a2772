"""Compiles a file of kernels to machine code for one architecture with NVRTC. Called by CMake and by the build.

    python nvrtc.py find      prints the compiler's library, its version, and its folders of headers, one a line
    python nvrtc.py compile --library ... --arch 90 --output x.cubin [--ptx x.ptx] --depfile x.d -I ... x.cu

The compiler: the version that pyproject.toml pins where it is installed, else the newest of this machine: of other
wheels (torch brings one), of CUDA_HOME and of the system's toolkits. Standard library only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path

PINNED = (12, 9)
OLDEST = (12, 0)  # CUDA 11 knows sm_90, but neither clusters of sixteen nor this C++
NEEDED_HEADERS = ("cuda.h", "cuda_bf16.h", "cuda/std/cstdint")
# NVRTC has no standard library: what the kernels' headers use of it comes from libcu++.
_SHIMS = {
    "cstdint": "#pragma once\n#include <cuda/std/cstdint>\nusing namespace cuda::std;\n",
    "cstddef": "#pragma once\n#include <cuda/std/cstddef>\nusing cuda::std::size_t;\n",
}


class Nvrtc:
    """A loaded libnvrtc.

    Raises:
        OSError: it does not load.
    """

    def __init__(self, library: Path) -> None:
        # It looks for its builtins by name alone, which finds what is loaded already.
        for builtins in sorted(library.parent.glob("libnvrtc-builtins.so*")):
            ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
        self.lib = ctypes.CDLL(str(library))

    def check(self, code: int, what: str) -> None:
        """Raise RuntimeError unless a call returned 0."""
        if code != 0:
            self.lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"{what}: {self.lib.nvrtcGetErrorString(code).decode()}")

    def version(self) -> tuple[int, int]:
        """Return (major, minor)."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.check(self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        return major.value, minor.value

    def compile(self, source: Path, options: list[str]) -> tuple[ctypes.c_void_p, str, bool]:
        """Return the program, the compiler's log and whether it compiled."""
        program = ctypes.c_void_p()
        strings = ctypes.c_char_p * len(_SHIMS)
        created = self.lib.nvrtcCreateProgram(
            ctypes.byref(program), source.read_bytes(), os.fsencode(source), len(_SHIMS),
            strings(*(text.encode() for text in _SHIMS.values())), strings(*(name.encode() for name in _SHIMS)),
        )  # fmt: skip
        self.check(created, "nvrtcCreateProgram")
        arguments = (ctypes.c_char_p * len(options))(*map(os.fsencode, options))
        code = self.lib.nvrtcCompileProgram(program, len(options), arguments)
        log = self.take(program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
        return program, log, code == 0

    def take(self, program: ctypes.c_void_p, what: str) -> bytes:
        """Return the program's "CUBIN", "PTX" or "ProgramLog"."""
        size = ctypes.c_size_t()
        self.check(getattr(self.lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
        buffer = ctypes.create_string_buffer(size.value)
        self.check(getattr(self.lib, f"nvrtcGet{what}")(program, buffer), what)
        return buffer.raw


def _toolkits() -> list[Path]:
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    found = [Path(root) for root in named if root] + ([Path(nvcc).resolve().parent.parent] if nvcc else [])
    found += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    return list(dict.fromkeys(root.resolve() for root in found if root.is_dir()))


def _candidates() -> dict[Path, list[Path]]:
    """Return every libnvrtc of this machine and where its headers may be, the likeliest first."""
    toolkits = _toolkits()
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}
    found: dict[Path, list[Path]] = {}
    for nvidia in (Path(package) / "nvidia" for package in sorted(filter(None, packages))):
        for library in nvidia.glob("*/lib/libnvrtc.so.*"):
            root = library.parent.parent
            found[library.resolve()] = [root, nvidia / "cuda_runtime", nvidia / "cuda_cccl", *toolkits]
    for root in toolkits:
        for library in [*root.glob("lib64/libnvrtc.so.*"), *root.glob("targets/*/lib/libnvrtc.so.*")]:
            found.setdefault(library.resolve(), [root, *toolkits])
    return {library: roots for library, roots in found.items() if ".alt." not in library.name}


def _headers(roots: list[Path], version: tuple[int, int]) -> tuple[list[Path], list[str]]:
    """Return the folders that hold the needed headers, of the compiler's major version, and the headers missing."""
    folders: list[Path] = []
    missing = []
    for header in NEEDED_HEADERS:
        for folder in (root / "include" / sub for root in roots for sub in ("", "cccl")):
            if (folder / header).is_file() and _cuda_major(folder) in (None, version[0]):
                folders.append(folder.resolve())
                break
        else:
            missing.append(header)
    return list(dict.fromkeys(folders)), missing


def _cuda_major(folder: Path) -> int | None:
    header = (folder.parent if folder.name == "cccl" else folder) / "cuda.h"
    found = re.search(r"#define CUDA_VERSION (\d+)", header.read_text(errors="replace")) if header.is_file() else None
    return int(found[1]) // 1000 if found else None


def find() -> tuple[Path, tuple[int, int], list[Path]]:
    """Return the compiler to use: library, version, folders of headers.

    Raises:
        RuntimeError: there is none; the message says what was looked at.
    """
    looked: list[str] = []
    best: tuple[tuple[bool, tuple[int, int]], Path, list[Path]] | None = None
    for library, roots in _candidates().items():
        try:
            version = Nvrtc(library).version()
        except (OSError, AttributeError, RuntimeError) as error:
            looked.append(f"{library} does not load ({error})")
            continue
        folders, missing = _headers(roots, version)
        if version < OLDEST:
            looked.append(f"{library} is {version[0]}.{version[1]}, older than {OLDEST[0]}.{OLDEST[1]}")
        elif missing:
            looked.append(f"{library} ({version[0]}.{version[1]}) has no headers {', '.join(missing)}")
        elif best is None or (version == PINNED, version) > best[0]:
            best = ((version == PINNED, version), library, folders)
    if best is None:
        raise RuntimeError(
            ", ".join(looked) or "no libnvrtc among this Python's packages, in CUDA_HOME, /usr/local/cuda*"
        )
    return best[1], best[0][1], best[2]


def dependencies(source: Path, folders: list[Path]) -> list[Path]:
    """Return `source` and every file that it and its headers include by quoted names; NVRTC itself lists none."""
    found = {source: None}
    waiting = [source]
    while waiting:
        file = waiting.pop()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', file.read_text(encoding="utf-8"), re.MULTILINE):
            header = next((p for p in ((f / name).resolve() for f in (file.parent, *folders)) if p.is_file()), None)
            if header is not None and header not in found:
                found[header] = None
                waiting.append(header)
    return list(found)


def depfile(target: str, inputs: list[Path]) -> str:
    """Return a make rule, as ninja reads it."""

    def escaped(path: str) -> str:
        return re.sub(r"([ #])", r"\\\1", path).replace("$", "$$")

    return f"{escaped(target)}: " + " \\\n  ".join(escaped(str(path)) for path in inputs) + "\n"


def _compile(arguments: argparse.Namespace) -> int:
    nvrtc = Nvrtc(arguments.nvrtc)
    options = [
        "--std=c++17", f"--gpu-architecture=sm_{arguments.arch}", "-default-device", "-DNDEBUG",
        "--ptxas-options=--warn-on-spills", "--ptxas-options=--warning-as-error",  # a spill fails the build
        *(["-lineinfo"] if arguments.line_info else []),
        *(f"-I{folder}" for folder in arguments.include),
    ]  # fmt: skip
    source = arguments.source.resolve()
    program, log, compiled = nvrtc.compile(source, options)
    if log:
        print(f"{source} for sm_{arguments.arch}:\n{log}", file=sys.stderr)
    if not compiled:
        return 1
    arguments.output.write_bytes(nvrtc.take(program, "CUBIN"))
    if arguments.ptx:
        arguments.ptx.write_bytes(nvrtc.take(program, "PTX"))
    inputs = [*dependencies(source, arguments.include), Path(__file__).resolve()]
    arguments.depfile.write_text(depfile(str(arguments.output), inputs), encoding="utf-8")
    return 0


def main() -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("find")
    one = commands.add_parser("compile")
    one.add_argument("source", type=Path)
    one.add_argument("--library", dest="nvrtc", type=Path, required=True)
    one.add_argument("--arch", required=True)
    one.add_argument("-o", "--output", type=Path, required=True)
    one.add_argument("--ptx", type=Path)
    one.add_argument("--depfile", type=Path, required=True)
    one.add_argument("--line-info", action="store_true")
    one.add_argument("-I", dest="include", type=Path, action="append", default=[])
    arguments = parser.parse_args()
    try:
        if arguments.command == "compile":
            return _compile(arguments)
        library, version, folders = find()
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(library, f"{version[0]}.{version[1]}", *folders, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
