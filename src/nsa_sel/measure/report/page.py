"""The report of a folder: one Markdown page with its pictures, readable without the CSV files."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from nsa_sel.measure import schema
from nsa_sel.measure.files import write_atomically
from nsa_sel.measure.judge.gate import Judgement, judge
from nsa_sel.measure.judge.rules import Rules, load_rules
from nsa_sel.measure.judge.tables import Table, entries, inner, number, read_bench, read_decode
from nsa_sel.measure.judge.trust import case_of, judged
from nsa_sel.measure.judge.trust_decode import Step
from nsa_sel.measure.report import pictures
from nsa_sel.measure.report.markdown import plain, table_lines
from nsa_sel.measure.report.record import environment_lines, gate_table, step_table

NOTHING = f"{schema.NOT_MEASURED}: the data holds nothing to draw here."


def write_report(folder: Path, rules: Rules | None = None) -> Path:
    """Write report.md and its pictures into `folder` from the bench.csv and decode.csv in it; returns the page.

    Raises:
        ValueError: neither file is there.
    """
    rules = rules or load_rules()
    bench, decode = read_bench(folder / "bench.csv"), read_decode(folder / "decode.csv")
    if not bench.readable and not decode.readable:
        raise ValueError(
            f"report: expected a bench.csv or a decode.csv in {folder}, got {'; '.join(bench.faults + decode.faults)}"
        )
    measured, steps = _measured(bench), _steps(decode)
    judgement = judge(folder / "bench.csv", folder / "decode.csv", rules)
    drawn = {
        "speedup": pictures.draw_speedup(measured, rules, folder / "speedup.png"),
        "bandwidth": pictures.draw_bandwidth(measured, folder / "bandwidth.png"),
        "share": pictures.draw_share(steps, rules, folder / "share.png"),
    }
    for name, path in drawn.items():
        if path is None:  # a picture of an earlier report must not stand beside this one
            (folder / f"{name}.png").unlink(missing_ok=True)
    lines = [
        *_head(judgement),
        *_speedups(measured, drawn),
        *_bandwidth(measured, drawn),
        *_shares(decode, steps, drawn, judgement.steps),
        *_gaps(bench, decode),
    ]
    write_atomically(folder / "report.md", "\n".join(lines) + "\n")
    return folder / "report.md"


def _measured(table: Table) -> pd.DataFrame:
    """Return the rows to show: those that ran as named, in the mode that decides; the gate says what they are worth."""
    shown = [row for row in judged(table.rows) if row["ran"] == row["backend"] and row["ms_median"] > 0]
    base: dict[Any, float] = {}
    for row in shown:
        if row["backend"] in schema.BASELINES:
            base[case_of(row)] = min(base.get(case_of(row), math.inf), row["ms_median"])
    for row in shown:
        row["roi"] = base.get(case_of(row), math.nan) / row["ms_median"]
    return pd.DataFrame(shown, columns=[*schema.BENCH_COLUMNS, "line", "roi"])


def _steps(table: Table) -> pd.DataFrame:
    shown = [row for row in table.rows if row["ran"] == row["backend"] and 0 <= row["share"] <= 1]
    shown = [row for row in shown if row["stage"] != schema.STEP and row["backend"] in (schema.TORCH, schema.BASELINE)]
    how = {"dtype": "bf16", "mode": str(inner(table.facts, "environment").get("mode", ""))}  # as all steps of a run
    return pd.DataFrame(shown, columns=[*schema.DECODE_COLUMNS, "line"]).assign(**how)


def _head(judgement: Judgement) -> list[str]:
    facts = environment_lines(judgement.environment)
    return [
        f"# Measurements on {plain(judgement.device) or 'no single device'} (SM {plain(judgement.sm) or 'unknown'})",
        "",
        f"Decision for `{judgement.backend}`: **{judgement.verdict}**"
        + (f", from L = {judgement.min_l} on." if judgement.verdict == schema.PASS else "."),
        "",
        *gate_table(judgement),
        "",
        *(f"- {plain(remark)}" for remark in judgement.remarks),
        "",
        "## Environment",
        "",
        *(facts or ["Unknown: no environment JSON lies beside the data.", ""]),
    ]


def _speedups(rows: pd.DataFrame, drawn: dict[str, Path | None]) -> list[str]:
    lines = [
        "## Speed-up over the faster baseline, by L and distribution",
        "",
        *_picture(drawn, "speedup", "speed-up over L by distribution"),
    ]
    rows = rows[rows["roi"].notna() & ~rows["backend"].isin(schema.BASELINES)]
    if rows.empty:
        return lines
    lines += [
        "Lines are medians over the shapes, bands reach from the slowest to the fastest. Each cell: median (slowest).",
        "",
    ]
    groups = rows.groupby(["backend", "dist", "L"])["roi"].agg(["median", "min"])
    cells = groups.apply(lambda row: f"{row['median']:.2f}x ({row['min']:.2f}x)", axis=1).unstack("L").fillna("")
    cells = cells.rename(columns=lambda length: f"L = {length:g}").reset_index()
    return [*lines, *_frame_lines(cells.astype(str)), ""]


def _bandwidth(rows: pd.DataFrame, drawn: dict[str, Path | None]) -> list[str]:
    lines = ["## Bandwidth against the ceiling", "", *_picture(drawn, "bandwidth", "GB/s against the ceiling")]
    rows = rows[rows["ceiling_share"].notna()]
    if rows.empty:
        return lines
    lines += [
        "The ceiling is a streaming read of the same byte count in the same mode and run. Best share of it by backend:",
        "",
    ]
    best = rows.loc[rows.groupby("backend")["ceiling_share"].idxmax()]
    table = pd.DataFrame({"backend": best["backend"], "workload": best["workload"]})
    table["share of the ceiling"] = best["ceiling_share"].map("{:.1%}".format)
    table["GB/s"] = best["gbps"].map("{:.4g}".format)
    table["MB"] = (best["bytes"] / 1e6).map("{:.4g}".format)
    table["largest MAE"] = best["backend"].map(rows.groupby("backend")["mae"].max()).map("{:.2g}".format)
    return [*lines, *_frame_lines(table), ""]


def _shares(decode: Table, rows: pd.DataFrame, drawn: dict[str, Path | None], steps: list[Step]) -> list[str]:
    lines = ["## Where a decode step's time goes", "", *_picture(drawn, "share", "share of the decode step by context")]
    if rows.empty:
        return lines
    lines += ["Projections and the MLP are no part of this step: shares are of the attention alone.", ""]
    shares = rows.pivot_table(index=["B", "context"], columns="stage", values="share")
    shares = shares.reindex(columns=[stage for stage in schema.STAGES if stage in shares])
    shares["residual"] = 1 - shares.sum(axis=1)
    ran = rows[rows["stage"] == "select"].groupby(["B", "context"])["ran"].first()
    text = shares.map("{:.1%}".format, na_action="ignore").assign(**{"select ran": ran}).reset_index()
    text = text.assign(B=text["B"].map("{:g}".format), context=text["context"].map("{:g}".format))
    lines += [*_frame_lines(text.fillna("")), ""]
    if steps:
        lines += ["With the kernel in place of packed SDPA:", "", *step_table(steps), ""]
    for step in entries(decode.facts, "steps"):
        read, paper = number(inner(step, "tokens_read_per_group").get("all")), number(step.get("tokens_by_the_paper"))
        dense = "" if step.get("sparse") else "; nothing is sparse yet"
        lines.append(
            f"- B = {plain(step.get('B'))}, context {plain(step.get('context'))}: {read:,.0f} tokens read per group "
            f"(paper: {paper:,.0f}){dense}"
        )
    return [*lines, ""]


def _gaps(bench: Table, decode: Table) -> list[str]:
    found = [f"- {plain(fault)}" for fault in bench.faults + decode.faults]
    missing = Counter((row["backend"], row["mode"]) for row in bench.rows if row["ran"] != row["backend"])
    found += [f"- `{plain(b)}` ({plain(m)}): {count} rows did not run as named" for (b, m), count in missing.items()]
    absent = inner(inner(bench.facts, "environment"), "peers_absent")
    for kind, reasons in (("workload", inner(bench.facts, "skipped")), ("peer", absent)):
        found += [f"- {kind} {plain(name)}: {plain(reason)}" for name, reason in reasons.items()]
    return ["## Not measured", "", *(found or ["Everything that was asked for ran."])]


def _picture(drawn: dict[str, Path | None], name: str, text: str) -> list[str]:
    path = drawn[name]
    return [NOTHING, ""] if path is None else [f"![{text}]({path.name})", ""]


def _frame_lines(frame: pd.DataFrame) -> list[str]:
    return table_lines(list(frame.columns), [[plain(cell) for cell in row] for row in frame.to_numpy()])
