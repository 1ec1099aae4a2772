"""Whether a decode.csv can be believed, and the steps that decide."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nsa_sel.measure import schema
from nsa_sel.measure.judge import checks
from nsa_sel.measure.judge.rules import Rules
from nsa_sel.measure.judge.tables import Row, Table, entries, inner, number, over, some, where

STEP_KEYS = ("B", "context")


@dataclass(frozen=True)
class Step:
    """One decode step with packed SDPA as the selection's backend, and beside it the one with the kernel."""

    B: float
    context: float
    rows: dict[tuple[str, str], Row]  # by stage and backend
    backend: str

    def ms(self, stage: str, backend: str) -> float:
        """Median of a stage, NaN where it has no row."""
        return float(self.rows.get((stage, backend), {}).get("ms_median", math.nan))

    @property
    def share(self) -> float:
        """The selection's share of the step before any kernel, from the times."""
        return over(self.ms("select", schema.BASELINE), self.ms(schema.STEP, schema.BASELINE))

    @property
    def selection(self) -> float:
        """How much faster the kernel is than packed SDPA at the selection of this step."""
        return over(self.ms("select", schema.BASELINE), self.ms("select", self.backend))

    @property
    def speedup(self) -> float:
        """How much faster the whole step is with the kernel."""
        return over(self.ms(schema.STEP, schema.BASELINE), self.ms(schema.STEP, self.backend))

    @property
    def expected(self) -> float:
        """What share and selection make of the whole step (Amdahl)."""
        return over(1.0, 1 - self.share + over(self.share, self.selection))

    @property
    def accounted(self) -> float:
        """What the stages make up of the step with packed SDPA."""
        stages = [self.ms(s, schema.BASELINE if s == "select" else schema.TORCH) for s in schema.STAGES]
        return over(sum(stages), self.ms(schema.STEP, schema.BASELINE))


def steps_of(table: Table, backend: str) -> list[Step]:
    """Return the steps of a file in their order."""
    found: dict[tuple[float, float], dict[tuple[str, str], Row]] = {}
    for row in table.rows:
        found.setdefault((row["B"], row["context"]), {})[row["stage"], row["backend"]] = row
    return [Step(b, context, rows, backend) for (b, context), rows in found.items()]


def decode_faults(table: Table, rules: Rules, backend: str) -> list[str]:
    """Return every reason why `table` does not show the selection's share; an empty list where it does."""
    if not table.readable:
        return table.faults
    named = (schema.BASELINE, backend, schema.TORCH)
    rows = table.rows
    claims = [row for row in rows if row["backend"] in named or row["ran"] or row["ms_median_text"]]
    steps = steps_of(table, backend)
    found = [
        *table.faults,
        *checks.run_faults(table),
        *_stages(rows, backend),
        *checks.did_not_run([row for row in rows if row["backend"] in named]),
        *checks.device_faults(rows),
        *checks.number_faults(claims, schema.DECODE_COUNTS, schema.DECODE_FIGURES),
        *checks.time_faults(claims, rules, tight=lambda row: True),
        *_grid(rows, steps, backend),
        *_shares(claims, steps, rules),
        *_accounts(steps, rules),
        *_patterns(rows, rules),
        *_beside(table, steps),
        *checks.clock_faults(table, STEP_KEYS, ((step.B, step.context) for step in steps), rules),
    ]
    return table.named(found)


def decode_remarks(table: Table, rules: Rules, backend: str) -> list[str]:
    """Return what is odd about a believable file without deciding anything: for the reader of the record."""
    dense = [row for row in table.rows if row["context"] <= rules.trust_dense_until]
    return [f"{table.name}: nothing is sparse yet and nothing decides at: {where(dense)}"] if dense else []


def _stages(rows: list[Row], backend: str) -> Iterator[str]:
    yield from some(rows, lambda r: r["stage"] not in (*schema.STAGES, schema.STEP), "unknown stage {stage:.40}")
    selecting = [row["backend"] for row in rows if row["stage"] == "select"]
    for name in (schema.BASELINE, backend):
        if name not in selecting:
            held = ", ".join(sorted(set(selecting))) or "none"
            yield f"no select stage of backend {name} (it holds {held})"


def _grid(rows: list[Row], steps: list[Step], backend: str) -> Iterator[str]:
    """Every B at every context, every stage once: a step without a stage makes the others' shares look larger."""
    key = operator.itemgetter(*STEP_KEYS, "stage", "backend")
    seen = Counter(map(key, rows))
    again = "the same stage stands more than once, and nothing says which holds"
    yield from some(rows, lambda r: seen[key(r)] > 1, again)
    needed = [(s, schema.TORCH) for s in schema.STAGES if s != "select"]
    needed += [(s, name) for s in ("select", schema.STEP) for name in (schema.BASELINE, backend)]
    for step in steps:
        if missing := [f"{stage} ({name})" for stage, name in needed if (stage, name) not in step.rows]:
            yield f"stage {', '.join(missing)} missing at B={step.B:g}, context={step.context:g}"
            break
    contexts = {step.context for step in steps if not math.isnan(step.context)}
    for batch in dict.fromkeys(step.B for step in steps):
        if absent := sorted(contexts - {step.context for step in steps if step.B == batch}):
            listed = ", ".join(f"{context:g}" for context in absent)
            yield f"B={batch:g} not measured at context {listed}, where another B was"


def _shares(claims: list[Row], steps: list[Step], rules: Rules) -> Iterator[str]:
    yield from some(claims, lambda r: r["share"] < 0 or r["share"] > 1, "share is no fraction of the step ({share:g})")
    for step in steps:
        for (stage, name), row in step.rows.items():
            whole = step.ms(schema.STEP, schema.BASELINE if name == schema.TORCH else name)
            if row["ms_median"] > 0 and abs(row["share"] * whole / row["ms_median"] - 1) > rules.trust_speedup_off:
                true = over(row["ms_median"], whole)
                yield f"share {row['share']:g} of {stage} is off the times beside it ({true:.4g}): {where([row])}"
                return


def _accounts(steps: list[Step], rules: Rules) -> Iterator[str]:
    for step in steps:
        at = f"at B={step.B:g}, context={step.context:g}"
        if step.accounted > rules.trust_share_sum:
            yield f"the stages take more than their step: {step.accounted:.3g} of it {at}"
            break
        if 1 - step.accounted > rules.trust_residual:
            yield f"a large residual: no stage accounts for {1 - step.accounted:.1%} of the step {at}"
            break
    for step in steps:
        if abs(over(step.speedup, step.expected) - 1) > rules.trust_amdahl_off:
            told = f"{step.speedup:.3g}x, share and selection make it {step.expected:.3g}x"
            yield f"the step's speed-up does not follow ({told}) at B={step.B:g}, context={step.context:g}"
            break
    for batch in dict.fromkeys(step.B for step in steps):
        if all(step.context <= rules.trust_dense_until for step in steps if step.B == batch):
            yield f"dense contexts only at B={batch:g}: up to {rules.trust_dense_until:g} tokens nothing is sparse"


def _patterns(rows: list[Row], rules: Rules) -> Iterator[str]:
    for stage, name in dict.fromkeys((row["stage"], row["backend"]) for row in rows):
        mine = [row for row in rows if (row["stage"], row["backend"]) == (stage, name)]
        yield from checks.alike_faults(mine, schema.TIMES, rules, operator.itemgetter(*STEP_KEYS))
    whole = [row for row in rows if row["stage"] == schema.STEP]
    for key, other in (STEP_KEYS, STEP_KEYS[::-1]):
        same, size = (lambda row, key=key: (row["backend"], row[key])), (lambda row, other=other: row[other])
        yield from checks.fall_faults(whole, same, size, rules)


def _beside(table: Table, steps: list[Step]) -> Iterator[str]:
    """What the JSON says of the steps: each was whole, and its medians lie in their intervals."""
    if not table.facts:
        return
    if left := inner(table.facts, "environment").get("leave_out"):
        yield f"stages were left out: {left}"
    facts: dict[tuple[Any, Any], dict[str, Any]] = {
        (number(one.get("B")), number(one.get("context"))): one for one in entries(table.facts, "steps")
    }
    for step in steps:
        intervals = inner(facts.get((step.B, step.context), {}), "ms_median_ci95")
        for (stage, name), row in step.rows.items():
            if row["ran"] == name and (fault := checks.interval_fault(row, intervals.get(f"{stage} {name}"))):
                yield f"{fault}: {where([row])}"
                return
    if lost := [key for key in facts if key not in {(step.B, step.context) for step in steps}]:
        yield f"a step was measured and has no rows: B={lost[0][0]:g}, context={lost[0][1]:g}"
