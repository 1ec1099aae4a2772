"""Whether a bench.csv can be believed: every known way in which such a file has lied, with the rows named.

A file with any fault is NOT MEASURED. Nothing here drops a row: a row that cannot be used is a fault, because the
earlier way of deciding passed on the rows that its filters had left over.
"""

from __future__ import annotations

import pandas as pd

from nsa_sel.measure import schema
from nsa_sel.measure.judge.rules import Rules
from nsa_sel.measure.judge.tables import Table, where

_SHAPE_KEY = [*schema.BENCH_CASE, "mode"]


def bench_faults(table: Table, rules: Rules, backend: str, baseline: str = schema.BASELINE) -> list[str]:
    """Return every reason why `table` does not support a judgement of `backend`; an empty list where it does."""
    if table.frame is None:
        return table.faults
    frame = table.frame
    decisive = frame[frame["backend"].isin([backend, baseline])]
    faults = [*_absent(frame, backend, baseline), *_did_not_run(decisive), *device_faults(frame)]
    # A row that claims to have been measured is checked whoever it belongs to: if one figure of a run contradicts
    # itself, so may the others. Only rows of other backends that say they did not run are left alone.
    claims = frame[frame["backend"].isin([backend, baseline]) | (frame["ran"] != "") | (frame["ms_median_text"] != "")]
    absent = claims["backend"].isin([backend, baseline]) & (claims["ran"] != claims["backend"])  # a fault already
    faults += _not_numbers(claims[~absent], baseline)
    faults += _impossible(claims, rules)
    faults += _shape_contradictions(claims, rules)
    faults += _speedup_contradictions(claims, rules, baseline)
    faults += _ceiling_contradictions(claims, rules)
    faults += _repeats(frame)
    faults += _unpaired(frame, backend, baseline)
    faults += _missing_distributions(judged(frame), rules, backend)
    faults += _wrong_baseline(decisive, rules, baseline)
    return [f"{_name(table)}: {fault}" for fault in faults]


def judged(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that decide: of each measured case the graph rows where it has any, else its eager rows."""
    has_graph = _any_of_case(frame, frame["mode"] == "graph")
    return frame[((frame["mode"] == "graph") & has_graph) | ((frame["mode"] == "eager") & ~has_graph)]


def bench_remarks(table: Table) -> list[str]:
    """Return what is odd about a believable file without deciding anything: for the reader of the record."""
    frame = table.rows
    ran = frame[frame["ran"] != ""]
    rate = ran["bytes"] / ran["ms_median"] / 1e6
    remarks = []
    for mask, text in (
        ((ran["gbps"] / rate - 1).abs() > 0.1, "gbps does not follow from the bytes and the time beside it"),
        (ran["mae"] > ran["max_err"] * 1.01, "the mean error is above the largest error"),
        (
            (ran["ms_p20"] > ran["ms_median"]) | (ran["ms_median"] > ran["ms_p80"]),
            "p20, median and p80 are out of order",
        ),
    ):
        if mask.any():
            remarks.append(f"{text}: {where(ran[mask])}")
    if frame["commit"].nunique() > 1:
        remarks.append(f"rows of {frame['commit'].nunique()} commits: {', '.join(sorted(set(frame['commit'])))}")
    absent = frame[frame["ran"] == ""]
    if len(absent):
        remarks.append(f"did not run and was compared with nothing: {', '.join(sorted(set(absent['backend'])))}")
    return [f"{_name(table)}: {remark}" for remark in remarks]


def device_faults(frame: pd.DataFrame) -> list[str]:
    """Return the faults of the columns device and sm: rows of several devices, of none, or of no GPU."""
    faults = []
    for column in ("device", "sm"):
        values = sorted(set(frame[column]))
        if "" in values:
            faults.append(f"no {column} named: {where(frame[frame[column] == ''])}")
        if len(values) > 1:
            faults.append(f"mixed devices: {column} holds {', '.join(repr(value) for value in values)}")
    no_gpu = frame[~frame["sm"].str.fullmatch(r"\d{2,3}[af]?") & (frame["sm"] != "")]
    if len(no_gpu):
        faults.append(f"not measured on a GPU: sm is {no_gpu.iloc[0]['sm']!r}, device {no_gpu.iloc[0]['device']!r}")
    return faults


def number_faults(rows: pd.DataFrame, counts: tuple[str, ...], figures: tuple[str, ...]) -> list[str]:
    """Return the faults of numeric cells: NaN, infinity, text, nothing, and counts that are not 1, 2, 3 ..."""
    faults = []
    for column in (*counts, *figures):
        bad = rows[rows[column].isna()]
        if len(bad):
            faults.append(f"{column} is no finite number (got {bad.iloc[0][f'{column}_text']!r}): {where(bad)}")
    for column in counts:
        values = rows[column]
        bad = rows[values.notna() & ((values < 1) | (values % 1 != 0))]
        if len(bad):
            faults.append(f"{column} is no positive whole number (got {bad.iloc[0][column]:g}): {where(bad)}")
    return faults


def time_faults(rows: pd.DataFrame, times: tuple[str, ...]) -> list[str]:
    """Return the faults of times that are not above zero: with a zero baseline any guard passes."""
    faults = []
    for column in times:
        bad = rows[rows[column] <= 0]
        if len(bad):
            faults.append(f"{column} is not above zero (got {bad.iloc[0][column]:g}): {where(bad)}")
    return faults


def _absent(frame: pd.DataFrame, backend: str, baseline: str) -> list[str]:
    present = ", ".join(sorted(set(frame["backend"])))
    return [
        f"no rows of backend {name} (it holds {present})"
        for name in (backend, baseline)
        if not (frame["backend"] == name).any()
    ]


def _did_not_run(rows: pd.DataFrame) -> list[str]:
    faults = []
    for backend, group in rows[rows["ran"] != rows["backend"]].groupby("backend"):
        ran = group.iloc[0]["ran"]
        faults.append(f"backend {backend} did not run ({'ran ' + repr(ran) if ran else 'nothing ran'}): {where(group)}")
    return faults


def _not_numbers(claims: pd.DataFrame, baseline: str) -> list[str]:
    # The baseline's speed-up over itself carries no information: it may be left empty, but must not say anything else
    # than 1.
    empty = (claims["backend"] == baseline) & (claims["speedup_text"] == "")
    filled = claims.assign(speedup=claims["speedup"].where(~empty, 1.0))
    return number_faults(filled, schema.BENCH_COUNTS, schema.BENCH_FIGURES)


def _impossible(claims: pd.DataFrame, rules: Rules) -> list[str]:
    faults = time_faults(claims, (*schema.BENCH_TIMES, "gbps", "ceiling_gbps", "ceiling_share", "speedup"))
    for column in ("mae", "max_err"):
        bad = claims[claims[column] < 0]
        if len(bad):
            faults.append(f"{column} is below zero (got {bad.iloc[0][column]:g}): {where(bad)}")
    bad = claims[(claims["ran"] != "") & (claims["iters"] < rules.trust_min_iters)]
    if len(bad):
        faults.append(f"fewer than {rules.trust_min_iters:g} iterations (got {bad.iloc[0]['iters']:g}): {where(bad)}")
    bad = claims[~claims["mode"].isin(schema.MODES)]
    if len(bad):
        faults.append(f"unknown mode {bad.iloc[0]['mode']!r}: {where(bad)}")
    return faults


def _shape_contradictions(claims: pd.DataFrame, rules: Rules) -> list[str]:
    faults = []
    bad = claims[claims["rows"] != claims["B"] * claims["S"] * claims["G"]]
    bad = bad[bad[["rows", "B", "S", "G"]].notna().all(axis=1)]
    if len(bad):
        faults.append(f"rows is not B x S x G: {where(bad)}")
    element = claims["dtype"].map(schema.DTYPE_BYTES)
    if element.isna().any():
        unknown = claims[element.isna()]
        faults.append(f"unknown dtype {unknown.iloc[0]['dtype']!r}: {where(unknown)}")
    dims = claims["Dk"] + claims["Dv"]
    per_row = (claims["L"] + claims["h"]) * dims * element + claims["h"] * 4 + claims["n"] * 8
    expected = claims["rows"] * per_row
    off = (claims["bytes"] / expected - 1).abs() > rules.trust_bytes_off
    if off.any():
        first = claims[off].iloc[0]
        faults.append(f"bytes {first['bytes']:g} are off the shape's {expected[off].iloc[0]:g}: {where(claims[off])}")
    return faults


def _speedup_contradictions(claims: pd.DataFrame, rules: Rules, baseline: str) -> list[str]:
    base = (
        claims[claims["backend"] == baseline].groupby(_SHAPE_KEY, dropna=False)["ms_median"].first().rename("ms_base")
    )
    rows = claims.merge(base, how="left", left_on=_SHAPE_KEY, right_index=True)
    rows = rows[rows["ms_median"] > 0]
    actual = rows["ms_base"] / rows["ms_median"]
    off = (rows["speedup"] / actual - 1).abs() > rules.trust_speedup_off
    faults = []
    if off.any():
        first, seen = rows[off].iloc[0], actual[off].iloc[0]
        faults.append(f"speedup {first['speedup']:g} is off the times beside it ({seen:.4g}): {where(rows[off])}")
    alone = rows[rows["ms_base"].isna() & rows["speedup"].notna()]
    if len(alone):
        faults.append(f"a speedup with no {baseline} time beside it: {where(alone)}")
    return faults


def _ceiling_contradictions(claims: pd.DataFrame, rules: Rules) -> list[str]:
    # The rate is also worked out from bytes and time, or a wrong gbps column would hide an impossible time.
    rate = pd.concat([claims["gbps"], claims["bytes"] / claims["ms_median"] / 1e6], axis=1).max(axis=1)
    share = pd.concat([rate / claims["ceiling_gbps"], claims["ceiling_share"]], axis=1).max(axis=1)
    over = share > rules.trust_ceiling
    if not over.any():
        return []
    got = f"{share[over].iloc[0]:.3g}x"
    return [f"faster than {rules.trust_ceiling:g}x the measured ceiling (got {got}): {where(claims[over])}"]


def _repeats(frame: pd.DataFrame) -> list[str]:
    again = frame[frame.duplicated([*_SHAPE_KEY, "backend"], keep=False)]
    return [f"the same case stands more than once, and nothing says which holds: {where(again)}"] if len(again) else []


def _unpaired(frame: pd.DataFrame, backend: str, baseline: str) -> list[str]:
    faults = []
    rows = judged(frame)
    for name in (backend, baseline):
        lonely = rows[~_any_of_case(rows, rows["backend"] == name)]
        if len(lonely) and (frame["backend"] == name).any():
            faults.append(f"no {name} row beside the others: {where(lonely)}")
    chosen = rows.drop_duplicates(list(schema.BENCH_CASE))[list(schema.BENCH_CASE)]
    left = frame.merge(chosen, how="left", on=list(schema.BENCH_CASE), indicator="found")
    left = left[left["found"] == "left_only"]
    if len(left):
        faults.append(f"neither graph nor eager rows: {where(left)}")
    return faults


def _any_of_case(rows: pd.DataFrame, mask: pd.Series) -> pd.Series:
    """Return for each row whether `mask` holds in any row of the same case."""
    cases = [rows[column] for column in schema.BENCH_CASE]
    return mask.groupby(cases, dropna=False, sort=False).transform("any").astype(bool)


def _missing_distributions(rows: pd.DataFrame, rules: Rules, backend: str) -> list[str]:
    mine = rows[rows["backend"] == backend]
    if mine.empty:
        return []
    faults = []
    lengths = {dist: set(mine[mine["dist"] == dist]["L"].dropna()) for dist in rules.trust_distributions}
    missing = [dist for dist, found in lengths.items() if not found]
    if missing:
        faults.append(f"distribution {', '.join(missing)} missing")
    every = set().union(*lengths.values())
    for dist, found in lengths.items():
        if found and every - found:
            absent = ", ".join(f"{length:g}" for length in sorted(every - found))
            faults.append(f"distribution {dist} not measured at L = {absent}, where others were")
    return faults


def _wrong_baseline(decisive: pd.DataFrame, rules: Rules, baseline: str) -> list[str]:
    # A speed-up over something that computes another result is no speed-up. Where the judged row is wrong too, that
    # row fails on its own and the baseline does not matter.
    limit = rules.stability_max_mae
    mine = decisive[(decisive["backend"] != baseline) & (decisive["mae"] <= limit)][_SHAPE_KEY].drop_duplicates()
    bad = decisive[(decisive["backend"] == baseline) & (decisive["mae"] > limit)].merge(mine, on=_SHAPE_KEY)
    if bad.empty:
        return []
    return [f"the baseline computed something else (MAE {bad['mae'].max():.3g} against the oracle): {where(bad)}"]


def _name(table: Table) -> str:
    return table.path.rsplit("/", 1)[-1]
