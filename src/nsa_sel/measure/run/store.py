"""What a run of the benchmark leaves behind, and going on from it."""

from __future__ import annotations

import contextlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from nsa_sel.measure import schema
from nsa_sel.measure.files import FileError, read_json, read_rows, write_results
from nsa_sel.measure.run.bench import Results


class ResumeError(ValueError):
    """Results that a run cannot go on from, or must not write over."""


def save(folder: Path, results: Results, environment: dict[str, Any], finished: bool) -> None:
    """Write bench.csv and bench.json; `finished` in it counts the rows of a run that did all it was asked for."""
    data = {"environment": environment} | {name: kept for name, kept in vars(results).items() if name != "rows"}
    data["finished"] = {"rows": len(results.rows)} if finished else None
    write_results(folder / "bench.csv", schema.BENCH_COLUMNS, results.rows, data)


def load(folder: Path, columns: dict[str, str], settings: dict[str, Any]) -> Results:
    """Load what an earlier run has left in `folder`, to go on from it.

    Raises:
        ResumeError: the files are not what a run writes, or the earlier run was on another device or commit, or with
        other settings: its rows would not belong to this run.
    """

    def expect(what: str, here: object, got: object) -> None:
        if got != here:
            raise ResumeError(f"resume: expected {what} = {here!r} as now, got {got!r} in {folder}")

    if not any((folder / name).exists() for name in ("bench.csv", "bench.json")):
        return Results()
    try:
        rows, data = read_rows(folder / "bench.csv"), read_json(folder / "bench.json")
    except FileError as error:
        raise ResumeError(f"resume: expected the files of an earlier run in {folder}, got {error}") from error
    results = Results(rows)
    for field in fields(results)[1:]:
        kept = data.get(field.name)
        expect(f"the type of {field.name}", type(getattr(results, field.name)).__name__, type(kept).__name__)
        setattr(results, field.name, kept)
    results.skipped = {}
    for row in rows:
        expect("the columns", schema.BENCH_COLUMNS, tuple(row))
        for column, here in columns.items():
            expect(column, here, row[column])
    earlier = data.get("environment")
    for name, value in settings.items():
        expect(name, value, earlier.get(name) if isinstance(earlier, dict) else None)
    return results


def refuse_finished(folder: Path) -> None:
    """Refuse to write over a run that finished: it took minutes to hours.

    Raises:
        ResumeError: there is one in `folder`.
    """
    with contextlib.suppress(FileError):
        if read_json(folder / "bench.json").get("finished"):
            raise ResumeError(f"out: expected a folder without a finished run, got {folder} (or --resume)")
