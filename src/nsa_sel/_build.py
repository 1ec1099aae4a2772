"""What this build and this machine offer: the compiled module if it is there, and the GPU behind a device index."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nsa_sel.errors import BackendError
from nsa_sel.routing import BuildInfo, DeviceInfo, Instance

core: ModuleType | None
_reason: str | None = None
try:
    import nsa_sel._core as _core
except ImportError as error:
    core = None
    missing = isinstance(error, ModuleNotFoundError) and error.name == "nsa_sel._core"
    _reason = "the compiled module nsa_sel._core is not installed" if missing else f"nsa_sel._core: {error}"
else:
    core = _core

try:
    __version__ = importlib.metadata.version("nsa-sel")
except importlib.metadata.PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+source"


@functools.cache
def _info() -> dict[str, Any]:
    info = dict(core.build_info()) if core is not None else {"kernels": False, "reason": _reason}
    without = {"cuda_version": None, "compiler": None, "oldest_driver": None, "architectures": [], "instances": []}
    return {**without, **info, "version": __version__}


def build_info() -> dict[str, Any]:
    """Return what this build holds: version, whether it has kernels (and if not, why), compiler, oldest driver,
    architectures, instances.

    >>> import nsa_sel
    >>> info = nsa_sel.build_info()
    >>> info["kernels"] or info["reason"] is not None
    True
    """
    info = dict(_info())
    info["instances"] = [dict(instance) for instance in info["instances"]]
    info["architectures"] = list(info["architectures"])
    return info


def machine_code() -> Path:
    """Return the file whose section .nv_fatbin holds the kernels' machine code; `cuobjdump --list-elf` lists it.

    Raises:
        BackendError: this build has no kernels.
    """
    if core is None or not _info()["kernels"]:
        raise BackendError(f"kernels: expected a build that has them, got none: {_info()['reason']}")
    return Path(str(core.__file__))


@functools.cache
def routing_build() -> BuildInfo:
    """Return the part of `build_info` that routing looks at."""
    info = _info()
    return BuildInfo(
        kernels=bool(info["kernels"]),
        reason=info["reason"],
        instances=tuple(
            Instance(i["name"], i["dtype"], i["Dk"], i["Dv"], i.get("head_tile", 0)) for i in info["instances"]
        ),
        architectures=tuple(int(a) for a in info["architectures"]),
    )


@functools.cache
def device_info(index: int) -> DeviceInfo:
    """Return name, compute capability and number of SMs of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    return DeviceInfo(properties.name, (properties.major, properties.minor), properties.multi_processor_count)
