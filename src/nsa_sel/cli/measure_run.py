"""`nsa-sel bench` and `nsa-sel decode`: the commands that make data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

BAD_INPUT = 2
CONTEXT_LOST = 3  # what was measured is kept, and the run can go on in a new process
WRITE_EVERY = 10.0  # seconds between two writes of a running benchmark

Seed = Annotated[int, typer.Option(help="Seed of the inputs.")]
OutDir = Annotated[Path, typer.Option("--out", help="Folder for the CSV and the JSON of the environment.")]
Iters = Annotated[int, typer.Option(min=1, help="Timed samples; the gate asks for at least 50.")]
Warmup = Annotated[int, typer.Option(min=0, help="Untimed rounds before them.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default cuda where there is one.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(bench)
    app.command()(decode)


@contextlib.contextmanager
def readable_errors() -> Iterator[None]:
    """Turn what is wrong with the input into one line and exit code 2; a bug in the code still shows its traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "pandas", "tomli"):
            raise
        typer.echo(
            f"error: {error.name} is not installed; the measuring commands need `pip install nsa-sel[bench]`", err=True
        )
        raise typer.Exit(BAD_INPUT) from error
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from error


def bench(
    suite: Annotated[
        list[str] | None, typer.Option(help="plan, decode, models, ci, or a TOML file, several with commas.")
    ] = None,
    rows: Annotated[
        list[str] | None, typer.Option(help="Rows (b, s, g) of a workload of your own, several with commas.")
    ] = None,
    batch: Annotated[
        list[str] | None, typer.Option("--B", help="Requests, instead of --rows, several with commas.")
    ] = None,
    groups: Annotated[int, typer.Option("--G", help="KV groups.")] = 2,
    heads: Annotated[list[str] | None, typer.Option("--h", help="Query heads a group, several with commas.")] = None,
    dk: Annotated[list[str] | None, typer.Option("--D", help="Head dimension of q and k, several with commas.")] = None,
    dv: Annotated[
        list[str] | None, typer.Option("--Dv", help="Head dimension of v; several with commas; default --D.")
    ] = None,
    length: Annotated[list[str] | None, typer.Option("--L", help="Tokens a row selects, several with commas.")] = None,
    dist: Annotated[list[str] | None, typer.Option(help="few, many, mixed or blocks, several with commas.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16, fp32, fp64, several with commas.")] = None,
    s_kv: Annotated[int, typer.Option("--S-kv", help="Tokens in each cache.")] = 4096,
    n: Annotated[list[str] | None, typer.Option("--n", help="Blocks, with --dist blocks, several with commas.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens a block, with --dist blocks.")] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens a page: a paged cache.")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="eager, graph, streams2; several with commas; by default all there are.")
    ] = None,
    backend: Annotated[
        list[str] | None,
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
    tune: Annotated[
        bool, typer.Option("--tune", help="Sweep the Triton backend's settings instead; writes tune_triton.csv.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the results in --out.")] = False,
    device: Device = "",
) -> None:
    """Measure the backends side by side; writes bench.csv and bench.json. Exit 1 where a result is wrong."""
    console = wide_console(stderr=True)
    with readable_errors():
        from nsa_sel.measure.run import session, workload
        from nsa_sel.measure.run.race import ContextLostError, Settings

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
        if tune:
            sweep = session.TuneSession(where, words(mode), seed, iters, warmup)
            _advance(console, "workloads", len(workloads), sweep.run(workloads, out))
            typer.echo(f"results: {out / 'tune_triton.csv'}")
            raise typer.Exit(0)
        settings = Settings(where, (), seed, iters, warmup)
        run = session.BenchSession(settings, words(mode), words(backend), peers, out, resume)
        show(console, *(f"note: {line}" for line in run.notes))
        lost = None
        try:
            _advance(console, "workloads", len(workloads), run.run(workloads, seconds, WRITE_EVERY))
        except ContextLostError as error:
            lost = error.args[0]
        header, *lines = run.table()
        table = Table(*header, title=escape(f"{run.facts['device']}: medians over the workloads"))
        for line in lines:
            table.add_row(*map(escape, line))
        console.print(table)
        show(console, *run.summary())
        show(console, *(f"PARITY FAILURE {line}" for line in run.results.parity_failures), style="red")
    typer.echo(f"results: {out / 'bench.csv'}")
    if lost is not None:
        typer.echo(f"error: {lost}; --resume goes on with the next workload", err=True)
        raise typer.Exit(CONTEXT_LOST)
    raise typer.Exit(1 if run.results.parity_failures else 0)


def decode(
    context: Annotated[
        list[str] | None,
        typer.Option(help="Cached tokens; several with commas; by default 4096 to 65536, at most 4096 on a CPU."),
    ] = None,
    batch: Annotated[
        list[str] | None, typer.Option("--B", help="Requests; several with commas; by default 1, 8, 64; 1 on a CPU.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Backend of the selection; by default cuda where it runs, else sdpa.")
    ] = "",
    mode: Annotated[str, typer.Option(help="eager or graph; by default graph on a GPU.")] = "",
    leave_out: Annotated[
        list[str] | None, typer.Option(help="A stage to leave out, to see what it costs, several with commas.")
    ] = None,
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

        run = session.DecodeSession(
            session.device_of(device),
            whole("context", context),
            whole("B", batch),
            backend,
            mode,
            tuple(words(leave_out) or ()),
            seed,
            iters,
            warmup,
        )
        show(console, *(f"note: {line}" for line in run.notes))
        shown = len(run.notes)
        _advance(console, "steps", len(run.steps), run.run(out))
        header, *lines = run.table()
        table = Table(*header, title="decode step: shares by stage")
        for line in lines:
            table.add_row(*map(escape, line))
        console.print(table)
        show(console, *(f"note: {line}" for line in run.notes[shown:]))
    typer.echo(f"results: {out / 'decode.csv'}")


def wide_console(stderr: bool) -> Console:
    """Return a console that cuts no table: a terminal scrolls, and what is piped has no width at all."""
    return Console(stderr=stderr, width=None if Console(stderr=stderr).is_terminal else 200)


def show(console: Console, *lines: str, style: str | None = None) -> None:
    """Print lines as they are: what is in square brackets is no markup, and a path is not broken."""
    for line in lines:
        console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def words(values: list[str] | None) -> list[str] | None:
    """Return the words of a repeatable option, each of which may hold several with commas.

    >>> words(["few,many", "mixed"])
    ['few', 'many', 'mixed']
    """
    return [word.strip() for value in values for word in value.split(",")] if values else None


def whole(name: str, values: list[str] | None) -> list[int] | None:
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
