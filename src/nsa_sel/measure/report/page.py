"""The report of a folder: one Markdown page with its pictures, readable without the CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from nsa_sel.measure import schema
from nsa_sel.measure.files import FileError, read_json, write_atomically
from nsa_sel.measure.judge.gate import judge
from nsa_sel.measure.judge.rules import Rules, load_rules
from nsa_sel.measure.judge.tables import Table, read_bench, read_decode
from nsa_sel.measure.judge.threshold import markdown_table
from nsa_sel.measure.judge.trust import judged
from nsa_sel.measure.report import pictures
from nsa_sel.measure.report.record import environment_of

NOTHING = f"{schema.NOT_MEASURED}: the data holds nothing to draw here."


def write_report(folder: Path, rules: Rules | None = None) -> Path:
    """Write report.md and its pictures into `folder` from the bench.csv and decode.csv in it; returns the page.

    Raises:
        ValueError: neither file is there.
    """
    rules = rules or load_rules()
    bench, decode = read_bench(folder / "bench.csv"), read_decode(folder / "decode.csv")
    if bench.frame is None and decode.frame is None:
        raise ValueError(
            f"report: expected a bench.csv or a decode.csv in {folder}, got {'; '.join(bench.faults + decode.faults)}"
        )
    measured, steps = _measured(bench), _steps(decode)
    drawn = {
        "speedup": pictures.draw_speedup(measured, rules, folder / "speedup.png"),
        "bandwidth": pictures.draw_bandwidth(measured, folder / "bandwidth.png"),
        "share": pictures.draw_share(steps, rules, folder / "share.png"),
        "roofline": pictures.draw_roofline(measured, folder / "roofline.png"),
    }
    for name, path in drawn.items():
        if path is None:  # a picture of an earlier report must not stand beside this one
            (folder / f"{name}.png").unlink(missing_ok=True)
    lines = [
        *_head(folder, rules),
        *_speedups(measured, drawn),
        *_bandwidth(measured, drawn),
        *_shares(folder, steps, drawn),
    ]
    lines += [*_roofline(drawn), *_gaps(folder, bench, decode)]
    write_atomically(folder / "report.md", "\n".join(lines) + "\n")
    return folder / "report.md"


def _measured(table: Table) -> pd.DataFrame:
    """Return the rows to show: those that ran as named, in the mode that decides; the gate says what they are worth."""
    if table.frame is None:
        return pd.DataFrame(columns=[*schema.BENCH_COLUMNS, "line"])
    rows = judged(table.frame)
    return rows[(rows["ran"] == rows["backend"]) & (rows["ms_median"] > 0)]


def _steps(table: Table) -> pd.DataFrame:
    if table.frame is None:
        return pd.DataFrame(columns=[*schema.DECODE_COLUMNS, "line"])
    return table.frame[(table.frame["ran"] == table.frame["backend"]) & table.frame["share"].between(0, 1)]


def _head(folder: Path, rules: Rules) -> list[str]:
    judgement = judge(folder / "bench.csv", folder / "decode.csv", rules)
    table = pd.DataFrame(
        [
            {
                "gate": name,
                "verdict": gate.verdict,
                "value": "" if gate.value is None else f"{gate.value:.4g}",
                "why": gate.reason,
            }
            for name, gate in judgement.gates.items()
        ]
    )
    environment = environment_of(str(folder / "bench.csv")) or environment_of(str(folder / "decode.csv"))
    facts = [
        f"- {key}: {value}"
        for key, value in environment.items()
        if isinstance(value, (str, int, float, bool)) and value != ""
    ]
    return [
        f"# Measurements on {judgement.device or 'no single device'} (SM {judgement.sm or 'unknown'})",
        "",
        f"Decision for `{judgement.backend}`: **{judgement.verdict}**"
        + (f", from L = {judgement.min_l} on." if judgement.verdict == schema.PASS else "."),
        "",
        *markdown_table(table),
        "",
        *(f"- {remark}" for remark in judgement.remarks),
        "",
        "## Environment",
        "",
        *(facts or ["Unknown: no environment JSON lies beside the data."]),
        "",
    ]


def _speedups(rows: pd.DataFrame, drawn: dict[str, Path | None]) -> list[str]:
    lines = [
        "## Speed-up over packed SDPA, by L and distribution",
        "",
        *_picture(drawn, "speedup", "speed-up over L by distribution"),
    ]
    rows = rows[rows["speedup"].notna() & (rows["backend"] != schema.BASELINE)]
    if rows.empty:
        return lines
    lines += [
        "Lines are medians over the shapes, bands reach from the slowest to the fastest. Each cell: median (slowest).",
        "",
    ]
    groups = rows.groupby(["backend", "dist", "L"])["speedup"].agg(["median", "min"])
    cells = groups.apply(lambda row: f"{row['median']:.2f}x ({row['min']:.2f}x)", axis=1).unstack("L").fillna("")
    cells = cells.rename(columns=lambda length: f"L = {length:g}").reset_index()
    return [*lines, *markdown_table(cells.astype(str)), ""]


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
    table = pd.DataFrame(
        {
            "backend": best["backend"],
            "share of the ceiling": best["ceiling_share"].map("{:.1%}".format),
            "GB/s": best["gbps"].map("{:.4g}".format),
            "MB": (best["bytes"] / 1e6).map("{:.4g}".format),
            "workload": best["workload"],
            "largest MAE": rows.groupby("backend")["mae"]
            .max()
            .reindex(best["backend"])
            .map("{:.2g}".format)
            .to_numpy(),
        }
    )
    return [*lines, *markdown_table(table), ""]


def _shares(folder: Path, rows: pd.DataFrame, drawn: dict[str, Path | None]) -> list[str]:
    lines = ["## Where a decode step's time goes", "", *_picture(drawn, "share", "share of the decode step by context")]
    if rows.empty:
        return lines
    lines += ["Projections and the MLP are no part of this step: shares are of the attention alone.", ""]
    shares = rows.pivot_table(index=["B", "context"], columns="stage", values="share")
    shares = shares.reindex(columns=[stage for stage in schema.STAGES if stage in shares])
    shares["residual"] = 1 - shares.sum(axis=1)
    ran = (
        rows[rows["stage"] == "select"].groupby(["B", "context"])["ran"].agg(lambda names: "+".join(sorted(set(names))))
    )
    text = (
        shares.map(lambda value: "" if pd.isna(value) else f"{value:.1%}").assign(**{"select ran": ran}).reset_index()
    )
    text["B"], text["context"] = text["B"].map("{:g}".format), text["context"].map("{:g}".format)
    lines += [*markdown_table(text.fillna("")), ""]
    for step in _json(folder / "decode.json").get("steps", []):
        read, paper = step["tokens_read_per_group"]["all"], step["tokens_by_the_paper"]
        dense = "" if step["sparse"] else "; nothing is sparse yet"
        lines.append(
            f"- B = {step['B']}, context {step['context']:,}: {read:,.0f} tokens read per group "
            f"(paper: {paper:,}){dense}"
        )
    return [*lines, ""]


def _roofline(drawn: dict[str, Path | None]) -> list[str]:
    lines = ["## Roofline", "", *_picture(drawn, "roofline", "roofline")]
    return (
        lines if drawn["roofline"] is None else [*lines, "The compute roof was not measured, so it is not drawn.", ""]
    )


def _gaps(folder: Path, bench: Table, decode: Table) -> list[str]:
    lines = ["## Not measured", ""]
    found = [f"- {fault}" for fault in bench.faults + decode.faults]
    if bench.frame is not None:
        missing = bench.frame[bench.frame["ran"] != bench.frame["backend"]]
        for (backend, mode), group in missing.groupby(["backend", "mode"]):
            found.append(f"- `{backend}` ({mode}): {len(group)} rows did not run as named")
    data = _json(folder / "bench.json")
    found += [f"- workload {name}: {reason}" for name, reason in _table(data, "skipped").items()]
    found += [
        f"- peer {name}: {reason}" for name, reason in _table(_table(data, "environment"), "peers_absent").items()
    ]
    return [*lines, *(found or ["Everything that was asked for ran."])]


def _picture(drawn: dict[str, Path | None], name: str, text: str) -> list[str]:
    path = drawn[name]
    return [NOTHING, ""] if path is None else [f"![{text}]({path.name})", ""]


def _table(data: dict[str, Any], name: str) -> dict[str, Any]:
    found = data.get(name)
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except FileError:
        return {}
