"""`nsa-sel bench`, `decode`, `threshold`, `gate`, `report`: measure, and judge what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from nsa_sel.cli import measure_run

# Errors in what the user gave end with 2, like NOT MEASURED: neither may be taken for a verdict.
BAD_INPUT = 2
COLOURS = {"PASS": "green", "FAIL": "red", "NOT MEASURED": "yellow"}

Backend = Annotated[str, typer.Option("--backend", help="The backend to judge: cuda or triton.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the results; without it nothing is written.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    measure_run.register(app)
    app.command()(threshold)
    app.command()(gate)
    app.command()(report)


def threshold(
    bench: Annotated[list[Path], typer.Argument(help="One or more bench.csv.")],
    margin: Annotated[float | None, typer.Option(help="Speed-up over packed SDPA to reach (default 1.2).")] = None,
    max_mae: Annotated[float | None, typer.Option(help="Largest mean absolute error (default 1e-3).")] = None,
    backend: Backend = "cuda",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Find the smallest L from which on every measured row reaches the margin; exit 0 found, 1 none, 2 NOT MEASURED."""
    with measure_run.readable_errors():
        from nsa_sel.measure import files
        from nsa_sel.measure.judge import threshold as thresholds
        from nsa_sel.measure.judge.rules import load_rules
        from nsa_sel.measure.schema import EXIT_CODES

        _check_backend(backend)
        rules = load_rules(given={"roi.margin": margin, "stability.max_mae": max_mae})
        found = thresholds.threshold_of_files(list(bench), rules, backend)
        page = thresholds.threshold_page(found, rules, backend, [str(path) for path in bench])
        data = {"verdict": found.verdict, "min_l": found.min_l, "reason": found.reason, "backend": backend}
        if out is not None:
            files.write_atomically(out / "threshold.md", page)
            files.write_atomically(out / "threshold.json", json.dumps(data, indent=2) + "\n")
    typer.echo(json.dumps(data, indent=2) if as_json else page)
    raise typer.Exit(EXIT_CODES[found.verdict])


def gate(
    bench: Annotated[Path | None, typer.Option(help="The bench.csv to judge.")] = None,
    decode: Annotated[Path | None, typer.Option(help="The decode.csv to judge.")] = None,
    rules: Annotated[Path | None, typer.Option(help="TOML file with other rules than the default ones.")] = None,
    as_json: AsJson = False,
    out: Out = None,
    write_policy: Annotated[
        Path | None, typer.Option(help="Policy file to update; 'default' is the one that routing reads here.")
    ] = None,
    backend: Backend = "cuda",
) -> None:
    """Judge measured data: share, roi, stability; exit 0 PASS, 1 FAIL, 2 NOT MEASURED."""
    console = measure_run.wide_console(stderr=as_json)
    with measure_run.readable_errors():
        from nsa_sel import policy
        from nsa_sel.measure.judge.gate import judge
        from nsa_sel.measure.judge.rules import load_rules
        from nsa_sel.measure.report import record

        _check_backend(backend)
        judgement = judge(bench, decode, load_rules(rules), backend)
        if as_json:
            typer.echo(json.dumps(judgement.to_json(), indent=2))
        else:
            table = Table(
                "gate", "verdict", "value", "why", title=escape(f"{judgement.device or 'no device'}, {backend}")
            )
            for name, one in judgement.gates.items():
                value = "" if one.value is None else f"{one.value:.4g}"
                table.add_row(name, f"[{COLOURS[one.verdict]}]{one.verdict}[/]", value, escape(one.reason))
            console.print(table)
            for remark in judgement.remarks:
                console.print(f"note: {remark}", markup=False)
            console.print(f"[{COLOURS[judgement.verdict]}]{judgement.verdict}[/], min_l = {judgement.min_l}")
        if out is not None:
            console.print(f"decision record: {record.write_record(judgement, out)}", markup=False, soft_wrap=True)
        if write_policy is not None:
            path = policy.default_path() if str(write_policy) == "default" else write_policy
            if record.write_policy(judgement, path) is None:
                console.print(
                    f"no policy written to {path}: missing data turns nothing on and nothing off",
                    markup=False,
                    soft_wrap=True,
                )
            else:
                console.print(f"policy: {path}", markup=False, soft_wrap=True)
    raise typer.Exit(judgement.exit_code)


def report(folder: Annotated[Path, typer.Argument(help="Folder with bench.csv and decode.csv.")]) -> None:
    """Write one Markdown page and its pictures from the CSV files of a folder into that folder."""
    with measure_run.readable_errors():
        from nsa_sel.measure.report.page import write_report

        page = write_report(folder)
    typer.echo(f"report: {page}")


def _check_backend(backend: str) -> None:
    if backend not in ("cuda", "triton"):
        raise ValueError(f"backend: expected cuda or triton, got {backend!r}")
