"""What both files are held to: one run of one commit on one GPU that finished, with numbers that can be times."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nsa_sel.measure import schema
from nsa_sel.measure.judge.gpus import known
from nsa_sel.measure.judge.rules import Rules
from nsa_sel.measure.judge.tables import Row, Table, cells, entries, inner, name_of, number, some, where

CLOCK_STEP_MS = 0.0005  # in which a GPU's events may count
ROUNDING = 1e-5  # figures are written with seven digits
LOW, HIGH = 1 - ROUNDING, 1 + ROUNDING


def run_faults(table: Table) -> Iterator[str]:
    """Yield what is wrong with the run itself: it did not finish, or the JSON beside the rows is another run's."""
    finished, environment = inner(table.facts, "finished"), inner(table.facts, "environment")
    if table.facts and number(finished.get("rows")) != len(table.rows):
        said = f"said {finished['rows']!r} rows" if "rows" in finished else "has no marker of its end"
        yield f"the run did not finish: its JSON {said}, the table holds {len(table.rows)}"
    for column in schema.WHERE:
        values = sorted({str(row[column]) for row in table.rows})
        if table.facts and values != [str(environment.get(column))]:
            yield f"its JSON is of another run: {column} {environment.get(column)!r}, rows {', '.join(values)}"
    commits = sorted({str(row["commit"]) for row in table.rows})
    if len(commits) > 1 or "" in commits:
        yield f"rows of {len(commits)} commits: {', '.join(map(repr, commits))}"


def device_faults(rows: list[Row]) -> Iterator[str]:
    """Yield the faults of device and sm: rows of several devices, of none, of no GPU, or of another capability."""
    for column in ("device", "sm"):
        values = sorted({row[column] for row in rows})
        if "" in values:
            yield f"no {column} named: {where([r for r in rows if not r[column]])}"
        if len(values) > 1:
            yield f"mixed devices: {column} holds {', '.join(map(repr, values))}"
    for device, sm in sorted({(row["device"], row["sm"]) for row in rows}):
        if sm and not re.fullmatch(r"\d{2,3}[af]?", sm):
            yield f"not measured on a GPU: sm is {sm!r}, device {device!r}"
        elif sm and (gpu := known(device)) and sm.rstrip("af") != gpu[0]:
            yield f"compute capability {sm} is not that of {device}, which is {gpu[0]}"


def number_faults(rows: list[Row], counts: tuple[str, ...], figures: tuple[str, ...]) -> Iterator[str]:
    """Yield the faults of numeric cells: NaN, infinity, text, nothing, and counts that are not 1, 2, 3 ..."""
    yield from cells(rows, (*counts, *figures), math.isnan, "{column} is no finite number (got '{written:.40}')")
    part = "{column} is no positive whole number (got {got:g})"
    yield from cells(rows, counts, lambda value: value < 1 or value % 1 > 0, part)


def time_faults(rows: list[Row], rules: Rules, tight: Callable[[Row], bool]) -> Iterator[str]:
    """Yield the faults of times: not above zero, percentiles out of order, a spread that makes a median meaningless."""
    yield from cells(rows, schema.TIMES, lambda value: value <= 0, "{column} is not above zero (got {got:g})")
    out = "p20, median and p80 are out of order"
    yield from some(rows, lambda r: r["ms_p20"] > r["ms_median"] * HIGH or r["ms_p80"] < r["ms_median"] * LOW, out)

    def wide(row: Row) -> bool:
        part = rules.trust_spread if tight(row) else 4 * rules.trust_spread
        return bool(row["ms_p80"] - row["ms_p20"] > part * row["ms_median"] + 2 * CLOCK_STEP_MS)

    yield from some(rows, wide, "a spread that makes the median meaningless ({ms_p20:g} to {ms_p80:g} ms)")


def interval_fault(row: Row, found: object) -> str:
    """Return what is wrong with a median's confidence interval beside the row's times, "" where nothing is."""
    if not isinstance(found, list) or len(found) != 2:
        return "no confidence interval of its median in the JSON"
    low, high = map(number, found)
    if not low * LOW <= row["ms_median"] <= high * HIGH or low <= 0:
        return f"its median is outside its confidence interval {low:g} to {high:g}"
    if low < row["ms_p20"] * LOW or high > row["ms_p80"] * HIGH:
        return f"the confidence interval {low:g} to {high:g} is wider than p20 to p80"
    return ""


def clock_faults(table: Table, keys: tuple[str, ...], cases: Iterable[tuple[Any, ...]], rules: Rules) -> Iterator[str]:
    """Yield the cases whose clocks were not read, or drifted between before and after."""
    read = {name_of(one, keys): one for one in entries(table.facts, "clocks")}
    unread, drifted = [], []
    for case in dict.fromkeys(cases):
        before, after = (inner(read.get(case, {}), when) for when in ("before", "after"))
        values = [(number(before.get(name)), number(after.get(name))) for name in ("sm", "mem")]
        if not all(x > 0 and y > 0 for x, y in values):
            unread.append(case)
        elif (drift := max(abs(y / x - 1) for x, y in values)) > rules.trust_clock_drift:
            drifted.append((case, drift))
    if table.facts and unread:
        yield f"the clocks were not read in {len(unread)} cases, the first {unread[0]}"
    if drifted:
        yield f"the clocks drifted in {len(drifted)} cases, the first {drifted[0][0]} by {drifted[0][1]:.1%}"


def alike_faults(rows: list[Row], columns: tuple[str, ...], rules: Rules, case: Callable[[Row], Any]) -> Iterator[str]:
    """Yield figures that many rows of different cases share although rounding or noise makes each its own.

    Times that are whole steps of a GPU's clock may be alike: flat, launch-bound ones are.
    """
    first: dict[Any, Row] = {}
    for row in rows:
        if all(math.isfinite(row[column]) for column in columns):
            first.setdefault(case(row), row)
    values = Counter(tuple(row[column] for column in columns) for row in first.values())
    for value, count in values.most_common(1):
        coarse = columns[0].startswith("ms") and all(_whole_steps(v, rows[0].get("calls", 1)) for v in value)
        if count > max(2, rules.trust_alike * len(first)) and not coarse and any(value):
            bad = [row for row in first.values() if tuple(row[c] for c in columns) == value]
            yield f"identical {', '.join(columns)} in many different cases ({value[0]:g}): {where(bad)}"


def fall_faults(
    rows: list[Row], same: Callable[[Row], Any], size: Callable[[Row], float], rules: Rules
) -> Iterator[str]:
    """Yield times that fall while the bytes grow, all else the same."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(same(row), []).append(row)
    for group in groups.values():
        for small in group:
            limit = (1 - rules.trust_fall) * small["ms_median"]
            for large in group:
                if size(large) >= 2 * size(small) and large["ms_median"] < limit:
                    fall = f"{small['ms_median']:.4g} to {large['ms_median']:.4g} ms"
                    yield f"times fall while the bytes grow ({fall}): {where([large])}"
                    return


def did_not_run(rows: list[Row]) -> Iterator[str]:
    """Yield the backends that did not run where they were asked for."""
    for backend in dict.fromkeys(row["backend"] for row in rows if row["ran"] != row["backend"]):
        bad = [row for row in rows if row["backend"] == backend and row["ran"] != backend]
        ran = f"ran {bad[0]['ran']!r}" if bad[0]["ran"] else "nothing ran"
        yield f"backend {backend} did not run ({ran}): {where(bad)}"


def _whole_steps(ms: float, calls: float) -> bool:
    steps = ms / CLOCK_STEP_MS * calls * 2  # a median of an even number of samples lies between two of them
    return abs(steps - round(steps)) < 0.01
