"""What a round ran on and of what: GPU, clocks, driver, versions, commit, sources. Standard library only."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("src", "cuda", "cpp", "python", "cmake", "benchmarks", "tests", "CMakeLists.txt", "pyproject.toml")
PACKAGES = (
    "torch", "triton", "numpy", "pandas", "matplotlib", "typer", "rich", "pytest", "scikit-build-core", "pybind11",
    "flashinfer-python", "flash-attn", "flash-linear-attention", "vllm",
)  # fmt: skip
_FIELDS = (
    "name", "uuid", "compute_cap", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "clocks.max.mem", "power.limit", "temperature.gpu", "persistence_mode", "mig.mode.current",
    "ecc.mode.current", "utilization.gpu",
)  # fmt: skip


def said_by(*command: str) -> str | None:
    """Return what a command prints, or None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def gpu() -> dict[str, str] | None:
    """Return what nvidia-smi knows of the first GPU, or None where there is none."""
    said = said_by("nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader")
    if not said:
        return None
    values = [value.strip() for value in said.splitlines()[0].split(",")]
    return dict(zip(_FIELDS, values, strict=False))


@functools.cache
def commit() -> str:
    """Return the checkout's commit with "-dirty" where files differ; COMMIT names it where there is no repository."""
    head = said_by("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get("COMMIT") or "unknown"
    return head + ("-dirty" if said_by("git", "status", "--porcelain", "--untracked-files=no") else "")


@functools.cache
def digest() -> str:
    """Return a digest of the sources: what a step has shown holds for these and no others, committed or not."""
    found = hashlib.sha256()
    for name in SOURCES:
        top = ROOT / name
        files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.is_file())
        for path in files:
            relative = path.relative_to(ROOT)
            if path.suffix in (".pyc", ".so") or relative.parts[:2] == ("benchmarks", "results"):
                continue
            found.update(str(relative).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def identity(dry: bool, small: bool) -> dict[str, Any]:
    """Return what must be the same for a finished step to count again."""
    name = (gpu() or {}).get("name", "none")
    return {"commit": commit(), "sources": digest(), "gpu": name, "dry": dry, "small": small}


def environment(dry: bool, small: bool) -> dict[str, Any]:
    """Return everything known of this machine, as plain values; a GPU that is not there is NOT MEASURED."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return identity(dry, small) | {
        "gpu": gpu() or "NOT MEASURED: nvidia-smi names no GPU here",
        "torch": _torch(),
        "nvcc": (said_by("nvcc", "--version") or "absent").splitlines()[-1],
        "compiler": (said_by("g++", "--version") or "absent").splitlines()[0],
        "compute_sanitizer": (said_by("compute-sanitizer", "--version") or "absent").splitlines()[-1],
        "packages": versions,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "switches": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NSA_SEL_")},
    }


def _torch() -> dict[str, Any] | str:
    try:
        import torch
    except ImportError as error:
        return f"absent: {error}"
    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "sm": f"{properties.major}{properties.minor}"}
        found |= {"sm_count": properties.multi_processor_count, "l2_bytes": properties.L2_cache_size}
    return found
