"""The environment that the round runs in, and the package built into it without network. Standard library only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.machine import ROOT

# import name -> what to install for it; all else that is needed comes with a torch that can build extensions
NEEDED = {
    "torch": "torch", "numpy": "numpy", "typer": "typer", "rich": "rich",
    "matplotlib": "matplotlib", "pandas": "pandas", "pytest": "pytest", "hypothesis": "hypothesis",
    "scikit_build_core": "scikit-build-core", "pybind11": "pybind11",
}  # fmt: skip
_MISSING = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"


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
    (own / "round_base.pth").write_text("".join(f"{p}\n" for p in seen))


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
