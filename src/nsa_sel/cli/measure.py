"""`nsa-sel bench`, `decode`, `threshold`, `gate`, `report`: measure, and judge what was measured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

# Errors in what the user gave end with 2, like NOT MEASURED: neither may be taken for a verdict.
BAD_INPUT = 2
CONTEXT_LOST = 3  # what was measured is kept, and the run can go on in a new process
WRITE_EVERY = 10.0  # seconds between two writes of a running benchmark
COLOURS = {"PASS": "green", "FAIL": "red", "NOT MEASURED": "yellow"}

Words = list[str] | None  # each may hold several with commas
Backend = Annotated[str, typer.Option("--backend", help="The backend to judge: cuda or triton.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the results; without it nothing is written.")]
OutDir = Annotated[Path, typer.Option("--out", help="Folder for the CSV and the JSON of the environment.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Seed = Annotated[int, typer.Option(help="Seed of the inputs.")]
Iters = Annotated[int, typer.Option(min=1, help="Timed samples; the gate asks for at least 50.")]
Warmup = Annotated[int, typer.Option(min=0, help="Untimed rounds before them.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default cuda where there is one.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (bench, decode, threshold, gate, report):
        app.command()(command)


def bench(
    suite: Annotated[Words, typer.Option(help="plan, decode, models, ci, or a TOML file, several with commas.")] = None,
    rows: Annotated[Words, typer.Option(help="Rows (b, s, g) of your own workload, several with commas.")] = None,
    batch: Annotated[Words, typer.Option("--B", help="Requests, instead of --rows, several with commas.")] = None,
    groups: Annotated[int, typer.Option("--G", help="KV groups.")] = 2,
    heads: Annotated[Words, typer.Option("--h", help="Query heads a group, several with commas.")] = None,
    dk: Annotated[Words, typer.Option("--D", help="Head dimension of q and k, several with commas.")] = None,
    dv: Annotated[Words, typer.Option("--Dv", help="Head dimension of v; several with commas; default --D.")] = None,
    length: Annotated[Words, typer.Option("--L", help="Tokens a row selects, several with commas.")] = None,
    dist: Annotated[Words, typer.Option(help="few, many, mixed or blocks, several with commas.")] = None,
    dtype: Annotated[Words, typer.Option(help="bf16, fp16, fp32, fp64, several with commas.")] = None,
    s_kv: Annotated[int, typer.Option("--S-kv", help="Tokens in each cache.")] = 4096,
    n: Annotated[Words, typer.Option("--n", help="Blocks, with --dist blocks, several with commas.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens a block, with --dist blocks.")] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens a page: a paged cache.")] = None,
    mode: Annotated[Words, typer.Option(help="eager, graph, streams2, several with commas; by default all.")] = None,
    backend: Annotated[
        Words,
        typer.Option(
            help="cuda, triton, sdpa, sdpa_prepared, sdpa_gathered or a peer; several with commas; by default all."
        ),
    ] = None,
    peers: Annotated[Path | None, typer.Option(help="Folder of the peers' adapters.")] = None,
    seed: Seed = 0,
    out: OutDir = Path("results"),
    iters: Iters = 50,
    warmup: Warmup = 5,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many workloads.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Start no workload after so many seconds.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Sweep Triton's settings instead: tune_triton.csv.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the results in --out.")] = False,
    device: Device = "",
) -> None:
    """Measure the backends side by side; writes bench.csv and bench.json. Exit 1 where a result is wrong."""
    console = wide_console(stderr=True)
    with readable_errors():
        from nsa_sel import backends
        from nsa_sel.measure.run import session, workload
        from nsa_sel.measure.run.race import ContextLostError, Settings
        from nsa_sel.measure.run.tune import FILE, run_tune

        grid: dict[str, Any] = {
            "rows": whole("rows", rows), "B": whole("B", batch), "h": whole("h", heads), "Dk": whole("D", dk),
            "Dv": whole("Dv", dv), "L": whole("L", length), "n": whole("n", n), "dist": words(dist),
            "dtype": words(dtype), "block_size": block_size, "page_size": page_size,
        }  # fmt: skip
        own = {name: value for name, value in grid.items() if value}
        if own and suite:
            raise ValueError(f"bench: expected --suite or a shape of its own, got both (--suite and {', '.join(own)})")
        where = session.device_of(device)
        if own:
            workloads = workload.from_options(own | {"G": groups, "S_kv": s_kv})
        else:
            workloads = workload.load_suites(words(suite) or session.default_suites(where))
        workloads = workloads[:limit]
        settings = Settings(where, tuple(words(mode) or ()), seed, iters, warmup)
        if tune:
            sweep = run_tune(workloads, backends.get("triton"), settings, out)  # type: ignore[arg-type]
            _advance(console, "workloads", len(workloads), sweep)
            typer.echo(f"results: {out / FILE}")
            raise typer.Exit(0)
        run = session.BenchSession(settings, words(backend), peers, out, resume)
        show(console, *(f"note: {line}" for line in run.notes))
        lost = None
        try:
            _advance(console, "workloads", len(workloads), run.run(workloads, seconds, WRITE_EVERY))
        except ContextLostError as error:
            lost = error.args[0]
        show_table(console, f"{run.facts['device']}: medians over the workloads", run.table())
        show(console, *run.summary())
        show(console, *(f"PARITY FAILURE {line}" for line in run.results.parity_failures), style="red")
    typer.echo(f"results: {out / 'bench.csv'}")
    if lost is not None:
        typer.echo(f"error: {lost}; --resume goes on with the next workload", err=True)
        raise typer.Exit(CONTEXT_LOST)
    raise typer.Exit(1 if run.results.parity_failures else 0)


def decode(
    context: Annotated[
        Words, typer.Option(help="Cached tokens, several with commas; default 4096 to 65536, 4096 on a CPU.")
    ] = None,
    batch: Annotated[Words, typer.Option("--B", help="Requests, several with commas; by default 1,8,64.")] = None,
    backend: Annotated[str, typer.Option(help="Backend of the selection; default cuda where it runs, else sdpa.")] = "",
    mode: Annotated[str, typer.Option(help="eager or graph; by default graph on a GPU.")] = "",
    leave_out: Annotated[Words, typer.Option(help="Stages to leave out, to see what they cost, with commas.")] = None,
    seed: Seed = 0,
    out: OutDir = Path("results"),
    iters: Iters = 50,
    warmup: Warmup = 5,
    device: Device = "",
) -> None:
    """Measure the stages of one NSA decode step; writes decode.csv and decode.json."""
    console = wide_console(stderr=True)
    with readable_errors():
        from nsa_sel.measure.run import session
        from nsa_sel.measure.run.race import Settings

        settings = Settings(session.device_of(device), (mode,) if mode else (), seed, iters, warmup)
        left = tuple(words(leave_out) or ())
        run = session.DecodeSession(settings, whole("context", context), whole("B", batch), backend, left)
        show(console, *(f"note: {line}" for line in run.notes))
        shown = len(run.notes)
        _advance(console, "steps", len(run.steps), run.run(out))
        show_table(console, "decode step: shares by stage", run.table())
        show(console, *(f"note: {line}" for line in run.notes[shown:]))
    typer.echo(f"results: {out / 'decode.csv'}")


def threshold(
    bench: Annotated[list[Path], typer.Argument(help="One or more bench.csv.")],
    margin: Annotated[float | None, typer.Option(help="Speed-up over the baseline to reach (default 1.2).")] = None,
    max_mae: Annotated[float | None, typer.Option(help="Largest mean absolute error (default 1e-3).")] = None,
    backend: Backend = "cuda",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Find the smallest L from which on every measured row reaches the margin; exit 0 found, 1 none, 2 NOT MEASURED."""
    with readable_errors():
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
    console = wide_console(stderr=as_json)
    with readable_errors():
        from nsa_sel import policy
        from nsa_sel.measure.judge.gate import judge
        from nsa_sel.measure.judge.rules import load_rules
        from nsa_sel.measure.report import record

        _check_backend(backend)
        found = judge(bench, decode, load_rules(rules), backend)
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=2))
        else:
            lines = [
                (name, one.verdict, "" if one.value is None else f"{one.value:.4g}", one.reason)
                for name, one in found.gates.items()
            ]
            title = f"{found.device or 'no device'}, {backend}"
            show_table(console, title, [("gate", "verdict", "value", "why"), *lines])
            show(console, *(f"note: {remark}" for remark in found.remarks))
            console.print(f"[{COLOURS[found.verdict]}]{found.verdict}[/], min_l = {found.min_l}")
        if out is not None:
            show(console, f"decision record: {record.write_record(found, out)}")
        if write_policy is not None:
            path = policy.default_path() if str(write_policy) == "default" else write_policy
            nothing = f"no policy written to {path}: missing data turns nothing on and nothing off"
            show(console, nothing if record.write_policy(found, path) is None else f"policy: {path}")
    raise typer.Exit(found.exit_code)


def report(folder: Annotated[Path, typer.Argument(help="Folder with bench.csv and decode.csv.")]) -> None:
    """Write one Markdown page and its pictures from the CSV files of a folder into that folder."""
    with readable_errors():
        from nsa_sel.measure.report.page import write_report

        page = write_report(folder)
    typer.echo(f"report: {page}")


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what is wrong with the input into one line and exit code 2; a bug in the code still shows its traceback."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        text = str(error)
        if isinstance(error, ModuleNotFoundError):
            if error.name not in ("matplotlib", "pandas", "tomli"):
                raise
            text = f"{error.name} is not installed; the measuring commands need `pip install nsa-sel[bench]`"
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(BAD_INPUT) from error


def wide_console(stderr: bool) -> Console:
    """Return a console that cuts no table: a terminal scrolls, and what is piped has no width at all."""
    return Console(stderr=stderr, width=None if Console(stderr=stderr).is_terminal else 200)


def show(console: Console, *lines: str, style: str | None = None) -> None:
    """Print lines as they are: what is in square brackets is no markup, and a path is not broken."""
    for line in lines:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def show_table(console: Console, title: str, lines: list[tuple[str, ...]]) -> None:
    """Print a table, its header first; a verdict has its colour, and nothing else is markup."""
    header, *rest = lines
    table = Table(*header, title=escape(title))
    for line in rest:
        table.add_row(*(f"[{COLOURS[cell]}]{cell}[/]" if cell in COLOURS else escape(cell) for cell in line))
    console.print(table)


def words(values: Words) -> Words:
    """Return the words of a repeatable option, each of which may hold several with commas.

    >>> words(["few,many", "mixed"])
    ['few', 'many', 'mixed']
    """
    return [word.strip() for value in values for word in value.split(",")] if values else None


def whole(name: str, values: Words) -> list[int] | None:
    """Return the whole numbers of a repeatable option; "4k" is 4,096.

    >>> whole("L", ["64,128", "4k"])
    [64, 128, 4096]

    Raises:
        ValueError: a word that is no whole number above 0.
    """
    found = []
    for word in words(values) or []:
        digits = word[:-1] if word[-1:] in "kK" else word
        if not (digits.isascii() and digits.isdigit()) or int(digits) < 1:
            raise ValueError(f"{name}: expected whole numbers above 0, got {word!r}")
        found.append(int(digits) * (1 if digits == word else 1024))
    return found or None


def _advance(console: Console, what: str, total: int, done: Iterable[str]) -> None:
    """Show how far `done` has come, by the names that it yields."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        for name in done:
            progress.update(task, advance=1, description=name)


def _check_backend(backend: str) -> None:
    if backend not in ("cuda", "triton"):
        raise ValueError(f"backend: expected cuda or triton, got {backend!r}")
