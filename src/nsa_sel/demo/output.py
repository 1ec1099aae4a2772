"""What the demonstration leaves behind: a table on the screen, a CSV and a picture."""

from __future__ import annotations

import contextlib
import csv
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich.table import Table

from nsa_sel.demo.run import Row


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place at the end: a reader never sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp's files are the owner's alone
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write one line per row, with the fields of `Row` as columns."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            values = asdict(row).items()
            writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values})


def table(rows: Sequence[Row], title: str) -> Table:
    """Return one shape's rows as a table."""
    result = Table(title=title, title_justify="left")
    result.add_column("context\ntokens", justify="right")
    result.add_column("L\ntokens", justify="right")
    result.add_column("backend that ran\n(why)")
    for name in ("scoring\nms", "selection\nms", "dense\nms", "dense /\nselection", "dense / (sel.\n+ scoring)"):
        result.add_column(name, justify="right")
    for name in ("max error\nvs oracle", "mass\ncaptured", "random\nblocks"):
        result.add_column(name, justify="right")
    for row in rows:
        result.add_row(
            f"{row.context:,}",
            f"{row.L:,}",
            f"{row.backend} ({row.reason})",
            f"{row.score_ms:.3f}",
            f"{row.select_ms:.3f}",
            f"{row.dense_ms:.3f}",
            f"{row.speedup:.1f}x",
            f"{row.speedup_with_scoring:.1f}x",
            f"{row.max_err:.1e}",
            f"{row.captured:.1%}",
            f"{row.captured_random:.1%}",
        )
    return result


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw cost and captured mass against context length, one column of panels per shape."""
    # Here because it is slow to import; and not pyplot, which keeps figures and asks for a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    shapes = list(dict.fromkeys(row.shape for row in rows))
    figure = Figure(figsize=(5.5 * len(shapes), 7), layout="constrained")
    panels = figure.subplots(2, len(shapes), squeeze=False, sharex=True, sharey="row")
    for column, shape in enumerate(shapes):
        mine = [row for row in rows if row.shape == shape]
        contexts = [row.context for row in mine]
        cost, share = panels[0][column], panels[1][column]
        cost.plot(contexts, [row.dense_ms for row in mine], "o-", color="tab:gray", label="dense attention")
        scored = [row.score_ms + row.select_ms for row in mine]
        cost.plot(contexts, scored, "s--", color="tab:orange", label="scoring + selection attention")
        selected = [row.select_ms for row in mine]
        cost.plot(contexts, selected, "^-", color="tab:blue", label=f"selection attention ({mine[-1].backend})")
        cost.set(title=f"{shape}: {mine[-1].dtype} on {mine[-1].device}", xscale="log", yscale="log")
        chosen, other = [row.captured for row in mine], [row.captured_random for row in mine]
        cost.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        cost.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        cost.yaxis.set_minor_formatter(NullFormatter())
        share.plot(contexts, chosen, "^-", color="tab:blue", label="blocks chosen by the scorer")
        share.plot(contexts, other, "x--", color="tab:red", label="random blocks, equal L")
        share.set(xlabel="context, tokens", ylim=(0, 1.02))
        share.set_xticks(contexts, [f"{c / 1024:g}k" if c >= 1024 else str(c) for c in contexts])
        share.minorticks_off()
        for panel in (cost, share):
            panel.grid(alpha=0.3)
            panel.legend()
    panels[0][0].set_ylabel("one decode step, ms (median)")
    panels[1][0].set_ylabel("share of the dense softmax mass")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
