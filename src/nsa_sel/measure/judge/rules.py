"""The gate's rules: TOML data, checked as strictly as the files they judge."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_RULES = Path(__file__).with_name("rules.toml")


class RulesError(ValueError):
    """A rules file that cannot be read, names an unknown rule, or gives one a value out of its range."""


@dataclass(frozen=True)
class Rules:
    """What a GPU has to show before its kernel is switched on, and how far the data may disagree with itself."""

    share_min: float
    roi_margin: float
    stability_max_mae: float
    trust_distributions: tuple[str, ...]
    trust_min_iters: int
    trust_speedup_off: float
    trust_bytes_off: float
    trust_ceiling: float
    trust_share_sum: float
    trust_physical: float
    trust_residual: float
    trust_amdahl_off: float
    trust_spread: float
    trust_clock_drift: float
    trust_anchor_off: float
    trust_fall: float
    trust_alike: float
    trust_dense_until: int


# Limits (exclusive below, inclusive above): outside them a rule would pass anything or nothing.
_LIMITS = {
    "share.min": (0.0, 1.0),
    "roi.margin": (0.0, math.inf),
    "stability.max_mae": (0.0, math.inf),
    "trust.min_iters": (0, math.inf),
    "trust.speedup_off": (0.0, 1.0),
    "trust.bytes_off": (0.0, 1.0),
    "trust.ceiling": (0.0, math.inf),
    "trust.share_sum": (0.0, math.inf),
    "trust.physical": (0.0, math.inf),
    "trust.residual": (0.0, 1.0),
    "trust.amdahl_off": (0.0, 1.0),
    "trust.spread": (0.0, math.inf),
    "trust.clock_drift": (0.0, 1.0),
    "trust.anchor_off": (0.0, 1.0),
    "trust.fall": (0.0, 1.0),
    "trust.alike": (0.0, 1.0),
    "trust.dense_until": (0, math.inf),
}


def load_rules(path: str | Path | None = None) -> Rules:
    """Load the default rules with the values of the TOML file at `path` in their place.

    Raises:
        RulesError: the file cannot be read, names an unknown rule, or a value has a wrong type or lies out of range.

    >>> load_rules().roi_margin
    1.2
    """
    values = _flatten(_parse(DEFAULT_RULES), DEFAULT_RULES)
    if path is not None:
        given = _flatten(_parse(Path(path)), Path(path))
        for name in given:
            if name not in values:
                raise RulesError(f"{path}: expected one of {', '.join(sorted(values))}, got {name}")
        values |= given
    for name, value in values.items():
        _check(name, value, path or DEFAULT_RULES)
    values["trust.distributions"] = tuple(values["trust.distributions"])
    return Rules(**{name.replace(".", "_"): value for name, value in values.items()})


def with_values(rules: Rules, values: dict[str, float | None]) -> Rules:
    """Return `rules` with the values given by name ("roi.margin"); None leaves a rule as it is.

    Raises:
        RulesError: a value lies out of range.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for name, value in given.items():
        _check(name, value, "rules")
    changes: dict[str, Any] = {name.replace(".", "_"): value for name, value in given.items()}
    return replace(rules, **changes)


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise RulesError(f"rules: expected a TOML file, got {path} ({error.strerror})") from error
    except ValueError as error:
        raise RulesError(f"rules: expected TOML, got {path} ({error})") from error


def _flatten(tables: dict[str, Any], path: Path) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for table, entries in tables.items():
        if not isinstance(entries, dict):
            raise RulesError(f"{path}: expected tables [share], [roi], [stability], [trust], got the value {table}")
        flat |= {f"{table}.{name}": value for name, value in entries.items()}
    return flat


def _check(name: str, value: Any, path: str | Path) -> None:
    if name == "trust.distributions":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise RulesError(f"{path}: {name}: expected a list of names, got {value!r}")
        return
    low, high = _LIMITS[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value <= high or math.isinf(value):
        raise RulesError(f"{path}: {name}: expected a finite number over {low:g} and at most {high:g}, got {value!r}")
