"""The gates: PASS, FAIL or NOT MEASURED from the CSV files alone. Missing or contradictory data is never a pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from nsa_sel.measure import schema
from nsa_sel.measure.judge.rules import Rules
from nsa_sel.measure.judge.tables import Table, read_bench, read_decode, summary, where
from nsa_sel.measure.judge.threshold import Threshold, find_threshold
from nsa_sel.measure.judge.trust import bench_faults, bench_remarks, judged
from nsa_sel.measure.judge.trust_decode import decode_faults, decode_remarks, step_rows


@dataclass(frozen=True)
class Gate:
    """One gate's verdict, the value it compared (None where there is none), why, and the rows that decided."""

    verdict: str
    value: float | None
    reason: str
    rows: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False, compare=False)


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

    @property
    def exit_code(self) -> int:
        """Return 0 for PASS, 1 for FAIL, 2 for NOT MEASURED."""
        return schema.EXIT_CODES[self.verdict]

    def to_json(self) -> dict[str, Any]:
        """Return `{"verdict", "min_l", "gates": {name: {"verdict", "value", "reason"}}}` with plain values."""
        gates = {
            name: {"verdict": gate.verdict, "value": gate.value, "reason": gate.reason}
            for name, gate in self.gates.items()
        }
        return {"verdict": self.verdict, "min_l": self.min_l, "gates": gates}


def judge(bench: str | Path | None, decode: str | Path | None, rules: Rules, backend: str = "cuda") -> Judgement:
    """Judge `backend` on the data of a bench.csv and a decode.csv.

    share: the smallest over B of the median over contexts of the select stage's share; roi: a threshold exists at the
    margin; stability: the largest MAE. Any NOT MEASURED makes the whole NOT MEASURED, else any FAIL makes it FAIL.
    """
    bench_table, decode_table = read_bench(bench), read_decode(decode)
    bench_reasons = bench_faults(bench_table, rules, backend)
    decode_reasons = decode_faults(decode_table, rules, backend)
    across = _other_device(bench_table, decode_table)
    bench_reasons, decode_reasons = across + bench_reasons, across + decode_reasons

    found = None
    if bench_reasons:
        roi = stability = Gate(schema.NOT_MEASURED, None, summary(bench_reasons))
    else:
        frame = bench_table.rows
        mine, deciding = frame[frame["backend"] == backend], judged(frame)
        found = find_threshold(deciding[deciding["backend"] == backend], rules.roi_margin, rules.stability_max_mae)
        roi = Gate(found.verdict, found.min_l, found.reason, found.rows)
        stability = _stability(mine, rules)
    share = (
        Gate(schema.NOT_MEASURED, None, summary(decode_reasons))
        if decode_reasons
        else _share(decode_table, rules, backend)
    )

    gates = {"share": share, "roi": roi, "stability": stability}
    device, sm = _device(bench_table, decode_table)
    remarks = [] if bench_reasons else bench_remarks(bench_table)
    remarks += [] if decode_reasons else decode_remarks(decode_table, backend)
    return Judgement(
        verdict=_overall(gates),
        min_l=found.min_l if found else None,
        gates=gates,
        backend=backend,
        device=device,
        sm=sm,
        rules=rules,
        sources={"bench": bench_table.path, "decode": decode_table.path},
        remarks=remarks,
        threshold=found,
    )


def _overall(gates: dict[str, Gate]) -> str:
    verdicts = {gate.verdict for gate in gates.values()}
    for verdict in (schema.NOT_MEASURED, schema.FAIL):
        if verdict in verdicts:
            return verdict
    return schema.PASS


def _share(table: Table, rules: Rules, backend: str) -> Gate:
    rows = step_rows(table.rows, backend)
    selecting = rows[rows["stage"] == "select"]
    by_batch = selecting.groupby("B")["share"].median()
    batch, value = by_batch.idxmin(), float(by_batch.min())
    # Written so that NaN fails, although no NaN comes this far.
    verdict = schema.PASS if value >= rules.share_min else schema.FAIL
    each = ", ".join(f"B={b:g}: {share:.3g}" for b, share in by_batch.items())
    reason = (
        f"the selection takes {value:.3g} of the step at B={batch:g} "
        f"(smallest over B of the median over contexts; {each}), "
        f"asked: at least {rules.share_min:g}"
    )
    return Gate(verdict, value, reason, selecting[selecting["B"] == batch])


def _stability(mine: pd.DataFrame, rules: Rules) -> Gate:
    # Every mode counts: a wrong result is wrong also where another mode's time decides.
    worst = mine[mine["mae"] == mine["mae"].max()]
    value = float(mine["mae"].max())
    verdict = schema.PASS if value <= rules.stability_max_mae else schema.FAIL
    reason = f"the largest MAE is {value:.3g}, asked: at most {rules.stability_max_mae:g}; {where(worst)}"
    return Gate(verdict, value if math.isfinite(value) else None, reason, worst)


def _other_device(bench: Table, decode: Table) -> list[str]:
    if bench.frame is None or decode.frame is None:
        return []
    devices = [" and ".join(sorted(set(table.rows["device"] + " sm " + table.rows["sm"]))) for table in (bench, decode)]
    return [] if devices[0] == devices[1] else [f"mixed devices: bench holds {devices[0]}, decode holds {devices[1]}"]


def _device(bench: Table, decode: Table) -> tuple[str, str]:
    for table in (bench, decode):
        if table.frame is not None and table.rows["device"].nunique() == 1:
            return str(table.rows["device"].iloc[0]), str(table.rows["sm"].iloc[0])
    return "", ""
