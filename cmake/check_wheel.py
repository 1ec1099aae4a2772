"""Loads an installed module without torch and without a driver and checks that it holds kernels; ends a wheel build."""

from __future__ import annotations

import importlib.util
import site
import sysconfig
from pathlib import Path


def main() -> None:
    """Find nsa_sel._core without importing the package, which needs torch."""
    folders = [sysconfig.get_path("platlib"), *site.getsitepackages()]
    (file,) = {file.resolve() for folder in folders for file in Path(folder).glob("nsa_sel/_core*.so")}
    spec = importlib.util.spec_from_file_location("nsa_sel._core", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    info = module.build_info()
    assert info["kernels"], info["reason"]
    print(info["version"], info["compiler"], *info["architectures"], len(info["instances"]), "instances")


if __name__ == "__main__":
    main()
