"""Reading a CSV file and the JSON beside it: all comes in as text, and what is not a number is named, not dropped."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_sel.measure import schema
from nsa_sel.measure.files import FileError, read_csv, read_json

NAN = float("nan")
Row = dict[str, Any]


@dataclass
class Table:
    """A CSV file as read: its rows, the facts in the JSON beside it, and what is wrong with either as a whole.

    A row has `line` (its line in the file, header = 1) and numeric columns as floats, NaN where a cell is no finite
    number; its text stands in the column `<name>_text`.
    """

    path: str
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    readable: bool = False

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.rsplit("/", 1)[-1]

    def named(self, faults: Iterable[str]) -> list[str]:
        """Return faults, each once and with the file's name before it."""
        return [one if one.startswith(self.name) else f"{self.name}: {one}" for one in dict.fromkeys(faults)]


def read_bench(path: str | Path | None) -> Table:
    """Read a bench.csv; a missing file, a missing column and a table without rows are faults, never exceptions."""
    return _read(path, "bench", schema.BENCH_COLUMNS, (*schema.BENCH_COUNTS, *schema.BENCH_FIGURES))


def read_decode(path: str | Path | None) -> Table:
    """Read a decode.csv; a missing file, a missing column and a table without rows are faults, never exceptions."""
    return _read(path, "decode", schema.DECODE_COLUMNS, (*schema.DECODE_COUNTS, *schema.DECODE_FIGURES))


def number(value: object) -> float:
    """Return a finite number as a float, NaN for anything else.

    >>> number("2.5"), number("inf"), number(None)
    (2.5, nan, nan)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return NAN
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return NAN
    return found if math.isfinite(found) else NAN


def entries(facts: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the objects in a list of a run's JSON; what is no list or no object is not there."""
    found = facts.get(name)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def inner(facts: dict[str, Any], name: str) -> dict[str, Any]:
    """Return an object in a run's JSON, an empty one where there is none."""
    found = facts.get(name)
    return found if isinstance(found, dict) else {}


def name_of(one: dict[str, Any], keys: Iterable[str]) -> tuple[Any, ...]:
    """Return what an object of a run's JSON is named by: text as it is, anything else as a number or as none."""
    return tuple(one[key] if isinstance(one.get(key), str) else number(one.get(key)) for key in keys)


def over(top: float, bottom: float) -> float:
    """Return a quotient, NaN over zero."""
    return top / bottom if bottom else NAN


def where(rows: list[Row]) -> str:
    """Say in how many rows something is the case and describe the first of them."""
    first = rows[0]
    tags = [str(first[c]) for c in ("workload", "dist", "stage", "backend", "mode") if first.get(c)]
    tags += [f"{c}={first[c]:g}" for c in ("L", "B", "context") if isinstance(first.get(c), float)]
    count = f"{len(rows)} rows, the first at" if len(rows) > 1 else "at"
    return f"{count} line {first['line']} ({', '.join(tags)})"


def some(rows: list[Row], bad: Callable[[Row], object], text: str) -> Iterator[str]:
    """Yield one fault that names the rows for which `bad` holds; `text` may name columns of the first, in braces."""
    if found := [row for row in rows if bad(row)]:
        yield f"{text.format(**found[0])}: {where(found)}"


def cells(rows: list[Row], columns: Iterable[str], bad: Callable[[float], bool], text: str) -> Iterator[str]:
    """Yield one fault for each column with cells for which `bad` holds; {column}, {got}, {written} may be in `text`."""
    for column in columns:
        if found := [row for row in rows if bad(row[column])]:
            got = {"got": found[0][column], "written": found[0].get(f"{column}_text", "")}
            yield f"{text.format(column=column, **got)}: {where(found)}"


def _read(path: str | Path | None, kind: str, columns: tuple[str, ...], numeric: tuple[str, ...]) -> Table:
    if path is None:
        return Table(f"{kind}.csv", faults=[f"no {kind} file was given"])
    table = Table(str(path))
    try:
        header, lines = read_csv(Path(path))
    except FileError as error:
        table.faults.append(f"{table.name}: {error}")
        return table
    if missing := [column for column in columns if column not in header]:
        table.faults.append(f"{table.name}: missing column {', '.join(missing)}")
        return table
    cells = [[cell.strip() for cell in line] for line in lines]
    filled = [(at + 2, line) for at, line in enumerate(cells) if any(line)]  # a trailing blank line is no row
    if len(set(header)) < len(header) or any(len(line) != len(header) for _, line in filled):
        table.faults.append(f"{table.name}: rows and header do not have the same columns")
        return table
    if not filled:
        table.faults.append(f"{table.name}: holds no rows")
        return table
    for at, line in filled:
        row: Row = dict(zip(header, line, strict=True)) | {"line": at}
        row["sm"] = re.sub(r"\.0$", "", row["sm"])  # a spreadsheet's way of writing 90
        for column in numeric:
            row[f"{column}_text"], row[column] = row[column], number(row[column])
        table.rows.append(row)
    table.readable = True
    try:
        table.facts = read_json(Path(path).with_suffix(".json"))
    except FileError as error:
        table.faults.append(f"{table.name}: nothing says whether the run finished: {error}")
    return table
