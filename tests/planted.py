"""A whole honest result folder, as a run on a GPU writes it, and how faults are planted in one.

Every figure follows from a shape and a time, so that one changed cell is one contradiction.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nsa_sel.measure import schema
from nsa_sel.measure.files import read_csv, write_results
from nsa_sel.measure.judge.gpus import known
from nsa_sel.measure.run.bench import figure
from nsa_sel.measure.run.workload import Workload, expand

COMMIT = "0123456789ab"
LENGTHS = (64, 256, 1024)
BATCHES, CONTEXTS = (1, 8, 64), (4096, 16384, 65536)
FLOOR_MS = 0.004  # a launch
CLOCKS = {"sm": 1980, "mem": 2619}
Rows = list[dict[str, Any]]


def honest(
    folder: Path, speedup: float = 3.0, share: float = 0.4, device: str = "NVIDIA H100 80GB HBM3", sm: str = "90"
) -> None:
    """Write bench.csv, bench.json, decode.csv and decode.json into `folder`, for which `nsa-sel gate` says PASS.

    Args:
        speedup: of the kernel over the faster baseline, in every row. share: the selection's share of a decode step
            with packed SDPA. device, sm: the GPU, by which the ceilings are what its memory delivers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _bench(folder, speedup, device, sm)
    _decode(folder, speedup, share, device, sm)


def workloads() -> list[Workload]:
    """Return spans of every distribution at several lengths and sizes, and a model's blocks, plain and paged."""
    spans = {"dist": list(schema.DISTRIBUTIONS), "dtype": "bf16", "rows": [64, 256], "G": 2, "h": 4}
    spans |= {"Dk": 128, "Dv": 128, "L": list(LENGTHS), "S_kv": 4096}
    blocks = {"dist": "blocks", "dtype": "bf16", "B": [1, 16], "G": 4, "h": 16, "Dk": 192, "Dv": 128, "n": 16}
    blocks |= {"block_size": 64, "S_kv": 16384}
    return [
        *expand(spans | {"name": "plan-{dist}-L{L}-r{rows}"}),
        *expand(blocks | {"name": "nsa-paper-b{B}"}),
        *expand(blocks | {"name": "nsa-paper-paged-b{B}", "page_size": 64}),
    ]


def _bench(folder: Path, speedup: float, device: str, sm: str) -> None:
    rng = np.random.default_rng(0)
    ceiling = 0.8 * (known(device) or (sm, 1000.0))[1]
    rows: Rows = []
    facts: dict[str, Any] = {"workloads": {w.name: asdict(w) for w in workloads()}, "intervals": [], "clocks": []}
    facts |= {"anchors": [], "not_measured": [], "skipped": {}, "parity_failures": []}
    for w in workloads():
        for mode in ("eager", "graph"):
            fastest = (FLOOR_MS + w.call_bytes / (0.9 * ceiling) / 1e6) * (1 + 0.002 * rng.random())
            mine = fastest / min(1.0, speedup)  # nothing reads faster than the ceiling
            host = 4.0 if mode == "eager" else 1.0  # the host's part, the same for all
            base = mine * speedup
            times: dict[str, float | None] = {"cuda": mine, "triton": None, "sdpa": 1.2 * base, "sdpa_prepared": base}
            times["sdpa_gathered"] = max(0.6 * base, fastest)
            if w.dist == "blocks" and w.page_size is None:
                times["flex"] = 1.1 * mine
                anchor = {"workload": w.name, "backend": "flex", "mode": mode}
                anchor |= {"anchor_ms": 1.01 * 1.2 * base * host, "sdpa_ms": 1.2 * base * host}
                facts["anchors"].append(anchor)
            for name, ms in times.items():
                where = {"workload": w.name, "backend": name, "mode": mode}
                row: dict[str, Any] = dict.fromkeys(schema.BENCH_COLUMNS, "")
                row |= {c: getattr(w, c) for c in ("workload", "dist", "dtype", *schema.BENCH_SHAPE) if c != "workload"}
                row |= where | {"ran": "", "iters": 0, "bytes": w.call_bytes, "ceiling_gbps": figure(ceiling)}
                row |= {"device": device, "sm": sm, "commit": COMMIT}
                if ms is None:
                    facts["not_measured"].append(where | {"reason": "not installed"})
                else:
                    row |= {"ran": name, "iters": 50, "mae": figure(2e-4 * (1 + 0.1 * rng.random()))}
                    row |= {"max_err": figure(4e-3 * (1 + 0.1 * rng.random()))} | _times(ms * host)
                    facts["intervals"].append(where | {"ms_median_ci95": _interval(row), "calls": 8})
                rows.append(row)
            facts["clocks"].append({"workload": w.name, "mode": mode, "before": CLOCKS, "after": CLOCKS})
            facts["intervals"].append({"workload": w.name, "backend": "ceiling", "mode": mode} | {"calls": 8})
    write(folder / "bench.csv", figures(rows), facts | {"environment": _environment(device, sm)})


def figures(rows: Rows) -> Rows:
    """Return rows of bench.csv with every figure that follows from bytes and times worked out from them."""
    base = {
        (r["workload"], r["mode"]): float(r["ms_median"]) for r in rows if r["backend"] == "sdpa" and r["ms_median"]
    }
    found = []
    for row in rows:
        if row["ms_median"] not in ("", None):
            ms, ceiling = float(row["ms_median"]), float(row["ceiling_gbps"])
            rate = int(row["bytes"]) / ms / 1e6
            row = row | {"gbps": figure(rate), "ceiling_share": figure(rate / ceiling)}
            row |= {"speedup": figure(base[row["workload"], row["mode"]] / ms)}
        found.append(row)
    return found


def _decode(folder: Path, speedup: float, share: float, device: str, sm: str) -> None:
    rows: Rows = []
    facts: dict[str, Any] = {"steps": [], "clocks": [], "notes": []}
    for batch in BATCHES:
        for context in CONTEXTS:
            step = 0.2 * batch**0.5 * (1 + context / 40000)
            rest = max(0.97 - share, 0.01) / 4  # 3 % of the step lies between the stages
            ms = {(stage, schema.TORCH): rest * step for stage in schema.STAGES if stage != "select"}
            ms |= {("select", "sdpa"): share * step, ("step", "sdpa"): step}
            ms |= {("select", "cuda"): share * step / speedup, ("step", "cuda"): step * (1 - share + share / speedup)}
            intervals = {}
            for (stage, name), value in ms.items():
                whole = ms["step", "cuda" if name == "cuda" else "sdpa"]
                row = {"B": batch, "context": context, "stage": stage, **_times(value), "share": figure(value / whole)}
                rows.append(row | {"backend": name, "ran": name, "device": device, "sm": sm, "commit": COMMIT})
                intervals[f"{stage} {name}"] = _interval(row)
            fact = {"B": batch, "context": context, "ms_median_ci95": intervals, "sparse": True}
            facts["steps"].append(fact | {"tokens_read_per_group": {"all": 2047}, "tokens_by_the_paper": 2048})
            facts["clocks"].append({"B": batch, "context": context, "before": CLOCKS, "after": CLOCKS})
    write(folder / "decode.csv", rows, facts | {"environment": _environment(device, sm) | {"leave_out": []}})


def write(path: Path, rows: Rows, facts: dict[str, Any]) -> None:
    """Write a CSV file and its JSON as a run that finished does."""
    columns = schema.BENCH_COLUMNS if path.stem == "bench" else schema.DECODE_COLUMNS
    write_results(path, columns, rows, facts | {"finished": {"rows": len(rows)}})


def read(path: Path) -> tuple[Rows, dict[str, Any]]:
    """Return the rows of a CSV file, as text, and the JSON beside it."""
    header, lines = read_csv(path)
    rows: Rows = [dict(zip(header, line, strict=True)) for line in lines]
    return rows, json.loads(path.with_suffix(".json").read_text())


def alter(path: Path, change: Callable[[Rows, dict[str, Any]], Any], finished: bool = True) -> None:
    """Change cells and keys of what a run wrote; with `finished` its marker still counts the rows."""
    rows, facts = read(path)
    change(rows, facts)
    columns = schema.BENCH_COLUMNS if path.stem == "bench" else schema.DECODE_COLUMNS
    if finished and facts.get("finished"):
        facts["finished"] = {"rows": len(rows)}
    write_results(path, tuple(rows[0]) if rows else columns, rows, facts)


def _times(ms: float) -> dict[str, str]:
    return {"ms_median": figure(ms), "ms_p20": figure(ms * 0.99), "ms_p80": figure(ms * 1.015)}


def _interval(row: dict[str, Any]) -> list[float]:
    return [round(float(row["ms_median"]) * factor, 9) for factor in (0.997, 1.004)]


def _environment(device: str, sm: str) -> dict[str, Any]:
    return {
        "device": device,
        "sm": sm,
        "commit": COMMIT,
        "torch": "2.11.0",
        "driver": "580.12",
        "tf32": False,
        "seed": 0,
    }
