"""Files: CSV and JSON as they come from anywhere, and text written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class FileError(ValueError):
    """A file that is not what it should be; the message is one line."""


def read_text(path: Path) -> str:
    """Return the text of a regular file: a pipe would be waited for without end.

    Raises:
        FileError: there is no such file, or it is no text.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileError(f"{path}: expected a file, got something else")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: expected UTF-8 text, got {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        FileError: it cannot be read, is no JSON, is nested too deeply, or holds something else than an object.
    """
    text = read_text(path)
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise FileError(f"{path}: expected JSON, got one nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits too
        raise FileError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(found, dict):
        raise FileError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Return the header of a CSV file and its rows, each a list of cells of any number; blank lines are empty lists.

    Raises:
        FileError: it cannot be read or is no CSV.
    """
    try:
        rows = list(csv.reader(io.StringIO(read_text(path)), strict=True))
    except csv.Error as error:
        raise FileError(f"{path}: expected CSV, got {error}") from error
    return ([cell.strip() for cell in rows[0]], rows[1:]) if rows else ([], [])


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file by its header.

    Raises:
        FileError: it cannot be read, is no CSV, or a row has not as many cells as the header.
    """
    header, lines = read_csv(path)
    try:
        return [dict(zip(header, line, strict=True)) for line in lines]
    except ValueError as error:
        raise FileError(f"{path}: expected rows of {len(header)} cells, got others") from error


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


def write_results(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]], data: dict[str, Any]) -> None:
    """Write a CSV file and, after it, the JSON beside it: what a run's JSON says of its rows, they are there."""
    write_atomically(path, csv_text(columns, rows))
    write_atomically(path.with_suffix(".json"), json.dumps(data, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a text file in one step: a reader, or a run that is cut off, never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(text, encoding="utf-8", newline="")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
