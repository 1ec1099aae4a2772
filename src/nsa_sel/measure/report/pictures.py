"""The pictures of a report, as PNG; None where there is nothing to draw, so that no empty axes stand for data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from nsa_sel.measure import schema
from nsa_sel.measure.judge.rules import Rules

# One colour and marker for a backend in every picture; the first three differ in lightness too.
STYLES = {
    "cuda": ("#0b5394", "o"), "sdpa": ("#444444", "s"), "sdpa_prepared": ("#76a5af", "p"),
    "sdpa_gathered": ("#a0a0a0", "^"), "triton": ("#e69138", "D"), "flashinfer": ("#6aa84f", "v"),
    "fla": ("#cc4125", "P"), "xunhaolai": ("#8e7cc3", "X"), "vllm": ("#45818e", "<"), "flex": ("#c27ba0", ">"),
    "flash_attn": ("#bf9000", "*"),
}  # fmt: skip
LABELS = {
    "sdpa": "sdpa (packed, with its gather)",
    "sdpa_prepared": "sdpa_prepared (ready index, gather, SDPA)",
    "sdpa_gathered": "sdpa_gathered (a bound)",
}
STAGE_COLOURS = {"select": "#0b5394", "compress": "#9fc5e8", "score": "#b6d7a8", "window": "#f9cb9c", "gate": "#d5a6bd"}
RESIDUAL = "#dddddd"
ASKED: dict[str, Any] = {"color": "#cc0000", "linewidth": 1, "linestyle": "--"}


def draw_speedup(rows: pd.DataFrame, rules: Rules, path: Path) -> Path | None:
    """Draw the speed-up over the faster baseline against L, one panel for each distribution."""
    rows = rows[rows["roi"].notna() & ~rows["backend"].isin(schema.BASELINES)]
    if rows.empty:
        return None
    dists = [dist for dist in (*schema.DISTRIBUTIONS, "blocks") if dist in set(rows["dist"])]
    dists += sorted(set(rows["dist"]) - set(dists))
    figure, axes = _panels(len(dists))
    for axis, dist in zip(axes, dists, strict=True):
        mine = rows[rows["dist"] == dist]
        for backend, group in mine.groupby("backend"):
            by_length = group.groupby("L")["roi"]
            style = _style(str(backend))
            lengths = sorted(by_length.groups)
            axis.plot(lengths, by_length.median(), markersize=5, **style)
            low, high = by_length.min(), by_length.max()
            axis.fill_between(lengths, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axis.axhline(1.0, color="#444444", linewidth=1)
        axis.axhline(rules.roi_margin, **ASKED)
        axis.set(title=dist, xscale="log", yscale="log", xlabel="L, tokens a row selects")
        _plain_ticks(axis, sorted(set(mine["L"])))
        axis.grid(True, alpha=0.3)
    axes[0].set_ylabel("speed-up over the faster baseline")
    at: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "color": ASKED["color"], "va": "bottom"}
    axes[0].annotate(f"asked: {rules.roi_margin:g}x", (0.02, rules.roi_margin), **at)
    _legend(figure, axes)
    figure.suptitle(_of(rows))
    return _save(figure, path)


def draw_bandwidth(rows: pd.DataFrame, path: Path) -> Path | None:
    """Draw GB/s against the bytes of a call, with the ceiling measured beside it."""
    rows = rows[rows["gbps"].notna() & rows["ceiling_gbps"].notna()]
    if rows.empty:
        return None
    figure, (axis,) = _panels(1)
    ceiling = rows.groupby("bytes")["ceiling_gbps"].median()
    label = "ceiling: a streaming read of as many bytes"
    axis.plot(ceiling.index / 1e6, ceiling, color="#cc0000", marker="_", markersize=8, label=label)
    for backend, group in rows.groupby("backend"):
        axis.scatter(group["bytes"] / 1e6, group["gbps"], s=22, alpha=0.75, **_style(str(backend)))
    axis.set(xscale="log", yscale="log", xlabel="MB moved by one call", ylabel="GB/s")
    for side in (axis.xaxis, axis.yaxis):
        _decades(side)
    axis.set_title(f"bandwidth against the ceiling\n{_of(rows)}")
    axis.grid(True, alpha=0.3)
    _legend(figure, [axis])
    return _save(figure, path)


def draw_share(rows: pd.DataFrame, rules: Rules, path: Path) -> Path | None:
    """Draw the stages' shares of a step against the context, one panel for each B, the selection at the bottom."""
    rows = rows[rows["share"].notna() & rows["B"].notna() & rows["context"].notna()]
    if rows.empty:
        return None
    batches = sorted(set(rows["B"]))
    figure, axes = _panels(len(batches))
    for axis, batch in zip(axes, batches, strict=True):
        shares = rows[rows["B"] == batch].pivot_table(index="context", columns="stage", values="share", sort=True)
        places, bottom = np.arange(len(shares)), np.zeros(len(shares))
        for stage, colour in STAGE_COLOURS.items():
            if stage in shares:
                heights = shares[stage].fillna(0).to_numpy()
                axis.bar(places, heights, bottom=bottom, color=colour, width=0.7, label=stage)
                bottom = bottom + heights
        rest = np.clip(1 - bottom, 0, None)
        axis.bar(places, rest, bottom=bottom, color=RESIDUAL, width=0.7, label="residual (no stage)")
        axis.axhline(rules.share_min, **ASKED, label=f"asked of select: {rules.share_min:.0%}")
        axis.axhline(1.0, color="#444444", linewidth=1)
        axis.set_xticks(places, [f"{context:,.0f}" for context in shares.index])
        axis.set(title=f"B = {batch:g}", xlabel="context, tokens", ylim=(0, max(1.05, bottom.max() * 1.05)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes[0].set_ylabel("share of one decode step")
    figure.suptitle(f"{_of(rows)}, selection on packed SDPA")
    _legend(figure, axes, bars=True)
    return _save(figure, path)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    # Not through pyplot: no global state, no display, nothing left open when a picture fails.
    figure = Figure(figsize=(max(7.0, 3.6 * count), 4.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)
    return figure, list(axes[0])


def _style(backend: str) -> dict[str, Any]:
    colour, marker = STYLES.get(backend, ("#000000", "."))
    return {"color": colour, "marker": marker, "label": LABELS.get(backend, backend)}


def _plain_ticks(axis: Axes, lengths: list[float]) -> None:
    axis.xaxis.set_major_locator(FixedLocator(lengths))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.tick_params(axis="x", rotation=45 if len(lengths) > 5 else 0)
    low, high = axis.get_ylim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))


def _decades(side: Axis) -> None:
    """Label a logarithmic axis at 1, 2, 5 of each decade with plain numbers: the default mixes two notations."""
    side.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    side.set_minor_locator(NullLocator())
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _of(rows: pd.DataFrame) -> str:
    """Say on what, in which dtype and mode the rows were measured; the text of a file is no markup."""
    parts = [", ".join(sorted(set(rows[name]))) for name in ("device", "dtype", "mode") if name in rows.columns]
    return ", ".join(part.replace("$", r"\$") for part in parts)


def _legend(figure: Figure, axes: list[Axes], bars: bool = False) -> None:
    entries: dict[str, Artist] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            entries.setdefault(label, handle)
    if bars:  # from the top of the bars to their bottom, and what is no bar behind them
        lines = [label for label, handle in entries.items() if isinstance(handle, Line2D)]
        entries = {label: entries[label] for label in [*[x for x in reversed(entries) if x not in lines], *lines]}
    columns = min(2 * len(axes), 5)
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, frameon=False)


def _save(figure: Figure, path: Path) -> Path:
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    with mpl.rc_context({"font.size": 10}):
        figure.savefig(part)
    part.replace(path)
    return path
