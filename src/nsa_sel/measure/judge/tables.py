"""Reading the CSV files: everything comes in as text, and what is not a number is named instead of dropped."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from nsa_sel.measure import schema
from nsa_sel.measure.files import read_text

MAX_NAMED = 4  # reasons of one file that are spelled out; the rest is counted


@dataclass
class Table:
    """A CSV file as read: `frame` (None where nothing could be read) and what is wrong with it as a whole.

    `frame` keeps every row, with `line` (its line in the file, header = 1) and numeric columns as float64 where
    a cell that is no finite number is NaN; its text stands in the column `<name>_text`.
    """

    path: str
    frame: pd.DataFrame | None = None
    faults: list[str] = field(default_factory=list)

    @property
    def rows(self) -> pd.DataFrame:
        """Return the frame of a table that could be read."""
        if self.frame is None:
            raise ValueError(f"{self.path}: expected a table that could be read, got: {'; '.join(self.faults)}")
        return self.frame


def read_bench(path: str | Path | None) -> Table:
    """Read a bench.csv; a missing file, a missing column and a table without rows are faults, never exceptions."""
    return _read(path, "bench", schema.BENCH_COLUMNS, (*schema.BENCH_COUNTS, *schema.BENCH_FIGURES))


def read_decode(path: str | Path | None) -> Table:
    """Read a decode.csv; a missing file, a missing column and a table without rows are faults, never exceptions."""
    return _read(path, "decode", schema.DECODE_COLUMNS, (*schema.DECODE_COUNTS, *schema.DECODE_FIGURES))


def _read(path: str | Path | None, kind: str, columns: tuple[str, ...], numeric: tuple[str, ...]) -> Table:
    if path is None:
        return Table(f"{kind}.csv", faults=[f"no {kind} file was given"])
    table = Table(str(path))
    name = Path(path).name
    try:
        # All as text: pandas would otherwise turn "NA", an empty cell and a short row into the same NaN without a
        # word, and skip blank lines, which shifts the line numbers that the reasons name.
        text = io.StringIO(read_text(Path(path)))
        raw = pd.read_csv(text, dtype=str, keep_default_na=False, na_filter=False, skip_blank_lines=False)
    except (OSError, ValueError) as error:  # pandas' parser errors and bad encodings are ValueErrors
        table.faults.append(f"{name}: cannot be read as CSV ({str(error).strip()})")
        return table
    missing = [column for column in columns if column not in raw.columns]
    if missing:
        table.faults.append(f"{name}: missing column {', '.join(missing)}")
        return table
    if raw.columns.duplicated().any() or not isinstance(raw.index, pd.RangeIndex):
        # A row with more cells than the header makes pandas take the first column as an index: every column is then
        # shifted by one.
        table.faults.append(f"{name}: rows and header do not have the same columns")
        return table
    frame = raw.fillna("").apply(lambda column: column.str.strip())
    frame["sm"] = frame["sm"].str.replace(r"\.0$", "", regex=True)  # a spreadsheet's way of writing 90
    frame["line"] = np.arange(len(frame)) + 2
    frame = frame[(frame[list(columns)] != "").any(axis=1)].reset_index(drop=True)  # a trailing blank line is no row
    if frame.empty:
        table.faults.append(f"{name}: holds no rows")
        return table
    for column in numeric:
        frame[f"{column}_text"] = frame[column]
        values = pd.to_numeric(frame[column], errors="coerce").astype(float)
        frame[column] = values.where(np.isfinite(values))
    table.frame = frame
    return table


def where(rows: pd.DataFrame) -> str:
    """Say in how many rows something is the case and describe the first of them."""
    first = rows.iloc[0]
    tags = [
        str(first[c]) for c in ("workload", "dist", "stage", "backend", "mode") if c in rows.columns and first[c] != ""
    ]
    tags += [f"{c}={_short(first[c])}" for c in ("L", "B", "context") if c in rows.columns]
    count = f"{len(rows)} rows, the first at" if len(rows) > 1 else "at"
    return f"{count} line {first['line']} ({', '.join(tags)})"


def summary(reasons: list[str]) -> str:
    """Join reasons into one line that names the first few and counts the rest."""
    rest = len(reasons) - MAX_NAMED
    return "; ".join(reasons[:MAX_NAMED]) + (f"; and {rest} more reasons" if rest > 0 else "")


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
