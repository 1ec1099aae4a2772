"""The run in one file, summary.json: what every step came to, and every figure beside its target in targets.toml."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import FAIL, NOT_MEASURED, PASS, arguments, finish
from nsa_sel.measure.files import FileError, read_json, read_rows
from nsa_sel.measure.schema import BASELINES, HERE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Rows = list[dict[str, str]]
MB = 10**6
SIZES = (512, 256, 64, 16)  # MB of a call


def rows_of(path: Path) -> Rows:
    """Return the rows of a CSV file; none where it is missing."""
    return read_rows(path) if path.exists() else []


def timed(rows: Rows, mode: str = "graph") -> Rows:
    """Return the rows whose backend ran and was timed, on a GPU, in one mode."""
    return [r for r in rows if r["ran"] == r["backend"] and r["ms_median"] and r["mode"] == mode and r["sm"].isdigit()]


def times(rows: Rows, *backends: str) -> dict[str, float]:
    """Return the smallest time of some backends by workload; of all that are no part of this package without names."""
    found: dict[str, float] = {}
    for row in rows:
        if row["backend"] in backends or (not backends and row["backend"] not in HERE):
            found[row["workload"]] = min(found.get(row["workload"], float("inf")), float(row["ms_median"]))
    return found


def over(base: dict[str, float], mine: dict[str, float], prefix: str = "") -> list[float]:
    """Return how much faster `mine` is than `base` on each workload that both have."""
    return [base[name] / mine[name] for name in mine if name in base and name.startswith(prefix)]


def figures(out: Path) -> dict[str, float | None]:
    """Return every figure by its name in targets.toml; None where it was not measured."""
    bench, again, ceilings = (rows_of(out / name) for name in ("bench.csv", "again.csv", "ceilings.csv"))
    graph = timed(bench)
    kernel = [row for row in graph if row["backend"] == "cuda"]
    found: dict[str, float | None] = {}
    above = float("inf")
    for size in SIZES:
        near = [r for r in kernel if int(r["h"]) <= 16 and size * MB <= float(r["bytes"]) < above]
        shares = [float(row["ceiling_share"]) for row in near if row["ceiling_share"]]
        found[f"share of the ceiling from {size} MB"] = min(shares, default=None)
        above = size * MB
    for name, file, rows in (("nsa-paper-b1", "bench.json", graph), ("nsa-paper-paged-b1", "again.json", timed(again))):
        ms, empty = times(rows, "cuda").get(name), empty_node(ceilings, calls_of(out / file, name))
        beyond = None if ms is None or empty is None else (ms - empty) * 1e3
        found[f"us beyond an empty graph node, {name}"] = beyond
    host = {row["what"]: float(row["ms_median"]) for row in ceilings if row["mode"] == "host" and row["ms_median"]}
    call, smallest = host.get("eager call of selection_attention"), host.get("eager call of torch.neg")
    found["us of an eager call beyond torch.neg"] = (call - smallest) * 1e3 if call and smallest else None
    mine = times(graph, "cuda")
    for what, values in (
        ("the faster baseline, plan", over(times(graph, *BASELINES), mine, "plan-")),
        ("the best peer", over(times(graph), mine)),
    ):
        found[f"speed-up over {what}, geometric mean"] = statistics.geometric_mean(values) if values else None
        found[f"speed-up over {what}, smallest"] = min(values, default=None)
    ran = [row for mode in ("eager", "graph", "streams2") for row in timed(bench, mode) if row["backend"] == "cuda"]
    found["largest MAE"] = max((float(row["mae"]) for row in ran if int(row["L"]) >= 16), default=None)
    moved = [abs(ratio - 1) for ratio in over(times(timed(again), "cuda"), mine)]
    found["change from run to run"] = max(moved, default=None)
    return found


def calls_of(path: Path, workload: str) -> int | None:
    """Return how many calls the graph of a workload's kernel rows held: its launch is spread over them."""
    try:
        intervals = read_json(path).get("intervals", [])
    except FileError:
        return None
    mine = [one for one in intervals if (one["workload"], one["backend"], one["mode"]) == (workload, "cuda", "graph")]
    return mine[0]["calls"] if mine else None


def empty_node(ceilings: Rows, nodes: int | None) -> float | None:
    """Return the milliseconds of one empty kernel in a graph of as many nodes, or None."""
    found = [r for r in ceilings if r["what"] == "empty kernel" and r["nodes"] == str(nodes) and r["ms_median"]]
    return float(found[0]["ms_median"]) if found else None


def judged(found: dict[str, float | None], targets: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return every figure beside its target: NOT MEASURED where there is none, FAIL where it misses."""
    reach = []
    for what, target in targets.items():
        value = found[what]
        ((side, limit),) = target.items()
        good = value is not None and (value >= limit if side == "at_least" else value <= limit)
        verdict = NOT_MEASURED if value is None else PASS if good else FAIL
        reach.append({"what": what, "value": value, "reach": f"{side.replace('_', ' ')} {limit:g}", "verdict": verdict})
    return reach


def main() -> None:
    """Write summary.json and print the figures; one that misses its target is no broken run."""
    options = arguments(__doc__)
    out = options.out
    markers = sorted((out / "steps").glob("*.json"), key=lambda path: path.stat().st_mtime)
    steps = {one["step"]: one for one in map(read_json, markers) if "step" in one and one["step"] != "summary"}
    targets = tomllib.loads(Path(__file__).with_name("targets.toml").read_text(encoding="utf-8"))
    reach = judged(figures(out), targets)
    environment = read_json(out / "environment.json") if (out / "environment.json").exists() else {}
    data = {"dry": options.dry, "environment": environment, "reach": reach, "steps": steps}
    (out / "summary.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for one in reach:
        value = "" if one["value"] is None else f"{one['value']:.4g}"
        print(f"{one['verdict']:>12}  {one['what']}: {value} ({one['reach']})")
    reached = sum(one["verdict"] == PASS for one in reach)
    finish(False, options.dry, f"{reached} of {len(reach)} figures reached")


if __name__ == "__main__":
    main()
