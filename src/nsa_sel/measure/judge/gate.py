"""The gates: PASS, FAIL or NOT MEASURED from the CSV files alone. Missing or contradictory data is never a pass."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_sel.measure import schema
from nsa_sel.measure.judge.rules import Rules
from nsa_sel.measure.judge.tables import Row, Table, inner, read_bench, read_decode, where
from nsa_sel.measure.judge.threshold import Threshold, find_threshold
from nsa_sel.measure.judge.trust import bench_faults, bench_remarks, compare
from nsa_sel.measure.judge.trust_decode import Step, decode_faults, decode_remarks, steps_of


@dataclass(frozen=True)
class Gate:
    """One gate's verdict, the value it compared (None where there is none), why, and the rows that decided."""

    verdict: str
    value: float | None
    reason: str
    rows: list[Row] = field(default_factory=list, repr=False, compare=False)


@dataclass(frozen=True)
class Judgement:
    """The three gates of one device, their common verdict, and what the decision record needs besides."""

    verdict: str
    min_l: int | None
    gates: dict[str, Gate]
    backend: str
    device: str
    sm: str
    rules: Rules
    sources: dict[str, str]
    remarks: list[str]
    threshold: Threshold | None
    steps: list[Step]
    environment: dict[str, Any]  # of the benchmark, else of the decode step, as its JSON has it

    @property
    def exit_code(self) -> int:
        """Return 0 for PASS, 1 for FAIL, 2 for NOT MEASURED."""
        return schema.EXIT_CODES[self.verdict]

    def to_json(self) -> dict[str, Any]:
        """Return `{"verdict", "min_l", "gates": {name: {"verdict", "value", "reason"}}}` with plain values."""
        plain = ("verdict", "value", "reason")
        gates = {name: {key: getattr(gate, key) for key in plain} for name, gate in self.gates.items()}
        return {"verdict": self.verdict, "min_l": self.min_l, "gates": gates}


def judge(bench: str | Path | None, decode: str | Path | None, rules: Rules, backend: str = "cuda") -> Judgement:
    """Judge `backend` on the data of a bench.csv and a decode.csv.

    share: the smallest over B of the median over sparse contexts of the selection's share of the step with packed
    SDPA; roi: a threshold exists at the margin over the faster baseline; stability: the largest MAE. Any NOT MEASURED
    makes the whole NOT MEASURED, else any FAIL makes it FAIL.
    """
    bench_table, decode_table = read_bench(bench), read_decode(decode)
    across = _apart(bench_table, decode_table)
    bench_reasons = across + bench_faults(bench_table, rules, backend)
    decode_reasons = across + decode_faults(decode_table, rules, backend)
    found, steps = None, list[Step]()
    if bench_reasons:
        roi = stability = Gate(schema.NOT_MEASURED, None, "; ".join(bench_reasons))
    else:
        found = find_threshold(compare(bench_table, backend), rules.roi_margin, rules.stability_max_mae)
        roi = Gate(found.verdict, found.min_l, found.reason, found.rows)
        stability = _stability([row for row in bench_table.rows if row["backend"] == backend], rules)
    if decode_reasons:
        share = Gate(schema.NOT_MEASURED, None, "; ".join(decode_reasons))
    else:
        steps = steps_of(decode_table, backend)
        share = _share([step for step in steps if step.context > rules.trust_dense_until], rules)
    gates = {"share": share, "roi": roi, "stability": stability}
    device, sm = _device(bench_table, decode_table)
    remarks = [] if bench_reasons else bench_remarks(bench_table)
    remarks += [] if decode_reasons else decode_remarks(decode_table, rules, backend)
    verdicts = [gate.verdict for gate in gates.values()]
    return Judgement(
        verdict=next((one for one in (schema.NOT_MEASURED, schema.FAIL) if one in verdicts), schema.PASS),
        min_l=found.min_l if found else None,
        gates=gates,
        backend=backend,
        device=device,
        sm=sm,
        rules=rules,
        sources={"bench": bench_table.path, "decode": decode_table.path},
        remarks=remarks,
        threshold=found,
        steps=steps,
        environment=inner(bench_table.facts, "environment") or inner(decode_table.facts, "environment"),
    )


def _share(steps: list[Step], rules: Rules) -> Gate:
    batches = dict.fromkeys(step.B for step in steps)
    by_batch = {b: statistics.median(step.share for step in steps if step.B == b) for b in batches}
    batch, value = min(by_batch.items(), key=lambda item: item[1])
    # Written so that NaN fails, although no NaN comes this far.
    verdict = schema.PASS if value >= rules.share_min else schema.FAIL
    each = ", ".join(f"B={b:g}: {share:.3g}" for b, share in by_batch.items())
    best = max(steps, key=lambda step: step.speedup)
    reason = (
        f"on packed SDPA the selection takes {value:.3g} of the step at B={batch:g} "
        f"(smallest over B of the median over contexts; {each}), asked: at least {rules.share_min:g}; "
        f"with the kernel the whole step is at best {best.speedup:.3g}x at B={best.B:g}, context {best.context:g} "
        f"(share and selection make it {best.expected:.3g}x)"
    )
    rows = [step.rows["select", schema.BASELINE] for step in steps if step.B == batch]
    return Gate(verdict, float(f"{value:.7g}"), reason, rows)


def _stability(mine: list[Row], rules: Rules) -> Gate:
    # Every mode counts: a wrong result is wrong also where another mode's time decides.
    value = max(row["mae"] for row in mine)
    worst = [row for row in mine if row["mae"] == value]
    verdict = schema.PASS if value <= rules.stability_max_mae else schema.FAIL
    reason = f"the largest MAE is {value:.3g}, asked: at most {rules.stability_max_mae:g}; {where(worst)}"
    return Gate(verdict, value if math.isfinite(value) else None, reason, worst)


def _apart(bench: Table, decode: Table) -> list[str]:
    """Return what says that the two files are not of one GPU and one state of the code."""
    found = []
    for columns, what in ((("device", "sm"), "mixed devices"), (("commit",), "two commits")):
        sets = [{" sm ".join(row[c] for c in columns) for row in table.rows} for table in (bench, decode)]
        first, second = (" and ".join(sorted(held)) for held in sets)
        if first and second and first != second:
            found.append(f"{what}: bench holds {first}, decode holds {second}")
    return found


def _device(*tables: Table) -> tuple[str, str]:
    named = [{(row["device"], row["sm"]) for row in table.rows} for table in tables]
    return next((one for found in named if len(found) == 1 for one in found), ("", ""))
