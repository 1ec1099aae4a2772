"""Builds the kernel's sources together with the emulator into a shared library, with g++ and the CUDA headers alone."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import site
import subprocess
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
EMULATOR = HERE / "emulator"
CHECKOUT = HERE.parent.parent
KINDS = ("hook", "fast", "asan")

_MAX_JOBS = 2
_KEEP_DAYS = 7
_HEADER_SUFFIXES = {".h", ".hpp", ".cuh", ".inc"}
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
# -fno-gnu-unique: several of these libraries live in one process, and must not share each other's static variables.
_COMMON = ("-std=c++17", "-fPIC", "-g", "-fno-gnu-unique", "-DNSA_SEL_HOST_RUN", "-Wall", "-Wextra")
_KERNEL_WARNINGS = ("-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-unused-function")
_KERNEL = {
    # Only the kernel is instrumented: the emulator answers the calls, and nothing links libtsan.
    "hook": ("-O1", "-fsanitize=thread", "-Wno-tsan"),
    "fast": ("-O2",),
    "asan": ("-O1", *_SANITIZE),
}


def _emulator_flags(kind: str) -> tuple[str, ...]:
    if kind == "asan":
        return ("-O1", "-fsanitize=address", "-fno-omit-frame-pointer")
    # Joining vector clocks is most of the emulator's work, and twice as fast in wide registers.
    cpu = Path("/proc/cpuinfo")
    wide = platform.machine() == "x86_64" and cpu.exists() and " avx2 " in cpu.read_text()
    return ("-O3", "-mavx2") if wide else ("-O3",)


@functools.cache
def compiler() -> str:
    """The path of g++; CXX overrides it.

    Raises:
        RuntimeError: there is no g++.
    """
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    if found is None:
        raise RuntimeError(f"the host run needs g++, but {name!r} is not on PATH")
    return found


@functools.cache
def cuda_include() -> Path:
    """The folder that holds cuda_bf16.h: CUDA_HOME, /usr/local/cuda, the toolkit of nvcc, or the wheels of PyPI.

    Raises:
        RuntimeError: none of these has the CUDA headers.
    """
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots.append(Path("/usr/local/cuda"))
    nvcc = shutil.which("nvcc")
    if nvcc:
        roots.append(Path(nvcc).resolve().parent.parent)
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    for package in sorted(p for p in packages if p):
        roots += [Path(package) / "nvidia" / "cu13", Path(package) / "nvidia" / "cuda_runtime"]
    for root in roots:
        if (root / "include" / "cuda_bf16.h").is_file():
            return root / "include"
    looked = ", ".join(str(root) for root in roots)
    raise RuntimeError(f"the host run needs the CUDA headers (cuda_bf16.h), but none of these roots has them: {looked}")


def cache_folder() -> Path:
    """Where objects and libraries are kept: NSA_SEL_HOST_RUN_DIR, or build/host_run in the checkout."""
    chosen = os.environ.get("NSA_SEL_HOST_RUN_DIR")
    folder = Path(chosen) if chosen else CHECKOUT / "build" / "host_run"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def _toolchain() -> str:
    command = [compiler(), "-dumpfullversion", "-dumpmachine"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    runtime = cuda_include() / "cuda_runtime_api.h"
    lines = runtime.read_text().splitlines() if runtime.exists() else []
    return f"{compiler()} {version} {cuda_include()} {[line for line in lines if 'define CUDART_VERSION' in line]}"


def _headers(folders: Iterable[Path]) -> list[Path]:
    found = {p for folder in folders for p in folder.rglob("*") if p.suffix in _HEADER_SUFFIXES and p.is_file()}
    return sorted(found)


def digest(parts: Iterable[str], files: Iterable[Path]) -> str:
    """Name what is built from these words and files."""
    h = hashlib.sha256()
    for part in parts:
        h.update(part.encode() + b"\0")
    for file in files:
        h.update(str(file).encode() + b"\0" + file.read_bytes() + b"\0")
    return h.hexdigest()[:24]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Parallel test workers ask for the same file at the same moment: one makes it, the others find it made."""
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\nfailed with {result.returncode}:\n{result.stderr[:8000]}")


def into(target: Path, command: Sequence[str]) -> None:
    """Runs a compiler whose output appears under its name only when it is complete."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        _run([*command, "-o", str(partial)])
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def library(kind: str, sources: Sequence[Path | str], include_dirs: Sequence[Path | str] = ()) -> Path:
    """Builds (or finds) a shared library of the kernel's `sources` and the emulator.

    Args:
        kind: "hook" (every plain access of the kernel is checked), "fast" (only primitives are) or "asan"
            (AddressSanitizer and UBSan; to be loaded by a child process that preloads `sanitizer_preload()`).
        sources: .cu and .cpp files. A .cu file is compiled as C++ with NSA_SEL_HOST_RUN defined; a .cpp file is the
            host's side and is never instrumented for races.
        include_dirs: searched before the CUDA headers. Their headers, and those beside the sources, are inputs.

    Raises:
        RuntimeError: no g++, no CUDA headers, or a source that does not compile.
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    kernel_sources = [Path(s).resolve() for s in sources]
    folders = [Path(d).resolve() for d in include_dirs]
    system = ["-isystem", str(cuda_include())]
    headers = _headers([*folders, EMULATOR, *{s.parent for s in kernel_sources}])

    jobs: list[tuple[Path, Path, list[str]]] = []
    cache = cache_folder()
    for source in [*kernel_sources, *sorted(EMULATOR.glob("*.cpp"))]:
        own = source.parent == EMULATOR
        is_kernel = source.suffix == ".cu"
        flags = [*_COMMON]
        flags += _emulator_flags(kind) if own else (_KERNEL[kind] if is_kernel or kind == "asan" else ("-O2",))
        if not own:
            flags += _KERNEL_WARNINGS
        # The emulator sees nothing of the kernel: its objects serve every copy of the sources.
        include = [*(f"-I{d}" for d in ((EMULATOR,) if own else (*folders, EMULATOR))), *system]
        inputs = [source, *(_headers([EMULATOR]) if own else headers)]
        key = digest([_toolchain(), *flags, *include], inputs)
        command = [compiler(), *flags, *include, "-x", "c++", "-c", str(source)]
        jobs.append((source, cache / f"{source.stem}-{key}.o", command))

    link = ["-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", *(_SANITIZE if kind == "asan" else ())]
    if kind == "asan":
        link.remove("-Wl,-z,defs")  # the sanitizer's symbols come from the preloaded runtime
    name = digest([_toolchain(), *link, *(str(o.name) for _, o, _ in jobs)], [])
    target = cache / f"lib{kind}-{name}.so"
    if target.exists():
        target.touch()
        return target
    with locked(cache):
        if target.exists():
            return target
        missing = [(o, command) for _, o, command in jobs if not o.exists()]
        with ThreadPoolExecutor(_MAX_JOBS) as pool:
            for done in [pool.submit(into, o, command) for o, command in missing]:
                done.result()
        for _, o, _ in jobs:
            o.touch()
        _prune(cache)
        into(target, [compiler(), *link, *(str(o) for _, o, _ in jobs), "-ldl", "-lpthread"])
    return target


def _prune(cache: Path) -> None:
    """Removes what no test has asked for in a while: every edit of a kernel leaves a set of objects behind."""
    oldest = time.time() - _KEEP_DAYS * 86_400
    for path in [*cache.glob("*.o"), *cache.glob("*.so")]:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                path.unlink()


def sanitizer_preload() -> str:
    """LD_PRELOAD for a process that loads an "asan" library: its runtime has to come first."""
    paths = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):
        found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        paths.append(found.stdout.strip())
    return " ".join(paths)
