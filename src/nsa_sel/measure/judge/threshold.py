"""From which L on a backend is worth it: the smallest such that it and every larger measured L hold in every row."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from nsa_sel.measure import schema
from nsa_sel.measure.judge import checks
from nsa_sel.measure.judge.rules import Rules
from nsa_sel.measure.judge.tables import Row, read_bench, where
from nsa_sel.measure.judge.trust import bench_faults, compare
from nsa_sel.measure.report.markdown import table_lines

SLOWER = 1 / 1.1  # nothing may get more than 10 % slower than the baseline


@dataclass(frozen=True)
class Group:
    """What was measured at one L in one distribution."""

    L: int
    dist: str
    rows: int
    slowest: float
    median: float
    mae: float
    holds: bool


@dataclass(frozen=True)
class Threshold:
    """What a set of rows says of a backend: `min_l` (None: there is none), why, and groups by L and distribution."""

    verdict: str
    min_l: int | None
    reason: str
    groups: tuple[Group, ...] = ()
    rows: list[Row] = field(default_factory=list)


def find_threshold(rows: list[Row], margin: float, max_mae: float) -> Threshold:
    """Find the threshold in `rows`, those of `compare`.

    Fails closed: where the largest measured L fails, there is no threshold, whatever the smaller ones did.
    """

    def holds(row: Row) -> bool:
        # Written so that NaN fails: a comparison that NaN passes would be no comparison.
        return bool(row["roi_low"] >= margin and row["mae"] <= max_mae)

    lengths = sorted({int(row["L"]) for row in rows}, reverse=True)
    min_l = None
    for length in lengths:
        if not all(holds(row) for row in rows if row["L"] == length):
            break
        min_l = length
    groups = []
    for length, dist in sorted({(int(row["L"]), str(row["dist"])) for row in rows}):
        mine = [row for row in rows if (row["L"], row["dist"]) == (length, dist)]
        ratios, worst = [row["roi"] for row in mine], max(row["mae"] for row in mine)
        group = (min(ratios), statistics.median(ratios), worst, all(map(holds, mine)))
        groups.append(Group(length, dist, len(mine), *group))
    deciding = [row for row in rows if (row["L"] == lengths[0] and not holds(row)) or (min_l and row["L"] >= min_l)]
    worst_row = min(deciding, key=lambda row: float(row["roi_low"]))
    told = f"{worst_row['roi']:.3g}x over {worst_row['baseline']}, at least {worst_row['roi_low']:.4g}x"
    if min_l is None:
        reason = (
            f"no threshold: the largest measured L = {lengths[0]} fails {margin:g}x or MAE {max_mae:g} "
            f"({told}, MAE {max(row['mae'] for row in deciding):.3g}), {where(deciding)}"
        )
        return Threshold(schema.FAIL, None, reason, tuple(groups), deciding)
    reason = (
        f"from L = {min_l} on the lower end of every speed-up reaches {margin:g}x with MAE <= {max_mae:g}: "
        f"{len(deciding)} rows, the slowest {told}, {where([worst_row])}"
    )
    return Threshold(schema.PASS, min_l, reason, tuple(groups), deciding)


def threshold_of_files(paths: list[str | Path], rules: Rules, backend: str) -> Threshold:
    """Find the threshold over several bench.csv, each of which must be believable on its own."""
    tables = [read_bench(path) for path in paths]
    rows = [row for table in tables for row in table.rows]
    faults = [fault for table in tables for fault in bench_faults(table, rules, backend)]
    faults += checks.device_faults(rows)
    for wrong, text in (
        (len({Path(path).resolve() for path in paths}) < len(paths), "the same file was given twice"),
        (len({row["commit"] for row in rows}) > 1, "files of several commits"),
        (not paths, "no bench file was given"),
    ):
        faults += [text] if wrong else []
    if faults:
        return Threshold(schema.NOT_MEASURED, None, "; ".join(dict.fromkeys(faults)))
    compared = [row for table in tables for row in compare(table, backend)]
    return find_threshold(compared, rules.roi_margin, rules.stability_max_mae)


def threshold_page(found: Threshold, rules: Rules, backend: str, sources: list[str]) -> str:
    """Return the Markdown report: the threshold, the table by L and distribution, and what routing below it costs."""
    lines = [
        f"# Threshold of `{backend}`: {found.min_l if found.min_l is not None else found.verdict}",
        "",
        f"{found.reason[0].upper()}{found.reason[1:]}.",
        "",
        f"Asked: at least {rules.roi_margin:g}x the faster baseline and MAE <= {rules.stability_max_mae:g} in every",
        "row of every distribution, at the threshold and at every larger measured L. Data: "
        + ", ".join(f"`{source}`" for source in sources)
        + ".",
    ]
    if not found.groups:
        return "\n".join([*lines, "", "Nothing below is filled in, because the data cannot be believed.", ""])
    header = ("L", "distribution", "rows", "slowest", "median", "largest MAE", "holds")
    table = [
        (one.L, one.dist, one.rows, f"{one.slowest:.2f}x", f"{one.median:.2f}x", f"{one.mae:.2g}",
         "yes" if one.holds else "**no**") for one in found.groups
    ]  # fmt: skip
    lines += ["", "## By L and distribution", "", *table_lines(header, table)]
    lines += ["", "## What routing below the threshold costs", "", *_routing_cost(found)]
    return "\n".join([*lines, ""])


def _routing_cost(found: Threshold) -> list[str]:
    if found.min_l is None:
        below, start = found.groups, "With no threshold every call goes to packed SDPA"
    else:
        below = tuple(group for group in found.groups if group.L < found.min_l)
        start = f"Calls whose L bound is under {found.min_l} go to packed SDPA"
    if not below:
        return ["No measured L lies below the threshold, so routing costs nothing that was measured."]
    best, worst = max(below, key=lambda group: group.median), min(below, key=lambda group: group.slowest)
    forgone = (
        f"at most a median speed-up of {best.median:.2f}x is given up (L = {best.L}, {best.dist})"
        if best.median > 1
        else "nothing is given up, because a baseline is the faster one there"
    )
    lines = [f"{start}: they run at its own speed, and {forgone}."]
    if worst.slowest < SLOWER:
        lines.append(
            f"**More than 10 % slower than the faster baseline** is possible: {worst.slowest:.2f}x "
            f"at L = {worst.L} ({worst.dist}), "
            "where the kernel runs in spite of the threshold because the caller gives no bound. Pass `max_selected`."
        )
    else:
        lines.append(
            "A call whose L bound is unknown runs the kernel below the threshold too: never more than 10 % slower "
            f"than the faster baseline (slowest {worst.slowest:.2f}x)."
        )
    return lines
