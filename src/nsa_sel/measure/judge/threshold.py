"""From which L on a backend is worth it: the smallest such that it and every larger measured L hold in every row."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from nsa_sel.measure import schema
from nsa_sel.measure.judge.rules import Rules
from nsa_sel.measure.judge.tables import read_bench, summary, where
from nsa_sel.measure.judge.trust import bench_faults, device_faults, judged

SLOWER = 1 / 1.1  # nothing may get more than 10 % slower than the baseline


@dataclass(frozen=True)
class Threshold:
    """What a set of rows says of a backend: `min_l` (None: there is none), why, and the table by L and distribution."""

    verdict: str
    min_l: int | None
    reason: str
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    rows: pd.DataFrame = field(default_factory=pd.DataFrame)


def find_threshold(rows: pd.DataFrame, margin: float, max_mae: float) -> Threshold:
    """Find the threshold in `rows`, the judged rows of one backend, each with its L, dist, speedup and mae.

    Fails closed: where the largest measured L fails, there is no threshold, whatever the smaller ones did.
    """
    # Written so that NaN fails: a comparison that NaN passes would be no comparison.
    holds = (rows["speedup"] >= margin) & (rows["mae"] <= max_mae)
    table = _table(rows, holds)
    min_l = None
    for length in sorted(set(rows["L"]), reverse=True):
        if not holds[rows["L"] == length].all():
            break
        min_l = int(length)
    if min_l is None:
        failing = rows[~holds & (rows["L"] == rows["L"].max())]
        worst = failing.sort_values("speedup").iloc[0]
        reason = (
            f"no threshold: the largest measured L = {rows['L'].max():g} fails {margin:g}x or MAE {max_mae:g} "
            f"(speed-up {worst['speedup']:.3g}, MAE {worst['mae']:.3g}), {where(failing)}"
        )
        return Threshold(schema.FAIL, None, reason, table, failing)
    above = rows[rows["L"] >= min_l]
    worst = above.sort_values("speedup").iloc[0]
    reason = (
        f"from L = {min_l} on every row reaches {margin:g}x with MAE <= {max_mae:g}: {len(above)} rows, "
        f"the slowest {worst['speedup']:.3g}x {where(above.sort_values('speedup').head(1))}"
    )
    return Threshold(schema.PASS, min_l, reason, table, above)


def threshold_of_files(paths: list[str | Path], rules: Rules, backend: str) -> Threshold:
    """Find the threshold over several bench.csv, each of which must be believable on its own."""
    faults: list[str] = []
    frames = []
    for path in paths:
        table = read_bench(path)
        faults += bench_faults(table, rules, backend)
        if table.frame is not None:
            frames.append(table.frame)
    if len({Path(path).resolve() for path in paths}) < len(paths):
        faults.append("the same file was given twice")
    if len(frames) > 1:
        faults += device_faults(pd.concat(frames))
    if not paths:
        faults.append("no bench file was given")
    if faults:
        return Threshold(schema.NOT_MEASURED, None, summary(list(dict.fromkeys(faults))))
    rows = pd.concat([judged(frame) for frame in frames])
    return find_threshold(rows[rows["backend"] == backend], rules.roi_margin, rules.stability_max_mae)


def threshold_page(found: Threshold, rules: Rules, backend: str, sources: list[str]) -> str:
    """Return the Markdown report: the threshold, the table by L and distribution, and what routing below it costs."""
    lines = [
        f"# Threshold of `{backend}`: {found.min_l if found.min_l is not None else found.verdict}",
        "",
        f"{found.reason[0].upper()}{found.reason[1:]}.",
        "",
        f"Asked: at least {rules.roi_margin:g}x packed SDPA and MAE <= {rules.stability_max_mae:g} in every row",
        "of every distribution, at the threshold and at every larger measured L. Data: "
        + ", ".join(f"`{source}`" for source in sources)
        + ".",
    ]
    if found.table.empty:
        return "\n".join([*lines, "", "Nothing below is filled in, because the data cannot be believed.", ""])
    lines += ["", "## By L and distribution", "", *markdown_table(_for_print(found.table))]
    lines += ["", "## What routing below the threshold costs", "", *_routing_cost(found)]
    return "\n".join([*lines, ""])


def markdown_table(frame: pd.DataFrame) -> list[str]:
    """Return the lines of a Markdown table of a frame of text.

    >>> markdown_table(pd.DataFrame({"L": ["16"], "holds": ["yes"]}))
    ['| L | holds |', '|---|---|', '| 16 | yes |']
    """
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns)]
    return lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in frame.to_numpy()]


def _table(rows: pd.DataFrame, holds: pd.Series) -> pd.DataFrame:
    groups = rows.assign(holds=holds).groupby(["L", "dist"], sort=True)
    return groups.agg(
        rows=("L", "size"),
        speedup_min=("speedup", "min"),
        speedup_median=("speedup", "median"),
        mae_max=("mae", "max"),
        holds=("holds", "all"),
    ).reset_index()


def _for_print(table: pd.DataFrame) -> pd.DataFrame:
    text = pd.DataFrame({"L": table["L"].map("{:g}".format), "distribution": table["dist"], "rows": table["rows"]})
    text["slowest"] = table["speedup_min"].map("{:.2f}x".format)
    text["median"] = table["speedup_median"].map("{:.2f}x".format)
    text["largest MAE"] = table["mae_max"].map("{:.2g}".format)
    text["holds"] = table["holds"].map({True: "yes", False: "**no**"})
    return text


def _routing_cost(found: Threshold) -> list[str]:
    table = found.table
    if found.min_l is None:
        below, start = table, "With no threshold every call goes to packed SDPA"
    else:
        below, start = table[table["L"] < found.min_l], f"Calls whose L bound is under {found.min_l} go to packed SDPA"
    if below.empty:
        return ["No measured L lies below the threshold, so routing costs nothing that was measured."]
    best = below.sort_values("speedup_median").iloc[-1]
    forgone = (
        f"at most a median speed-up of {best['speedup_median']:.2f}x is given up (L = {best['L']:g}, {best['dist']})"
        if best["speedup_median"] > 1
        else "nothing is given up, because packed SDPA is the faster one there"
    )
    worst = below.sort_values("speedup_min").iloc[0]
    lines = [f"{start}: they run at packed SDPA's own speed, and {forgone}."]
    if worst["speedup_min"] < SLOWER:
        lines.append(
            f"**More than 10 % slower than packed SDPA** is possible: {worst['speedup_min']:.2f}x "
            f"at L = {worst['L']:g} ({worst['dist']}), "
            "where the kernel runs in spite of the threshold because the caller gives no bound. Pass `max_selected`."
        )
    else:
        lines.append(
            "A call whose L bound is unknown runs the kernel below the threshold too: never more than 10 % slower "
            f"than packed SDPA (slowest {worst['speedup_min']:.2f}x)."
        )
    return lines
