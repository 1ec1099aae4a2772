"""The machine of a run: GPU, driver, versions, commit, sources; and the package, built without network.

Standard library only.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("src", "cuda", "cpp", "python", "cmake", "benchmarks", "tests", "CMakeLists.txt", "pyproject.toml")
# Peers by their projects' names: what is found in WHEELS under one of these is installed.
PEERS = ("flashinfer-python", "flash-attn", "flash-linear-attention", "fla-core", "native-sparse-attention", "vllm")
PACKAGES = ("torch", "triton", "numpy", "matplotlib", "pytest", "scikit-build-core", "pybind11", *PEERS)
# import name -> what to install for it. A machine with a torch that can build extensions has all of it; matplotlib and
# the command line's packages are not needed: without the first a report has no pictures.
NEEDED = {
    "torch": "torch", "numpy": "numpy", "pytest": "pytest", "scikit_build_core": "scikit-build-core",
    "pybind11": "pybind11",
}  # fmt: skip
_MISSING = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
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


def gpu_name() -> str:
    """Return the name of the first GPU, "none" where there is none."""
    return (gpu() or {}).get("name", "none")


@functools.cache
def commit() -> str:
    """Return the checkout's commit by the package's own function, from its file: nothing is installed yet."""
    return str(runpy.run_path(str(ROOT / "src" / "nsa_sel" / "measure" / "commit.py"))["commit"]())


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
    return {"commit": commit(), "sources": digest(), "gpu": gpu_name(), "dry": dry, "small": small}


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
        "nvcc": (said_by("nvcc", "--version") or "absent").splitlines()[-1],
        "compiler": (said_by("g++", "--version") or "absent").splitlines()[0],
        "compute_sanitizer": (said_by("compute-sanitizer", "--version") or "absent").splitlines()[-1],
        "packages": versions,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "switches": {name: value for name, value in sorted(os.environ.items()) if name.startswith("NSA_SEL_")},
    }


class InstallError(RuntimeError):
    """What kept the package from being built, and what to do."""


def python_of(env: Path) -> Path:
    """Return the interpreter of the environment."""
    return env / "bin" / "python"


def make_env(env: Path) -> None:
    """Make a virtual environment that sees this interpreter's packages, whether that is a system's or another one's.

    Its .pth file names the folders alone: an editable install of this package there is not followed.
    """
    if not python_of(env).exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    (own,) = env.glob("lib/python*/site-packages")
    seen = [p for p in sys.path if p.endswith(("site-packages", "dist-packages")) and Path(p) != own]
    (own / "base.pth").write_text("".join(f"{p}\n" for p in seen))


def missing(env: Path) -> list[str]:
    """Return what has to be installed beside the package, by its name on the index."""
    done = subprocess.run(
        [str(python_of(env)), "-c", _MISSING, *NEEDED], capture_output=True, text=True, check=True, cwd=env
    )
    return [NEEDED[name] for name in done.stdout.split()]


def install_commands(env: Path, wheels: Path | None, dry: bool) -> list[tuple[list[str], dict[str, str]]]:
    """Return the commands (with environment variables) that build and install the package into the environment.

    Raises:
        InstallError: a dependency is absent and no folder of wheels is given.
    """
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", f"--python={python_of(env)}", "install"]
    commands: list[tuple[list[str], dict[str, str]]] = []
    if wheels is not None and (peers := sorted(str(path) for path in wheels.glob("*.whl") if is_peer(path.name))):
        commands.append(([*pip, "--no-index", "--find-links", str(wheels), *peers], {}))
    if absent := missing(env):
        if wheels is None:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise InstallError(
                f"{', '.join(absent)} not installed here. On a machine with network: pip download --dest wheels "
                f"--only-binary=:all: --python-version {version} {' '.join(absent)}; here: make gpu WHEELS=wheels"
            )
        commands.append(([*pip, "--no-index", "--find-links", str(wheels), *absent], {}))
    variables = {"NSA_SEL_SYSTEM_CUDA": "true", "NSA_SEL_REQUIRE_KERNELS": "ON", "NSA_SEL_ARCHITECTURES": "native"}
    if dry:
        variables = {"NSA_SEL_SYSTEM_CUDA": "true", "NSA_SEL_WITHOUT_KERNELS": "ON", "NSA_SEL_REQUIRE_KERNELS": "OFF"}
    # Editable, so that the commit of what is measured is the checkout's. A build folder of its own, because the one of
    # the development build was configured for other architectures.
    build = [*pip, "--no-index", "--no-build-isolation", "--no-deps", f"--config-settings=build-dir={env}-build"]
    commands.append(([*build, "--editable", str(ROOT)], variables))
    return commands


def is_peer(wheel: str) -> bool:
    """Return whether a wheel's file name is that of a peer.

    >>> is_peer("flash_attn-2.8.0-cp312-cp312-linux_x86_64.whl"), is_peer("numpy-2.3.0-cp312-cp312-linux_x86_64.whl")
    (True, False)
    """
    return wheel.split("-")[0].replace("_", "-").lower() in PEERS


def stamp(env: Path) -> Path:
    """Return the file that says which sources an environment was built from."""
    return env / "built_from.txt"


def built(env: Path) -> bool:
    """Return whether the environment holds these sources' build: a marker may outlive the machine it was made on."""
    return stamp(env).exists() and stamp(env).read_text(encoding="utf-8") == digest()


def check(dry: bool) -> None:
    """Look, in the environment, at what was built: this checkout's package, with machine code for this GPU.

    Raises:
        InstallError: another checkout's package, no kernels, or kernels for other GPUs.
    """
    import nsa_sel

    info = nsa_sel.build_info()
    if ROOT not in Path(nsa_sel.__file__).resolve().parents:
        raise InstallError(f"nsa_sel: expected the package of {ROOT}, got {nsa_sel.__file__}")
    if not dry:
        import torch

        sm = "{}{}".format(*torch.cuda.get_device_capability())
        if not info["kernels"] or sm not in info["architectures"]:
            raise InstallError(f"kernels: expected some for {sm}, got {info['architectures']} ({info['reason']})")
    print("architectures", info["architectures"], "kernels", info["kernels"], "cuda", info["cuda_version"])


if __name__ == "__main__":
    check(sys.argv[1:] == ["dry"])
