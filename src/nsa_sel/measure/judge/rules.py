"""The gate's rules: TOML data, checked as strictly as the files they judge."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_RULES = Path(__file__).with_name("rules.toml")
# Parts of something: above 1 such a rule would pass anything. All others are numbers above 0.
_FRACTIONS = (
    "share.min", "trust.speedup_off", "trust.bytes_off", "trust.residual", "trust.amdahl_off", "trust.clock_drift",
    "trust.anchor_off", "trust.fall", "trust.alike",
)  # fmt: skip


class RulesError(ValueError):
    """A rules file that cannot be read, names an unknown rule, or gives one a value out of its range."""


class Rules(SimpleNamespace):
    """What a GPU has to show before its kernel is switched on, and how far the data may disagree with itself.

    Its attributes are the rules of rules.toml: `roi_margin` is `margin` in the table `[roi]`.
    """


def load_rules(path: str | Path | None = None, given: dict[str, float | None] | None = None) -> Rules:
    """Load the default rules with those of the TOML file at `path` and those in `given` (unless None) in their place.

    Raises:
        RulesError: the file cannot be read, names an unknown rule, or a value has a wrong type or lies out of range.

    >>> load_rules(given={"roi.margin": 1.5}).roi_margin
    1.5
    """
    values = _parse(DEFAULT_RULES)
    other = {} if path is None else _parse(Path(path))
    other |= {name: value for name, value in (given or {}).items() if value is not None}
    for name, value in other.items():
        if name not in values:
            raise RulesError(f"{path}: expected one of {', '.join(sorted(values))}, got {name}")
        _check(name, value, path or "rules")
    return Rules(**{name.replace(".", "_"): value for name, value in (values | other).items()})


def _parse(path: Path) -> dict[str, Any]:
    """Return the rules of a TOML file by the names of table and rule."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RulesError(f"rules: expected a TOML file, got {path} ({error.strerror})") from error
    except ValueError as error:
        raise RulesError(f"rules: expected TOML, got {path} ({error})") from error
    if loose := [name for name, entries in tables.items() if not isinstance(entries, dict)]:
        raise RulesError(f"{path}: expected tables [share], [roi], [stability], [trust], got the value {loose[0]}")
    return {f"{table}.{name}": value for table, entries in tables.items() for name, value in entries.items()}


def _check(name: str, value: Any, path: str | Path) -> None:
    if name == "trust.distributions":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise RulesError(f"{path}: {name}: expected a list of names, got {value!r}")
        return
    most = 1.0 if name in _FRACTIONS else math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most or math.isinf(value):
        raise RulesError(f"{path}: {name}: expected a finite number over 0 and at most {most:g}, got {value!r}")
