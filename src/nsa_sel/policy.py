"""The measured policy: which backend is worth using on which GPU, from which L on, as a JSON file.

One looks like `{"version": 1, "devices": {"NVIDIA H200": {"cuda": {"enabled": true, "min_l": 256}}}}`.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_sel.errors import PolicyError

VERSION = 1
BACKENDS = ("cuda", "triton")


@dataclass(frozen=True, slots=True)
class Rule:
    """Whether a backend is on for a device and the smallest L (tokens) it is worth using at."""

    enabled: bool
    min_l: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules by device name (as the driver reports it) and backend."""

    devices: Mapping[str, Mapping[str, Rule]] = field(default_factory=dict)

    def rule(self, device: str, backend: str) -> Rule | None:
        """Return the rule measured for `backend` on `device`, or None where nothing was measured."""
        return self.devices.get(device, {}).get(backend)


def user_path() -> Path:
    """Return the policy of the user's configuration folder: XDG_CONFIG_HOME, else ~/.config."""
    named = os.environ.get("XDG_CONFIG_HOME", "")
    # A relative path there is to be ignored, says the XDG specification.
    folder = Path(named) if Path(named).is_absolute() else Path(os.path.expanduser("~")) / ".config"  # noqa: PTH111
    return folder / "nsa_sel" / "policy.json"


def find(named: str | None) -> Path | None:
    """Return the policy to read: the one that was named, which must be there, or the user's own where there is one."""
    if named:
        return Path(named)
    try:
        return user_path() if user_path().exists() else None
    except OSError:  # a home that may not be searched (a service's, a container's) holds no policy of this user
        return None


def default_path() -> Path:
    """Return where the policy is looked for: NSA_SEL_POLICY, else the user's configuration folder."""
    named = os.environ.get("NSA_SEL_POLICY")
    return Path(named) if named else user_path()


def load(path: str | os.PathLike[str]) -> Policy:
    """Read a policy file.

    Raises:
        PolicyError: the file cannot be read or does not hold a policy.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe would be waited for without end
            raise OSError("not a regular file")
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PolicyError(f"policy {path}: expected a readable JSON file, got {error}") from error
    try:
        # a name that stands twice would silently lose the first rule
        data = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except RecursionError as error:
        raise PolicyError(f"policy {path}: expected JSON, got one nested too deeply") from error
    except PolicyError:
        raise
    except ValueError as error:  # a number of thousands of digits too
        raise PolicyError(f"policy {path}: expected JSON, got {error}") from error
    return _parse(path, data)


def save(policy: Policy, path: str | os.PathLike[str]) -> None:
    """Write a policy file in one step, so that a reader sees the old one or the new one and never half of it."""
    devices = {
        device: {backend: {"enabled": rule.enabled, "min_l": rule.min_l} for backend, rule in rules.items()}
        for device, rules in policy.devices.items()
    }
    data = {"version": VERSION, "devices": devices}
    _parse(path, data)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    draft = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2, sort_keys=True)
            file.write("\n")
        draft.chmod(_mode_of(target))
        draft.replace(target)
    except BaseException:
        draft.unlink()
        raise


def _mode_of(target: Path) -> int:
    """Return the mode that a file written at `target` has: its own where there is one, else what the umask leaves."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        mask = os.umask(0)  # there is no other way to ask for it
        os.umask(mask)
        return 0o666 & ~mask


def _unique(path: object, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise PolicyError(f"policy {path}: expected each name once, got {[name for name, _ in pairs]}")
    return result


def _parse(path: object, data: object) -> Policy:
    top = _table(path, "the file", data, required=("version", "devices"))
    if type(top["version"]) is not int or top["version"] != VERSION:
        raise PolicyError(f"policy {path}: version: expected {VERSION}, got {top['version']!r}")
    devices: dict[str, dict[str, Rule]] = {}
    for device, backends in _table(path, "devices", top["devices"]).items():
        where = f"devices[{device!r}]"
        rules = {}
        for backend, entry in _table(path, where, backends, optional=BACKENDS).items():
            rules[backend] = _rule(path, f"{where}[{backend!r}]", entry)
        devices[device] = rules
    return Policy(devices)


def _rule(path: object, where: str, entry: object) -> Rule:
    fields = _table(path, where, entry, required=("enabled",), optional=("min_l",))
    enabled, min_l = fields["enabled"], fields.get("min_l", 0)
    if not isinstance(enabled, bool):
        raise PolicyError(f"policy {path}: {where}.enabled: expected true or false, got {enabled!r}")
    if isinstance(min_l, bool) or not isinstance(min_l, int) or min_l < 0:
        raise PolicyError(f"policy {path}: {where}.min_l: expected a whole number >= 0, got {min_l!r}")
    return Rule(enabled, min_l)


def _table(
    path: object, where: str, value: object, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Require an object with the required names and, if any are given, no others than these and the optional ones."""
    if not isinstance(value, dict):
        raise PolicyError(f"policy {path}: {where}: expected an object, got {value!r}")
    missing = [name for name in required if name not in value]
    known = required + optional
    unknown = [name for name in value if known and name not in known]
    if missing or unknown:
        raise PolicyError(f"policy {path}: {where}: expected the names {list(known)}, got {list(value)}")
    return value
