"""Writing results: CSV in the order of the schema and a JSON beside it, each whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nsa_sel.measure import schema
from nsa_sel.measure.bench import Results
from nsa_sel.measure.record import write_atomically


class ResumeError(ValueError):
    """Results that a run cannot go on from."""


def csv_text(columns: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> str:
    """Return rows as CSV text.

    >>> csv_text(("B", "stage"), [{"stage": "gate", "B": 1}])
    'B,stage\\n1,gate\\n'
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def save_bench(folder: Path, results: Results, environment: dict[str, Any]) -> Path:
    """Write bench.csv and bench.json into `folder`."""
    data = {
        "environment": environment,
        "intervals": results.intervals,
        "not_measured": results.not_measured,
        "skipped": results.skipped,
        "parity_failures": results.parity_failures,
    }
    write_atomically(folder / "bench.json", json.dumps(data, indent=1) + "\n")
    write_atomically(folder / "bench.csv", csv_text(schema.BENCH_COLUMNS, results.rows))
    return folder / "bench.csv"


def load_bench(folder: Path, columns: dict[str, str], settings: dict[str, Any]) -> Results:
    """Load what an earlier run has left in `folder`, to go on from it.

    Raises:
        ResumeError: the earlier run was on another device or commit, or with other settings: its rows would not
        belong to this run.
    """
    try:
        data = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
        with (folder / "bench.csv").open(newline="", encoding="utf-8") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    except FileNotFoundError:
        return Results()
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"resume: expected the bench.csv and bench.json of an earlier run in {folder}, got {error}"
        ) from error
    for row in rows:
        for column, here in columns.items():
            if row.get(column) != here:
                raise ResumeError(
                    f"resume: expected {column} {here!r} as here, got {row.get(column)!r} in {folder}/bench.csv"
                )
    earlier = data.get("environment", {})
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise ResumeError(
                f"resume: expected {name} = {value!r} as now, got {earlier.get(name)!r} in {folder}/bench.json"
            )
    return Results(rows, data["intervals"], data["not_measured"], {}, data["parity_failures"])
