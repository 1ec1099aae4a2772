"""The round in one file, round.json: what every step came to, and the figures beside those to reach."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import FAIL, NOT_MEASURED, PASS, arguments, finish

Rows = list[dict[str, str]]
MB = 10**6
SHARES = ((512 * MB, 0.95), (256 * MB, 0.92), (64 * MB, 0.85), (16 * MB, 0.75))  # bytes of a call, share of the ceiling
OWN = ("cuda", "triton", "sdpa", "sdpa_gathered")


def read_rows(path: Path) -> Rows:
    """Return the rows of a CSV file; none where it is missing."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def timed(rows: Rows, mode: str = "graph") -> Rows:
    """Return the rows whose backend ran and was timed, on a GPU, in one mode."""
    return [
        row
        for row in rows
        if row["ran"] == row["backend"] and row["ms_median"] and row["mode"] == mode and row["sm"].isdigit()
    ]


def of(rows: Rows, backend: str) -> dict[str, dict[str, str]]:
    """Return one backend's rows by workload."""
    return {row["workload"]: row for row in rows if row["backend"] == backend}


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean of numbers above 0.

    >>> geometric_mean([2.0, 8.0])
    4.0
    """
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def judged(what: str, reach: str, value: float | None, good: bool, note: str = "") -> dict[str, Any]:
    """Return one figure beside what it is to reach; None is NOT MEASURED."""
    if value is None or math.isnan(value):
        return {"what": what, "reach": reach, "value": None, "verdict": NOT_MEASURED, "note": note}
    verdict = PASS if good else FAIL
    return {"what": what, "reach": reach, "value": float(f"{value:.4g}"), "verdict": verdict, "note": note}


def at_least(what: str, value: float | None, floor: float, note: str = "") -> dict[str, Any]:
    """Judge a figure that is to be large."""
    return judged(what, f">= {floor:g}", value, value is not None and value >= floor, note)


def at_most(what: str, value: float | None, limit: float, note: str = "") -> dict[str, Any]:
    """Judge a figure that is to be small."""
    return judged(what, f"<= {limit:g}", value, value is not None and value <= limit, note)


def shares(bench: Rows) -> list[dict[str, Any]]:
    """The smallest share of the ceiling among calls of each size, up to 16 heads."""
    mine = [row for row in of(timed(bench), "cuda").values() if int(row["h"]) <= 16 and row["ceiling_share"]]
    found = []
    above = math.inf
    for size, floor in SHARES:
        here = {r["workload"]: float(r["ceiling_share"]) for r in mine if size <= float(r["bytes"]) < above}
        worst = min(here, key=lambda name: here[name]) if here else None
        what = f"share of the ceiling from {size // MB} MB"
        found.append(at_least(what, here[worst] if worst else None, floor, f"smallest: {worst}" if worst else ""))
        above = size
    return found


def latency(bench: Rows, again: Rows, ceilings: Rows) -> list[dict[str, Any]]:
    """The NSA paper's step at B = 1 beyond an empty graph node, and an eager call beyond PyTorch's smallest, in us."""
    measured = [row for row in ceilings if row["ms_median"]]
    # As many nodes as the benchmark's graph has calls: the launch of the graph itself is spread over them alike.
    nodes = [float(row["ms_median"]) for row in measured if row["what"] == "empty kernel" and row["nodes"] == "16"]
    host = {row["what"]: float(row["ms_median"]) for row in measured if row["mode"] == "host"}
    cold = of(timed(bench), "cuda").get("nsa-paper-b1")
    paged = of(timed(again), "cuda").get("nsa-paper-paged-b1")

    def beyond(row: dict[str, str] | None) -> float | None:
        return (float(row["ms_median"]) - nodes[0]) * 1e3 if row and nodes else None

    warm = beyond(cold)
    if warm is not None and warm > 3.0:
        warm = None  # every replay starts from a cold L2: what is not fast enough so may be with warm metadata
    note = "measured with cold metadata, which is harder"
    call, smallest = host.get("eager call of selection_attention"), host.get("eager call of torch.neg")
    return [
        at_most("us beyond an empty node, NSA paper B=1", warm, 3.0, note),
        at_most("us beyond an empty node, NSA paper B=1, all cold", beyond(cold), 3.8),
        at_most("us beyond an empty node, NSA paper B=1, all cold, paged", beyond(paged), 3.8),
        at_most("us of an eager call beyond torch.neg", (call - smallest) * 1e3 if call and smallest else None, 5.0),
    ]


def speed_ups(bench: Rows) -> list[dict[str, Any]]:
    """Against packed SDPA over the plan's matrix, and against the best peer wherever one ran."""
    rows = timed(bench)
    mine, base = of(rows, "cuda"), of(rows, "sdpa")
    against = {n: float(base[n]["ms_median"]) / float(r["ms_median"]) for n, r in mine.items() if n in base}
    plan = [value for name, value in against.items() if name.startswith("plan-")]
    best: dict[str, float] = {}
    for row in rows:
        if row["backend"] not in OWN:
            best[row["workload"]] = min(best.get(row["workload"], math.inf), float(row["ms_median"]))
    peers = [ms / float(mine[name]["ms_median"]) for name, ms in best.items() if name in mine]
    names = ", ".join(sorted({row["backend"] for row in rows} - set(OWN)))
    note = f"peers: {names}" if names else "no peer ran"
    return [
        at_least("speed-up over packed SDPA, plan, geometric mean", geometric_mean(plan) if plan else None, 5.0),
        at_least("speed-up over packed SDPA, plan, smallest", min(plan, default=None), 1.2),
        at_least("speed-up over the best peer, geometric mean", geometric_mean(peers) if peers else None, 1.3, note),
        at_least("speed-up over the best peer, smallest", min(peers, default=None), 1.0, note),
    ]


def stability(bench: Rows, again: Rows, steps: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors, what changes from run to run, parity and the sanitizer."""
    ran = [row for mode in ("eager", "graph", "streams2") for row in timed(bench, mode) if row["backend"] == "cuda"]
    errors = [float(row["mae"]) for row in ran if int(row["L"]) >= 16]
    first, second = of(timed(bench), "cuda"), of(timed(again), "cuda")
    moved = [abs(float(second[n]["ms_median"]) / float(first[n]["ms_median"]) - 1) for n in second if n in first]
    found = [at_most("largest MAE", max(errors, default=None), 1e-3)]
    found.append(at_most("change from run to run", max(moved, default=None), 0.1, f"{len(moved)} shapes"))
    proofs = {"parity": "common suite on the GPU", "sanitizer": "memcheck and racecheck", "twins": "primitive twins"}
    for name, what in proofs.items():
        status = steps.get(name, {}).get("status")
        verdict = status if status in (PASS, FAIL) else NOT_MEASURED
        reason = steps.get(name, {}).get("reason", "")
        found.append({"what": what, "reach": "all", "value": None, "verdict": verdict, "note": reason})
    return found


def main() -> None:
    """Write round.json and print the figures; it fails on nothing, for figures out of reach are no broken round."""
    options = arguments(__doc__)
    out = options.out
    markers = sorted((out / "steps").glob("*.json"), key=lambda path: path.stat().st_mtime)
    read = [json.loads(path.read_text(encoding="utf-8")) for path in markers]
    steps = {one["step"]: one for one in read if "step" in one and one["step"] != "summary"}
    bench, again, ceilings = (read_rows(out / name) for name in ("bench.csv", "again.csv", "ceilings.csv"))
    reach = [*shares(bench), *latency(bench, again, ceilings), *speed_ups(bench), *stability(bench, again, steps)]
    environment = json.loads((out / "environment.json").read_text()) if (out / "environment.json").exists() else {}
    data = {"dry": options.dry, "environment": environment, "reach": reach, "steps": steps}
    (out / "round.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for one in reach:
        value = "" if one["value"] is None else f"{one['value']:g}"
        print(f"{one['verdict']:>12}  {one['what']}: {value} ({one['reach']}) {one['note']}")
    reached = sum(one["verdict"] == PASS for one in reach)
    finish(False, options.dry, f"{reached} of {len(reach)} figures reached")


if __name__ == "__main__":
    main()
