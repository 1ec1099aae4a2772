"""Workloads as data: TOML grids, or one grid from the command line; one name for each shape."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nsa_sel.measure.schema import DTYPE_BYTES, call_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).with_name("workloads")
SUITES = ("plan", "decode", "models", "ci")
DISTRIBUTIONS = ("few", "many", "mixed", "blocks")
SPANS = {"few": 1, "many": 8, "mixed": 8}  # slots of a row; mixed fills 2, 4 or 8 of them
CLI_NAME = "cli-{dist}-{dtype}-h{h}-{Dk}x{Dv}-L{L}-r{rows}-s{S_kv}"

BLOCK_NAME = "-n{n}x{block_size}"


class WorkloadError(ValueError):
    """A workload that cannot be: an unknown name, a value of a wrong kind, or a shape that contradicts itself."""


@dataclass(frozen=True)
class Workload:
    """One shape in the words of the contract; `block_size` for block selections, `page_size` for paged caches."""

    name: str
    dist: str
    dtype: str
    B: int
    G: int
    h: int
    Dk: int
    Dv: int
    S_kv: int
    n: int
    L: int
    S: int = 1
    block_size: int | None = None
    page_size: int | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def rows(self) -> int:
        """Rows (b, s, g) of one call."""
        return self.B * self.S * self.G

    @property
    def call_bytes(self) -> int:
        """Bytes one call moves, counted from the shape."""
        slot = 2 if self.block_size is None else 1
        return call_bytes(self.rows, self.h, (self.Dk, self.Dv), self.n, self.L, DTYPE_BYTES[self.dtype], per_slot=slot)

    @property
    def cache_bytes(self) -> int:
        """Bytes of one K and V cache."""
        return self.B * self.G * self.S_kv * (self.Dk + self.Dv) * DTYPE_BYTES[self.dtype]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Return everything but the name: what makes two workloads the same."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "name")

    def arguments(self) -> str:
        """Return the command-line options of `nsa-sel bench` that make this workload again."""
        options: dict[str, Any] = {"rows": self.rows, "G": self.G, "h": self.h, "D": self.Dk, "Dv": self.Dv}
        options |= {"S-kv": self.S_kv}
        if self.block_size is None:
            options |= {"L": self.L}
        else:
            options |= {"n": self.n, "block-size": self.block_size}
            options |= {"page-size": self.page_size} if self.page_size else {}
        options |= {"dist": self.dist, "dtype": self.dtype}
        return " ".join(f"--{name} {value}" for name, value in options.items())


def load_suite(suite: str | Path) -> list[Workload]:
    """Load a built-in suite by name, or a TOML file by path.

    >>> len(load_suite("plan"))
    504

    Raises:
        WorkloadError: no such suite, no TOML, or a workload that cannot be.
    """
    path = FOLDER / f"{suite}.toml" if str(suite) in SUITES else Path(suite)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WorkloadError(
            f"suite: expected {', '.join(SUITES)} or a TOML file, got {suite} ({error.strerror})"
        ) from error
    except ValueError as error:
        raise WorkloadError(f"suite: expected TOML, got {suite} ({error})") from error
    grids = data.get("workload")
    if set(data) != {"workload"} or not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise WorkloadError(f"suite {suite}: expected [[workload]] tables alone, got {', '.join(data) or 'nothing'}")
    return unique(itertools.chain.from_iterable(expand(grid) for grid in grids))


def load_suites(suites: Iterable[str]) -> list[Workload]:
    """Load several suites as one: names and shapes are unique over all of them."""
    return unique(workload for suite in suites for workload in load_suite(suite))


def from_options(options: dict[str, Any]) -> list[Workload]:
    """Expand a grid of the command line; what it does not name: h 4, D 128, rows 64, L 256, every span distribution.

    >>> [workload.name for workload in from_options({"L": [64], "dist": ["few"], "G": 2, "S_kv": 4096})]
    ['cli-few-bf16-h4-128x128-L64-r64-s4096']
    """
    given = {"h": 4, "Dk": 128, "dtype": "bf16"} | options
    given.setdefault("dist", "blocks" if "block_size" in given else ["few", "many", "mixed"])
    if "B" not in given:
        given.setdefault("rows", 64)
    if "block_size" not in given:
        given.setdefault("L", 256)
    elif "n" not in given:
        given["n"] = 16
    grids = [given] if "Dv" in given else [given | {"Dk": d, "Dv": d} for d in _list(given["Dk"])]
    return unique(
        w for grid in grids for w in expand(grid | {"name": CLI_NAME + (BLOCK_NAME if "block_size" in grid else "")})
    )


def expand(grid: dict[str, Any]) -> list[Workload]:
    """Expand a grid: every value may be a list; `rows` may stand for B, and blocks give L."""
    known = {field.name for field in fields(Workload)} | {"rows"}
    if unknown := sorted(set(grid) - known):
        raise WorkloadError(f"workload: expected {', '.join(sorted(known))}, got {', '.join(unknown)}")
    axes = {name: _list(value) for name, value in grid.items()}
    return [_one(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def unique(workloads: Iterable[Workload]) -> list[Workload]:
    """Return the workloads, of which no two may share a name or a shape."""
    found = list(workloads)
    for attribute in ("name", "shape"):
        seen: dict[Any, Workload] = {}
        for workload in found:
            other = seen.setdefault(getattr(workload, attribute), workload)
            if other is not workload:
                raise WorkloadError(
                    f"workload: expected one {attribute} each, got {other.name} and {workload.name} with {attribute} "
                    f"{getattr(workload, attribute)}"
                )
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _one(values: dict[str, Any]) -> Workload:
    values = dict(values)
    name = values.pop("name", CLI_NAME)
    rows = values.pop("rows", None)
    per_request = values.get("S", 1) * values.get("G", 1)
    if (rows is None) == ("B" not in values) or (rows is not None and (rows < 1 or rows % per_request)):
        raise WorkloadError(
            f"workload {name}: expected B, or rows that are a multiple of S x G = {per_request}, "
            f"got rows={rows}, B={values.get('B')}"
        )
    values.setdefault("B", None if rows is None else rows // per_request)
    if values.get("block_size") is None:
        values.setdefault("n", SPANS.get(values.get("dist", ""), 1))
    elif "L" not in values and {"n", "S_kv"} <= set(values):
        values["L"] = min(values["n"] * values["block_size"], values["S_kv"])
    try:
        return Workload(name=name.format(**values, rows=values["B"] * per_request), **values)
    except (KeyError, IndexError) as error:
        raise WorkloadError(
            f"workload {name}: expected the shape's letters in the name's braces, got {error}"
        ) from error
    except TypeError as error:  # an argument that is missing
        raise WorkloadError(f"workload {name}: expected the whole shape, got {error}") from error


def _check(w: Workload) -> None:
    for letter in ("B", "S", "G", "h", "Dk", "Dv", "S_kv", "n", "L", "block_size", "page_size"):
        value = getattr(w, letter)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise WorkloadError(f"workload {w.name}: expected {letter} as a whole number above 0, got {value!r}")
    if w.dist not in DISTRIBUTIONS or w.dtype not in DTYPE_BYTES:
        known = f"dist {', '.join(DISTRIBUTIONS)} and dtype {', '.join(DTYPE_BYTES)}"
        raise WorkloadError(f"workload {w.name}: expected {known}, got {w.dist} and {w.dtype}")
    blocks = w.block_size is not None
    room = f"with room for 7 gaps in S_kv = {w.S_kv}"
    for wrong, expected, got in (
        ((w.dist == "blocks") != blocks, "block_size with dist blocks and with no other", f"{w.dist}, {w.block_size}"),
        (w.S_kv < w.L, f"L at most S_kv = {w.S_kv}", w.L),
        (w.S != 1, "S = 1, one query a request", w.S),
        (w.S_kv % (w.page_size or 1), f"S_kv as a multiple of page_size = {w.page_size}", w.S_kv),
        (w.S_kv % (w.block_size or 1), f"S_kv as a multiple of block_size = {w.block_size}", w.S_kv),
        (blocks and w.L != _blocks_l(w), f"L = min(n x block_size, S_kv) = {_blocks_l(w)}", w.L),
        (not blocks and w.n != SPANS.get(w.dist), f"n = {SPANS.get(w.dist)} for dist {w.dist}", w.n),
        (w.dist == "many" and (w.L % 8 or w.L + 7 > w.S_kv), f"L as a multiple of 8 {room}", w.L),
        (w.dist == "mixed" and (w.L < 8 or w.L + 7 > w.S_kv), f"L of at least 8 {room}", w.L),
    ):
        if wrong:
            raise WorkloadError(f"workload {w.name}: expected {expected}, got {got}")


def _blocks_l(w: Workload) -> int:
    return min(w.n * (w.block_size or 1), w.S_kv)
