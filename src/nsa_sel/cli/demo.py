"""`nsa-sel demo`: watch selection attention against dense attention while the context grows."""

from __future__ import annotations

import os
import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from nsa_sel import build_info, errors
from nsa_sel.demo import output
from nsa_sel.demo.run import WARMUP, Row, Settings, run, steps_in

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Against fp64: the rounding of the result and of PyTorch's own intermediates, on outputs that stay below 4.
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHORTEST = 256
BUSY = 0.75  # load average per core from which on the times come with a warning


class DtypeChoice(str, Enum):
    """What --dtype takes."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class BackendChoice(str, Enum):
    """What --backend takes."""

    auto = "auto"
    cuda = "cuda"
    triton = "triton"
    sdpa = "sdpa"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.csv and demo.png.", file_okay=False)] = Path("demo_out"),
    contexts: Annotated[str, typer.Option(help="Context lengths, tokens, ascending.")] = "4k,8k,16k,32k,64k",
    seed: Annotated[int, typer.Option(help="Of the synthetic text, the queries and the random blocks.")] = 0,
    dtype: Annotated[DtypeChoice, typer.Option(help="auto: bf16 on a GPU, fp32 on a CPU.")] = DtypeChoice.auto,
    backend: Annotated[BackendChoice, typer.Option(help="Passed to selection_attention.")] = BackendChoice.auto,
    device: Annotated[str, typer.Option(help="auto: the GPU if there is one, else the CPU.")] = "auto",
    steps: Annotated[int, typer.Option(help="Timed decode steps per context length.", min=1)] = 10,
) -> None:
    """Decode over a growing context and compare selection attention with dense attention.

    The text is synthetic: runs of tokens about topics that come back, and queries that look for a topic. A scorer
    chooses blocks by their mean key; the first block and the last two are always chosen. Times are medians of single
    calls, the launch included. Exit code 1: an error against the fp64 oracle is larger than the dtype allows.
    """
    where = _device(device)
    kind = (torch.bfloat16 if where.type == "cuda" else torch.float32) if dtype.value == "auto" else DTYPES[dtype.value]
    settings = Settings(
        contexts=parse_contexts(contexts, SHORTEST + WARMUP + steps),
        device=where,
        dtype=kind,
        backend=backend.value,
        seed=seed,
        steps=steps,
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a log has no width; the default of 80 would break the table's lines
    out.mkdir(parents=True, exist_ok=True)
    build = build_info()
    kernels = "with CUDA kernels" if build["kernels"] else f"without CUDA kernels ({build['reason']})"
    console.print(f"nsa_sel {build['version']}, {kernels}; decoding in {str(kind).removeprefix('torch.')} on {where}")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    try:
        rows = _run_with_bar(settings, console)
    except errors.BackendError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from error
    for shape in settings.shapes:
        selection = f"{shape.n} blocks of {shape.block_size}" + (", paged" if shape.page_size else "")
        title = f"{shape.name}: {shape.heads} heads in {shape.G} groups, Dk {shape.Dk}, Dv {shape.Dv}, {selection}"
        console.print(output.table([row for row in rows if row.shape == shape.name], title))
    console.print(
        "Scoring: pool the new key, score the blocks, choose. Selection: selection_attention. Dense: attention over "
        f"the whole context, K and V contiguous, by the fastest way of PyTorch here ({_ways(rows)}). Times are medians "
        f"of {settings.steps} single calls. Mass: share of the dense softmax on the selected tokens; the random blocks "
        "hold as many tokens. Error: the largest, against fp64."
    )
    cores = os.cpu_count() or 1
    if load > BUSY * cores:
        console.print(
            f"[yellow]The load average was {load:.1f} on {cores} cores when the run began. If other work went on, "
            "calls as short as these waited for a core: read the times with care.[/yellow]"
        )
    output.write_csv(rows, out / "demo.csv")
    output.draw(rows, out / "demo.png")
    console.print(f"wrote {out / 'demo.csv'} and {out / 'demo.png'}", soft_wrap=True)
    wrong = [row.max_err for row in rows if not row.max_err <= MAX_ERROR[kind]]  # written so that NaN is wrong
    if wrong:
        console.print(f"[red]error against the oracle: expected at most {MAX_ERROR[kind]:g}, got {wrong}[/red]")
        raise typer.Exit(1)


def parse_contexts(text: str, least: int = SHORTEST) -> tuple[int, ...]:
    """Return context lengths in tokens from text such as "4k,8k,65536".

    >>> parse_contexts("4k,8k,10000")
    (4096, 8192, 10000)

    Raises:
        typer.BadParameter: not a list of ascending lengths, each `least` or more apart.
    """
    if not re.fullmatch(r"\d+k?(,\d+k?)*", text):
        raise typer.BadParameter(f"expected lengths such as 4k,8k,65536, got {text!r}", param_hint="--contexts")
    lengths = tuple(int(part[:-1]) * 1024 if part.endswith("k") else int(part) for part in text.split(","))
    if any(after - before < least for before, after in zip((0, *lengths), lengths, strict=False)):
        raise typer.BadParameter(
            f"expected ascending lengths, at least {least} tokens apart and the first at least {least}, got {text!r}",
            param_hint="--contexts",
        )
    return lengths


def _ways(rows: list[Row]) -> str:
    return ", ".join(sorted({row.dense_how for row in rows}))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        first_line = str(error).splitlines()[0]
        raise typer.BadParameter(f"expected a device that torch can use, got {name!r}: {first_line}") from error
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, got {name!r}", param_hint="--device")
    return device


def _run_with_bar(settings: Settings, console: Console) -> list[Row]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("preparing", total=steps_in(settings))
        return list(run(settings, lambda what: progress.update(task, description=what, advance=1)))
