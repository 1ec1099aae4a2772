"""Whether a bench.csv can be believed: every known way in which such a file has lied, with the rows named.

A file with any fault is NOT MEASURED. Nothing here drops a row: a row that cannot be used is a fault, because the
earlier way of deciding passed on the rows that its filters had left over. Every figure is worked out from the times.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from nsa_sel.measure import schema
from nsa_sel.measure.judge import checks
from nsa_sel.measure.judge.gpus import known
from nsa_sel.measure.judge.rules import Rules
from nsa_sel.measure.judge.tables import Row, Table, entries, inner, name_of, number, where

SHAPE = ("dist", "dtype", *schema.BENCH_SHAPE)
KEY = ("workload", "backend", "mode")


def case_of(row: Row) -> tuple[Any, ...]:
    """Return what makes two rows the same measurement by two backends, whatever the mode."""
    return (row["workload"], *(row[column] for column in SHAPE))


def judged(rows: list[Row]) -> list[Row]:
    """Return the rows that decide: of each measured case the graph rows where it has any, else its eager rows."""
    graph = {case_of(row) for row in rows if row["mode"] == "graph"}
    return [row for row in rows if row["mode"] == ("graph" if case_of(row) in graph else "eager")]


def compare(rows: list[Row], intervals: dict[tuple[Any, ...], Any], backend: str) -> list[Row]:
    """Return the judged rows of `backend` with `roi`, the faster baseline's time over theirs, and its lower end.

    Both come from the times: `roi_low` is the low end of the baseline's 95 % interval over the high end of the row's.
    """
    found = []
    by_case: dict[Any, dict[str, Row]] = {}
    for row in judged(rows):
        by_case.setdefault(case_of(row), {})[row["backend"]] = row
    for named in by_case.values():
        if backend in named:
            mine = named[backend]
            base = min((named[name] for name in schema.BASELINES), key=lambda row: row["ms_median"])
            low, high = (number(intervals[key_of(one)][end]) for one, end in ((base, 0), (mine, 1)))
            ratios = {"roi": base["ms_median"] / mine["ms_median"], "roi_low": low / high, "baseline": base["backend"]}
            found.append(mine | ratios)
    return found


def key_of(row: Row) -> tuple[Any, ...]:
    """Return what the JSON names a row by."""
    return tuple(row[k] for k in KEY)


def intervals_of(table: Table) -> dict[tuple[Any, ...], Any]:
    """Return the confidence intervals of a run by `key_of`; one that stands twice is none."""
    found = entries(table.facts, "intervals")
    keys = [name_of(one, KEY) for one in found]
    counts = Counter(keys)
    return {key: one.get("ms_median_ci95") for key, one in zip(keys, found, strict=True) if counts[key] == 1}


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
    calls = {name_of(one, KEY): one.get("calls") for one in entries(table.facts, "intervals")}
    for row in rows:
        row["calls"] = found if isinstance(found := calls.get(key_of(row)), int) and found > 0 else 1
    deciding = {id(row) for row in judged(decisive)}
    faults = [
        *table.faults,
        *checks.run_faults(table),
        *_absent(rows, named),
        *checks.did_not_run(decisive),
        *checks.device_faults(rows),
        *_numbers([row for row in claims if row["ran"] == row["backend"] or row["backend"] not in named]),
        *checks.time_faults(claims, rules, tight=lambda row: id(row) in deciding),
        *_errors(ran, rules),
        *_impossible(claims, rules),
        *_shapes(claims, rules),
        *_figures(claims, rules),
        *_ceilings(claims, rules),
        *_repeats(rows, inner(table.facts, "workloads")),
        *_unpaired(rows, named),
        *_distributions([row for row in judged(rows) if row["backend"] == backend], rules),
        *_baseline(decisive, rules),
        *_patterns(ran, decisive, rules),
        *_beside(table, ran),
        *checks.clock_faults(
            table, ("workload", "mode"), ((r["workload"], r["mode"]) for r in judged(decisive)), rules
        ),
        *_anchors(table, ran, rules),
    ]
    return [fault if fault.startswith(table.name) else f"{table.name}: {fault}" for fault in dict.fromkeys(faults)]


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


def _errors(ran: list[Row], rules: Rules) -> Iterator[str]:
    for column in ("mae", "max_err"):
        if bad := [row for row in ran if row[column] < 0]:
            yield f"{column} is below zero (got {bad[0][column]:g}): {where(bad)}"
    if bad := [row for row in ran if row["mae"] > row["max_err"] * (1 + checks.ROUNDING)]:
        yield f"the mean error is above the largest error: {where(bad)}"
    half = [row for row in ran if schema.DTYPE_BYTES.get(row["dtype"]) == 2 and row["L"] > 1]
    if bad := [row for row in half if row["mae"] == 0 or row["max_err"] == 0]:
        yield f"an error of exactly 0 in half precision, where rounding must show: {where(bad)}"


def _impossible(claims: list[Row], rules: Rules) -> Iterator[str]:
    for column in ("gbps", "ceiling_gbps", "ceiling_share", "speedup"):
        if bad := [row for row in claims if row[column] <= 0]:
            yield f"{column} is not above zero (got {bad[0][column]:g}): {where(bad)}"
    if bad := [row for row in claims if row["ran"] and row["iters"] < rules.trust_min_iters]:
        yield f"fewer than {rules.trust_min_iters:g} iterations (got {bad[0]['iters']:g}): {where(bad)}"
    if bad := [row for row in claims if row["mode"] not in schema.MODES]:
        yield f"unknown mode {bad[0]['mode'][:40]!r}: {where(bad)}"


def _shapes(claims: list[Row], rules: Rules) -> Iterator[str]:
    if bad := [row for row in claims if row["rows"] != row["B"] * row["S"] * row["G"] and not math.isnan(row["rows"])]:
        yield f"rows is not B x S x G: {where(bad)}"
    if unknown := [row for row in claims if row["dtype"] not in schema.DTYPE_BYTES]:
        yield f"unknown dtype {unknown[0]['dtype'][:40]!r}: {where(unknown)}"
    if bad := [row for row in claims if row["L"] > row["S_kv"]]:
        yield f"more tokens selected than there are: {where(bad)}"
    for row in claims:
        element = schema.DTYPE_BYTES.get(row["dtype"], math.nan)
        per_row = (row["L"] + row["h"]) * (row["Dk"] + row["Dv"]) * element + row["h"] * 4 + row["n"] * 8
        expected = row["rows"] * per_row
        if expected > 0 and abs(row["bytes"] / expected - 1) > rules.trust_bytes_off:
            yield f"bytes {row['bytes']:g} are off the shape's {expected:g}: {where([row])}"
            return


def _figures(claims: list[Row], rules: Rules) -> Iterator[str]:
    """Every figure in a column, beside the one that the times give."""
    base = {(case_of(r), r["mode"]): r["ms_median"] for r in claims if r["backend"] == schema.BASELINE}
    for row in claims:
        if not row["ms_median"] > 0:
            continue
        times = base.get((case_of(row), row["mode"]), math.nan)
        row["true"] = {
            "speedup": times / row["ms_median"],
            "gbps": row["bytes"] / row["ms_median"] / 1e6,
            "ceiling_share": row["bytes"] / row["ms_median"] / 1e6 / row["ceiling_gbps"]
            if row["ceiling_gbps"]
            else math.nan,
        }
    for column in ("speedup", "gbps", "ceiling_share"):
        for row in claims:
            true = row.get("true", {}).get(column, math.nan)
            if true and abs(row[column] / true - 1) > rules.trust_speedup_off:
                yield f"{column} {row[column]:g} is off the times beside it ({true:.4g}): {where([row])}"
                break
            if column == "speedup" and not math.isnan(row[column]) and math.isnan(true):
                yield f"a speedup with no {schema.BASELINE} time beside it: {where([row])}"
                break


def _ceilings(claims: list[Row], rules: Rules) -> Iterator[str]:
    # The rate is also worked out from bytes and time, or a wrong gbps column would hide an impossible time.
    for row in claims:
        share = max(row.get("true", {}).get("ceiling_share", 0), row["ceiling_share"])
        if share > rules.trust_ceiling:
            yield f"faster than {rules.trust_ceiling:g}x the measured ceiling (got {share:.3g}x): {where([row])}"
            break
    for row in claims:
        gpu = known(row["device"])
        if gpu and row["ceiling_gbps"] > gpu[1] * rules.trust_physical:
            got = f"{row['ceiling_gbps']:.4g} GB/s, {row['device']} delivers {gpu[1]:g}"
            yield f"a ceiling above what the GPU can physically read ({got}): {where([row])}"
            break
    values: dict[Any, set[float]] = {}
    for row in claims:
        if not math.isnan(row["ceiling_gbps"]):
            values.setdefault((case_of(row), row["mode"]), set()).add(row["ceiling_gbps"])
    for row in claims:
        if len(values.get((case_of(row), row["mode"]), ())) > 1:
            yield f"several ceilings for one case and mode: {where([row])}"
            break


def _repeats(rows: list[Row], workloads: dict[str, Any]) -> Iterator[str]:
    seen = Counter((case_of(row), row["mode"], row["backend"]) for row in rows)
    if again := [row for row in rows if seen[(case_of(row), row["mode"], row["backend"])] > 1]:
        yield f"the same case stands more than once, and nothing says which holds: {where(again)}"
    names: dict[Any, set[str]] = {}
    for row in rows:
        # Block and page sizes have no column: two workloads may differ in these alone.
        more = inner(workloads, row["workload"])
        row["shape"] = (*(row[c] for c in SHAPE), *(str(more.get(size)) for size in ("block_size", "page_size")))
        names.setdefault(row["shape"], set()).add(row["workload"])
    if twice := [row for row in rows if len(names[row["shape"]]) > 1]:
        yield f"the same case under several names ({', '.join(sorted(names[twice[0]['shape']]))}): {where(twice)}"


def _unpaired(rows: list[Row], named: tuple[str, ...]) -> Iterator[str]:
    by_case: dict[Any, set[str]] = {}
    for row in judged(rows):
        by_case.setdefault(case_of(row), set()).add(row["backend"])
    for name in named:
        lonely = [row for row in judged(rows) if name not in by_case[case_of(row)]]
        if lonely and any(row["backend"] == name for row in rows):
            yield f"no {name} row beside the others: {where(lonely)}"
    if left := [row for row in rows if case_of(row) not in by_case]:
        yield f"neither graph nor eager rows: {where(left)}"


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
    if bad := [row for row in others if (case_of(row), row["mode"]) in right]:
        yield f"the baseline computed something else (MAE {bad[0]['mae']:.3g} against the oracle): {where(bad)}"


def _patterns(ran: list[Row], decisive: list[Row], rules: Rules) -> Iterator[str]:
    for backend, mode in dict.fromkeys((row["backend"], row["mode"]) for row in ran):
        mine = [row for row in ran if (row["backend"], row["mode"]) == (backend, mode)]
        for columns in (("mae",), ("max_err",), ("ms_median", "ms_p20", "ms_p80")):
            yield from checks.alike_faults(mine, columns, rules, lambda row: row["shape"])
    timed = [row for row in judged(decisive) if row["ran"] == row["backend"] and row["bytes"] > 0]
    all_else = [c for c in SHAPE if c not in ("L", "n", "rows", "B", "S_kv")]

    def same(*kept: str) -> Any:
        return lambda row: tuple(row[c] for c in (*all_else, *kept, "backend", "mode"))

    spans = [row for row in timed if row["dist"] != "blocks"]
    yield from checks.fall_faults(spans, same("rows", "S_kv"), lambda row: row["bytes"], rules)
    yield from checks.fall_faults(timed, same("L", "n", "S_kv"), lambda row: row["bytes"], rules)


def _beside(table: Table, ran: list[Row]) -> Iterator[str]:
    """What the JSON says of the rows: the interval of each, and the workloads there were."""
    if not table.facts:
        return
    intervals = intervals_of(table)
    for row in ran:
        if fault := checks.interval_fault(row, intervals.get(key_of(row))):
            yield f"{fault}: {where([row])}"
            break
    workloads = inner(table.facts, "workloads")
    for name in workloads:
        if not any(row["workload"] == name for row in table.rows):
            yield f"workload {name} was measured and has no row"
            break
    for row in table.rows:
        whole = inner(workloads, row["workload"])
        if any(whole.get(c) != row[c] for c in SHAPE if c != "rows"):
            yield f"a workload that the JSON does not hold, or not of this shape: {where([row])}"
            break


def _anchors(table: Table, ran: list[Row], rules: Rules) -> Iterator[str]:
    found = {name_of(a, KEY): a for a in entries(table.facts, "anchors")}
    base = {(row["workload"], row["mode"]): row["ms_median"] for row in ran if row["backend"] == schema.BASELINE}
    for row in ran:
        if row["backend"] in schema.HERE or not table.facts:
            continue
        anchor = number(found.get(key_of(row), {}).get("anchor_ms"))
        off = abs(anchor / base.get((row["workload"], row["mode"]), math.nan) - 1)
        if not off <= rules.trust_anchor_off + 10 * checks.ROUNDING:
            yield f"its process did not time sdpa within {rules.trust_anchor_off:.0%} of this one: {where([row])}"
            return
