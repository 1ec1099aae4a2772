"""What a run of the benchmark leaves behind, and going on from it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from nsa_sel.measure import schema
from nsa_sel.measure.files import FileError, read_csv, read_json, write_results
from nsa_sel.measure.run.bench import Results

NAME = "bench.csv"


class ResumeError(ValueError):
    """Results that a run cannot go on from, or must not write over."""


def save(folder: Path, results: Results, environment: dict[str, Any], finished: bool) -> None:
    """Write bench.csv and bench.json; `finished` in it counts the rows of a run that did all it was asked for."""
    data: dict[str, Any] = {"environment": environment}
    data |= {field.name: getattr(results, field.name) for field in fields(results) if field.name != "rows"}
    data["finished"] = {"rows": len(results.rows)} if finished else None
    write_results(folder / NAME, schema.BENCH_COLUMNS, results.rows, data)


def load(folder: Path, columns: dict[str, str], settings: dict[str, Any]) -> Results:
    """Load what an earlier run has left in `folder`, to go on from it.

    Raises:
        ResumeError: the files are not what a run writes, or the earlier run was on another device or commit, or with
        other settings: its rows would not belong to this run.
    """
    if not (folder / NAME).exists() and not (folder / NAME).with_suffix(".json").exists():
        return Results()
    try:
        header, lines = read_csv(folder / NAME)
        data = read_json((folder / NAME).with_suffix(".json"))
    except FileError as error:
        raise ResumeError(f"resume: expected the files of an earlier run in {folder}, got {error}") from error
    if tuple(header) != schema.BENCH_COLUMNS or any(len(line) != len(header) for line in lines):
        raise ResumeError(f"resume: expected the columns of bench.csv in {folder}/{NAME}, got others")
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    results = Results(rows)
    for field in fields(results)[1:]:
        kept = data.get(field.name)
        if not isinstance(kept, type(getattr(results, field.name))):
            raise ResumeError(f"resume: expected {field.name} in {folder}/bench.json, got {type(kept).__name__}")
        setattr(results, field.name, kept)
    results.skipped = {}
    for row in rows:
        for column, here in columns.items():
            if row[column] != here:
                raise ResumeError(f"resume: expected {column} {here!r} as here, got {row[column]!r} in {folder}/{NAME}")
    earlier = data.get("environment")
    for name, value in settings.items():
        got = earlier.get(name) if isinstance(earlier, dict) else None
        if got != value:
            raise ResumeError(f"resume: expected {name} = {value!r} as now, got {got!r} in {folder}/bench.json")
    return results


def refuse_finished(folder: Path) -> None:
    """Refuse to write over a run that finished: it took minutes to hours.

    Raises:
        ResumeError: there is one in `folder`.
    """
    path = (folder / NAME).with_suffix(".json")
    if path.exists():
        try:
            finished = read_json(path).get("finished")
        except FileError:
            return
        if finished:
            raise ResumeError(f"out: expected a folder without a finished run, got {folder} (or --resume)")
