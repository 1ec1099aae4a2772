"""Whether a bench.csv can be believed: every known way in which such a file has lied, with the rows named.

A file with any fault is NOT MEASURED. Nothing here drops a row: a row that cannot be used is a fault, because the
earlier way of deciding passed on the rows that its filters had left over. Every figure is worked out from the times.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

from nsa_sel.measure import schema
from nsa_sel.measure.judge import checks
from nsa_sel.measure.judge.gpus import known
from nsa_sel.measure.judge.rules import Rules
from nsa_sel.measure.judge.tables import NAN, Row, Table, cells, entries, inner, name_of, number, over, some, where

SHAPE = ("dist", "dtype", *schema.BENCH_SHAPE)
KEY = ("workload", "backend", "mode")  # what the JSON names a row by
WORKED_OUT = ("speedup", "gbps", "ceiling_share")


def key_of(row: Row, *columns: str) -> tuple[Any, ...]:
    """Return some columns of a row, by default those that the JSON names it by."""
    return tuple(row[column] for column in columns or KEY)


def case_of(row: Row) -> tuple[Any, ...]:
    """Return what makes two rows the same measurement by two backends, whatever the mode."""
    return key_of(row, "workload", *SHAPE)


def judged(rows: list[Row]) -> list[Row]:
    """Return the rows that decide: of each measured case the graph rows where it has any, else its eager rows."""
    graph = {case_of(row) for row in rows if row["mode"] == "graph"}
    return [row for row in rows if row["mode"] == ("graph" if case_of(row) in graph else "eager")]


def compare(table: Table, backend: str) -> list[Row]:
    """Return the judged rows of `backend` with `roi`, the faster baseline's time over theirs, and its lower end.

    Both come from the times: `roi_low` is the low end of the baseline's 95 % interval over the high end of the row's.
    """
    found, intervals = [], intervals_of(table)
    by_case: dict[Any, dict[str, Row]] = {}
    for row in judged(table.rows):
        by_case.setdefault(case_of(row), {})[row["backend"]] = row
    for named in by_case.values():
        if backend in named:
            mine = named[backend]
            base = min((named[name] for name in schema.BASELINES), key=lambda row: row["ms_median"])
            low, high = (number(intervals[key_of(one)][end]) for one, end in ((base, 0), (mine, 1)))
            ratios = {"roi": base["ms_median"] / mine["ms_median"], "roi_low": low / high, "baseline": base["backend"]}
            found.append(mine | ratios)
    return found


def intervals_of(table: Table) -> dict[tuple[Any, ...], Any]:
    """Return the confidence intervals of a run by `key_of`; one that stands twice is none."""
    found = [(name_of(one, KEY), one.get("ms_median_ci95")) for one in entries(table.facts, "intervals")]
    counts = Counter(key for key, _ in found)
    return {key: interval for key, interval in found if counts[key] == 1}


def bench_faults(table: Table, rules: Rules, backend: str) -> list[str]:
    """Return every reason why `table` does not support a judgement of `backend`; an empty list where it does."""
    if not table.readable:
        return table.faults
    named = (backend, *schema.BASELINES)
    rows = table.rows
    decisive = [row for row in rows if row["backend"] in named]
    # A row that claims to have been measured is checked whoever it belongs to: if one figure of a run contradicts
    # itself, so may the others. Only rows of other backends that say they did not run are left alone.
    claims = [row for row in rows if row["backend"] in named or row["ran"] or row["ms_median_text"]]
    ran = [row for row in claims if row["ran"] == row["backend"]]
    calls = {name_of(one, KEY): number(one.get("calls")) for one in entries(table.facts, "intervals")}
    base = {(case_of(r), r["mode"]): r["ms_median"] for r in claims if r["backend"] == schema.BASELINE}
    for row in rows:
        row["calls"] = max(1.0, calls.get(key_of(row), 1.0))
        rate = over(row["bytes"], row["ms_median"] * 1e6)
        row |= {"true_speedup": over(base.get((case_of(row), row["mode"]), NAN), row["ms_median"]), "true_gbps": rate}
        row |= {"true_ceiling_share": over(rate, row["ceiling_gbps"])}
    deciding = {id(row) for row in judged(decisive)}
    return table.named(
        [
            *table.faults,
            *checks.run_faults(table),
            *_absent(rows, named),
            *checks.did_not_run(decisive),
            *checks.device_faults(rows),
            *_numbers([row for row in claims if row["ran"] == row["backend"] or row["backend"] not in named]),
            *checks.time_faults(claims, rules, tight=lambda row: id(row) in deciding),
            *_rows(claims, rules),
            *_figures(claims, rules),
            *_repeats(rows, inner(table.facts, "workloads")),
            *_unpaired(rows, named),
            *_distributions([row for row in judged(rows) if row["backend"] == backend], rules),
            *_baseline(decisive, rules),
            *_patterns(ran, decisive, rules),
            *_beside(table, ran),
            *checks.clock_faults(
                table, ("workload", "mode"), (key_of(r, "workload", "mode") for r in judged(decisive)), rules
            ),
            *_anchors(table, ran, rules),
        ]
    )


def bench_remarks(table: Table) -> list[str]:
    """Return what is odd about a believable file without deciding anything: for the reader of the record."""
    absent = sorted({row["backend"] for row in table.rows if not row["ran"]})
    return [f"{table.name}: did not run and was compared with nothing: {', '.join(absent)}"] if absent else []


def _absent(rows: list[Row], named: tuple[str, ...]) -> Iterator[str]:
    present = sorted({row["backend"] for row in rows})
    for name in named:
        if name not in present:
            yield f"no rows of backend {name} (it holds {', '.join(present)})"


def _numbers(claims: list[Row]) -> Iterator[str]:
    # The baseline's speed-up over itself carries no information: it may be left empty, but must not say anything else
    # than 1.
    empty = [r | {"speedup": 1.0} if r["backend"] == schema.BASELINE and not r["speedup_text"] else r for r in claims]
    return checks.number_faults(empty, schema.BENCH_COUNTS, schema.BENCH_FIGURES)


def _rows(claims: list[Row], rules: Rules) -> Iterator[str]:
    """What a row says by itself: errors, shape, bytes, and what no GPU can do."""
    yield from cells(claims, ("mae", "max_err"), lambda value: value < 0, "{column} is below zero (got {got:g})")
    nothing = "{column} is not above zero (got {got:g})"
    yield from cells(claims, ("ceiling_gbps", *WORKED_OUT), lambda value: value <= 0, nothing)
    yield from some(
        claims, lambda r: r["mae"] > r["max_err"] * checks.HIGH, "the mean error is above the largest error"
    )
    half = [row for row in claims if schema.DTYPE_BYTES.get(row["dtype"]) == 2 and row["L"] > 1]
    exact = "an error of exactly 0 in half precision, where rounding must show"
    yield from some(half, lambda r: r["mae"] == 0 or r["max_err"] == 0, exact)
    few = f"fewer than {rules.trust_min_iters:g} iterations (got {{iters:g}})"
    yield from some(claims, lambda r: r["ran"] and r["iters"] < rules.trust_min_iters, few)
    yield from some(claims, lambda r: r["mode"] not in schema.MODES, "unknown mode {mode:.40}")
    yield from some(claims, lambda r: r["dtype"] not in schema.DTYPE_BYTES, "unknown dtype {dtype:.40}")
    rows_off = "rows is not B x S x G"
    yield from some(claims, lambda r: abs(r["rows"] - r["B"] * r["S"] * r["G"]) > 0, rows_off)
    yield from some(claims, lambda r: r["L"] > r["S_kv"], "more tokens selected than there are")
    bytes_off = "bytes {bytes:g} are off the shape"
    yield from some(claims, lambda r: abs(over(r["bytes"], _bytes(r)) - 1) > rules.trust_bytes_off, bytes_off)
    # The rate is also worked out from bytes and time, or a wrong column would hide an impossible time.
    share = f"faster than {rules.trust_ceiling:g}x the measured ceiling (got {{true_ceiling_share:.3g}}x)"
    yield from some(claims, lambda r: max(r["ceiling_share"], r["true_ceiling_share"]) > rules.trust_ceiling, share)
    physical = "a ceiling above what the GPU can physically read ({ceiling_gbps:.4g} GB/s, {device})"
    yield from some(
        claims,
        lambda r: (gpu := known(r["device"])) is not None and r["ceiling_gbps"] > gpu[1] * rules.trust_physical,
        physical,
    )


def _bytes(row: Row) -> float:
    element = schema.DTYPE_BYTES.get(row["dtype"], NAN)
    return schema.call_bytes(row["rows"], row["h"], (row["Dk"], row["Dv"]), row["n"], row["L"], element)  # type: ignore[arg-type]


def _figures(claims: list[Row], rules: Rules) -> Iterator[str]:
    """Every figure in a column, beside the one that the times give."""
    for column in WORKED_OUT:
        off = [r for r in claims if abs(over(r[column], r[f"true_{column}"]) - 1) > rules.trust_speedup_off]
        for row in off[:1]:
            true = f"{row[column]:g} is off the times beside it ({row[f'true_{column}']:.4g})"
            yield f"{column} {true}: {where(off)}"
    alone = f"a speedup with no {schema.BASELINE} time beside it"
    yield from some(claims, lambda r: r["speedup"] > 0 and math.isnan(r["true_speedup"]), alone)
    ceilings: dict[Any, set[float]] = {}
    for row in claims:
        if not math.isnan(row["ceiling_gbps"]):
            ceilings.setdefault((case_of(row), row["mode"]), set()).add(row["ceiling_gbps"])
    several = "several ceilings for one case and mode"
    yield from some(claims, lambda r: len(ceilings.get((case_of(r), r["mode"]), ())) > 1, several)


def _repeats(rows: list[Row], workloads: dict[str, Any]) -> Iterator[str]:
    seen = Counter((case_of(row), row["mode"], row["backend"]) for row in rows)
    again = "the same case stands more than once, and nothing says which holds"
    yield from some(rows, lambda r: seen[(case_of(r), r["mode"], r["backend"])] > 1, again)
    names: dict[Any, set[str]] = {}
    for row in rows:
        # Block and page sizes have no column: two workloads may differ in these alone.
        more = inner(workloads, row["workload"])
        row["shape"] = (*key_of(row, *SHAPE), *(str(more.get(size)) for size in ("block_size", "page_size")))
        names.setdefault(row["shape"], set()).add(row["workload"])
    yield from some(rows, lambda r: len(names[r["shape"]]) > 1, "the same case under several names ({workload}, ...)")


def _unpaired(rows: list[Row], named: tuple[str, ...]) -> Iterator[str]:
    by_case: dict[Any, set[str]] = {}
    for row in judged(rows):
        by_case.setdefault(case_of(row), set()).add(row["backend"])
    for name in named:
        lonely = [row for row in judged(rows) if name not in by_case[case_of(row)]]
        if lonely and any(row["backend"] == name for row in rows):
            yield f"no {name} row beside the others: {where(lonely)}"
    yield from some(rows, lambda r: case_of(r) not in by_case, "neither graph nor eager rows")


def _distributions(mine: list[Row], rules: Rules) -> Iterator[str]:
    if not mine:
        return
    lengths = {dist: {row["L"] for row in mine if row["dist"] == dist} for dist in rules.trust_distributions}
    if missing := [dist for dist, found in lengths.items() if not found]:
        yield f"distribution {', '.join(missing)} missing"
    # few takes any length, many and mixed take 8 and more: what the others cannot have is no gap.
    every = {length for length in set().union(*lengths.values()) if length >= schema.SPANS_FROM}
    for dist, found in lengths.items():
        if found and (absent := sorted(every - found)):
            listed = ", ".join(f"{length:g}" for length in absent)
            yield f"distribution {dist} not measured at L = {listed}, where others were"


def _baseline(decisive: list[Row], rules: Rules) -> Iterator[str]:
    # A speed-up over something that computes another result is no speed-up. Where the judged row is wrong too, that
    # row fails on its own and the baseline does not matter.
    limit = rules.stability_max_mae
    others = [row for row in decisive if row["backend"] in schema.BASELINES and row["mae"] > limit]
    right = {(case_of(r), r["mode"]) for r in decisive if r["backend"] not in schema.BASELINES and r["mae"] <= limit}
    wrong = "the baseline computed something else (MAE {mae:.3g} against the oracle)"
    yield from some(others, lambda r: (case_of(r), r["mode"]) in right, wrong)


def _patterns(ran: list[Row], decisive: list[Row], rules: Rules) -> Iterator[str]:
    for backend, mode in dict.fromkeys((row["backend"], row["mode"]) for row in ran):
        mine = [row for row in ran if (row["backend"], row["mode"]) == (backend, mode)]
        for columns in (("mae",), ("max_err",), schema.TIMES):
            yield from checks.alike_faults(mine, columns, rules, operator.itemgetter("shape"))
    timed = [row for row in judged(decisive) if row["ran"] == row["backend"] and row["bytes"] > 0]
    same = [c for c in SHAPE if c not in ("L", "n", "rows", "B", "S_kv")] + ["backend", "mode"]
    spans = [row for row in timed if row["dist"] != "blocks"]
    for rows, kept in ((spans, ("rows", "S_kv")), (timed, ("L", "n", "S_kv"))):
        yield from checks.fall_faults(rows, operator.itemgetter(*same, *kept), operator.itemgetter("bytes"), rules)


def _beside(table: Table, ran: list[Row]) -> Iterator[str]:
    """What the JSON says of the rows: the interval of each, and the workloads there were."""
    if not table.facts:
        return
    intervals, workloads = intervals_of(table), inner(table.facts, "workloads")
    for row in ran:
        if fault := checks.interval_fault(row, intervals.get(key_of(row))):
            yield f"{fault}: {where([row])}"
            break
    if absent := sorted(set(workloads) - {row["workload"] for row in table.rows}):
        yield f"workload {absent[0]} was measured and has no row"
    other = "a workload that the JSON does not hold, or not of this shape"
    shape = [column for column in SHAPE if column != "rows"]
    yield from some(table.rows, lambda r: any(inner(workloads, r["workload"]).get(c) != r[c] for c in shape), other)


def _anchors(table: Table, ran: list[Row], rules: Rules) -> Iterator[str]:
    found = {name_of(a, KEY): number(a.get("anchor_ms")) for a in entries(table.facts, "anchors")}
    base = {key_of(r, "workload", "mode"): r["ms_median"] for r in ran if r["backend"] == schema.BASELINE}
    limit = rules.trust_anchor_off + 10 * checks.ROUNDING
    peers = [row for row in ran if row["backend"] not in schema.HERE and table.facts]

    def apart(row: Row) -> bool:
        return not abs(over(found.get(key_of(row), NAN), base.get(key_of(row, "workload", "mode"), NAN)) - 1) <= limit

    yield from some(peers, apart, f"its process did not time sdpa within {rules.trust_anchor_off:.0%} of this one")
