"""Running the measuring commands in a test and reading what they wrote."""

from __future__ import annotations

import csv
from pathlib import Path

from typer.testing import CliRunner, Result

from nsa_sel.cli.app import app

QUICK = ["--iters", "3", "--warmup", "1", "--device", "cpu"]


def run(*arguments: object, code: int | None = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert code is None or result.exit_code == code, result.output
    return result


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
