"""A whole honest result folder, as a run on a GPU writes it, and how faults are planted in one.

It is what `nsa-sel bench` and `nsa-sel decode` wrote here, on the CPU, with the cells changed that only a GPU can fill:
the device, its clocks and its times, and the rows of the kernel and of a peer, which are copies of another backend's.
"""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsa_sel.measure import schema
from nsa_sel.measure.files import csv_text, read_csv, write_results
from nsa_sel.measure.judge.gpus import known
from nsa_sel.measure.run.clock import figure
from tests.measure.commands import run

COMMIT = "0123456789ab"
CLOCKS = {"sm": 1980, "mem": 2619}
FLOOR_MS = 0.004  # a launch
PEER = "flex"
Rows = list[dict[str, Any]]
Facts = dict[str, Any]
_BLOCKS = 'dist = "blocks", dtype = "bf16", B = [1, 2], G = 4, h = 16, Dk = 192, Dv = 128, n = 16, block_size = 64'
SUITE = f"""workload = [
{{name = "plan-{{dist}}-L{{L}}-r{{rows}}", dist = ["few", "many", "mixed"], dtype = "bf16", rows = [8, 16], G = 2,\
 h = 4, Dk = 128, Dv = 128, L = [64, 256, 1024], S_kv = 2048}},
{{name = "nsa-paper-b{{B}}", {_BLOCKS}, S_kv = 2048}},
{{name = "nsa-paper-paged-b{{B}}", {_BLOCKS}, S_kv = 2048, page_size = 64}},
]"""


def honest(
    folder: Path, speedup: float = 3.0, share: float = 0.4, device: str = "NVIDIA H100 80GB HBM3", sm: str = "90"
) -> None:
    """Write bench.csv, bench.json, decode.csv and decode.json into `folder`, for which `nsa-sel gate` says PASS.

    Args:
        speedup: of the kernel over the faster baseline, in every row. share: the selection's share of a decode step
            with packed SDPA. device, sm: the GPU, by which the ceilings are what its memory delivers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _files(speedup, share, device, sm).items():
        (folder / name).write_text(text, encoding="utf-8")


@functools.cache
def measured_here() -> dict[str, tuple[Rows, Facts]]:
    """Return rows and JSON of `nsa-sel bench` and `nsa-sel decode`, run once in this process, on small workloads."""
    quick = ("--iters", 1, "--warmup", 0, "--device", "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "suite.toml").write_text(SUITE)
        names = ",".join(schema.HERE)
        run("bench", "--suite", folder / "suite.toml", "--backend", names, "--out", folder, *quick)
        run("decode", "--context", "1280,2048,4096", "--B", "1,2", "--out", folder, *quick)
        return {kind: read(folder / f"{kind}.csv") for kind in ("bench", "decode")}


@functools.cache
def _files(speedup: float, share: float, device: str, sm: str) -> dict[str, str]:
    found = {}
    for kind, filled in (
        ("bench", functools.partial(_bench, speedup)),
        ("decode", functools.partial(_decode, speedup, share)),
    ):
        rows, facts = filled(device, *copy.deepcopy(measured_here()[kind]))
        here = {"device": device, "sm": sm, "commit": COMMIT}
        rows = [row | here for row in rows]
        facts |= {"finished": {"rows": len(rows)}}
        facts["environment"] |= here | {"driver": "580.12", "mode": "graph"}
        found |= {f"{kind}.csv": csv_text(tuple(rows[0]), rows), f"{kind}.json": json.dumps(facts)}
    return found


def _bench(speedup: float, device: str, rows: Rows, facts: Facts) -> tuple[Rows, Facts]:
    ceiling = 0.02 * (known(device) or ("", 3000.0))[1]  # so few bytes keep no memory busy
    rows = [row for row in rows if row["backend"] != "cuda"]
    for new, old in (("cuda", "sdpa"), (PEER, "sdpa_gathered")):
        taken = [row for row in rows if row["backend"] == old and (new == "cuda" or "nsa-paper-b" in row["workload"])]
        rows += [row | {"backend": new, "ran": new} for row in taken]
    spans = {(one["workload"], one["backend"]): one for one in facts["intervals"]}
    facts |= {"intervals": [], "clocks": [], "anchors": []}
    facts["not_measured"] = [one for one in facts["not_measured"] if one["backend"] != "cuda"]
    filled = []
    for mode, host in (("eager", 4.0), ("graph", 1.0)):  # the host's part, the same for all
        for at, row in enumerate(rows):
            row = row | {"mode": mode, "ceiling_gbps": figure(ceiling)}
            named = {name: row[name] for name in ("workload", "backend", "mode")}
            if row["ran"]:
                fastest = (FLOOR_MS + int(row["bytes"]) / (0.9 * ceiling) / 1e6) * (1 + 1e-5 * at)
                mine = fastest / min(1.0, speedup)  # nothing reads faster than the ceiling
                base = mine * speedup
                ms = {"cuda": mine, "sdpa": 1.2 * base, "sdpa_prepared": base, PEER: 1.1 * mine}
                row |= {"iters": "50", **_times(host * ms.get(row["backend"], max(0.6 * base, fastest)))}
                found = spans.get((row["workload"], row["backend"]), {})
                facts["intervals"].append(found | named | {"ms_median_ci95": _interval(row), "calls": 8})
            if row["backend"] == PEER:
                facts["anchors"].append(named | {"anchor_ms": 1.01 * 1.2 * base * host, "sdpa_ms": 1.2 * base * host})
            filled.append(row)
        facts["clocks"] += [
            {"workload": w, "mode": mode, "before": CLOCKS, "after": CLOCKS} for w in facts["workloads"]
        ]
    return figures(filled), facts


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


def _decode(speedup: float, share: float, device: str, rows: Rows, facts: Facts) -> tuple[Rows, Facts]:
    rows += [row | {"backend": "cuda", "ran": "cuda"} for row in rows if row["backend"] == "sdpa"]
    for step in facts["steps"]:
        whole = 0.2 * step["B"] ** 0.5 * (1 + step["context"] / 40000)
        rest = max(0.97 - share, 0.01) / 4  # 3 % of the step lies between the stages
        parts = dict.fromkeys(schema.STAGES, rest) | {"select": share, "step": 1.0}
        kernel = {"select": share / speedup, "step": 1 - share + share / speedup}
        for row in rows:
            if (int(row["B"]), int(row["context"])) == (step["B"], step["context"]):
                of = kernel["step"] if row["backend"] == "cuda" else 1.0
                part = (kernel if row["backend"] == "cuda" else parts)[row["stage"]]
                row |= {**_times(part * whole), "share": figure(part / of)}
                step["ms_median_ci95"][f"{row['stage']} {row['backend']}"] = _interval(row)
        facts["clocks"].append({"B": step["B"], "context": step["context"], "before": CLOCKS, "after": CLOCKS})
    return rows, facts


def read(path: Path) -> tuple[Rows, Facts]:
    """Return the rows of a CSV file, as text, and the JSON beside it."""
    header, lines = read_csv(path)
    return [dict(zip(header, line, strict=True)) for line in lines], json.loads(path.with_suffix(".json").read_text())


def alter(path: Path, change: Callable[[Rows, Facts], Any], finished: bool = True) -> None:
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
