"""What this build holds: the compiled module, if it is there, and what it says of itself."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from nsa_sel.errors import BackendError

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


class Instance(NamedTuple):
    """One compiled kernel."""

    name: str
    dtype: str
    Dk: int
    Dv: int
    head_tile: int = 0  # query heads that it handles at once
    cache: str = "same"  # what k and v hold: q's dtype, or "float8_e4m3fn"


@dataclass(frozen=True)
class BuildInfo:
    """What this build holds."""

    kernels: bool
    reason: str | None = None  # why there are no kernels
    instances: tuple[Instance, ...] = ()
    architectures: tuple[int, ...] = ()  # as 90; PTX of the last serves what is newer; empty: not looked at

    @functools.cached_property
    def _by_dims(self) -> dict[tuple[str, int, int, str], list[Instance]]:
        found: dict[tuple[str, int, int, str], list[Instance]] = {}
        for instance in sorted(self.instances, key=lambda instance: instance.head_tile):
            found.setdefault((instance.dtype, instance.Dk, instance.Dv, instance.cache), []).append(instance)
        return found

    def instance_for(self, dtype: str, Dk: int, Dv: int, h: int, cache: str = "same") -> Instance | None:
        """Return the instance for these dims: that of the smallest head tile that holds h heads."""
        for instance in self._by_dims.get((dtype, Dk, Dv, cache), ()):
            if instance.head_tile >= h:
                return instance
        return None

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether the build holds machine code, or PTX, for a device of this compute capability."""
        wanted = capability[0] * 10 + capability[1]
        same_major = any(a // 10 == capability[0] and a <= wanted for a in self.architectures)
        return not self.architectures or same_major or max(self.architectures) <= wanted


@functools.cache
def _info() -> dict[str, Any]:
    info = dict(core.build_info()) if core is not None else {"kernels": False, "reason": _reason}
    lists: dict[str, Any] = {"architectures": [], "instances": []}
    return {"cuda_version": None, "compiler": None, "oldest_driver": None, **lists, **info, "version": __version__}


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
        # bulk copies are an experiment, chosen by name only
        instances=tuple(
            Instance(i["name"], i["dtype"], i["Dk"], i["Dv"], i["head_tile"], i["cache"])
            for i in info["instances"]
            if i["loads"] != "bulk"
        ),
        architectures=tuple(int(a) for a in info["architectures"]),
    )
