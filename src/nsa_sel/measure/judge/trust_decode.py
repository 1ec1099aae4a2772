"""Whether a decode.csv can be believed, and the rows of it that decide."""

from __future__ import annotations

import pandas as pd

from nsa_sel.measure import schema
from nsa_sel.measure.judge.rules import Rules
from nsa_sel.measure.judge.tables import Table, where
from nsa_sel.measure.judge.trust import device_faults, number_faults, time_faults

_STEP = ["B", "context"]


def decode_faults(table: Table, rules: Rules, backend: str) -> list[str]:
    """Return every reason why `table` does not show the share of `backend`'s selection; an empty list where it does."""
    if table.frame is None:
        return table.faults
    frame = table.frame
    faults = _stages(frame, backend)
    rows = step_rows(frame, backend)
    faults += [*_did_not_run(rows), *device_faults(frame)]
    claims = frame[
        frame["backend"].isin([backend, schema.TORCH]) | (frame["ran"] != "") | (frame["ms_median_text"] != "")
    ]
    faults += number_faults(claims, schema.DECODE_COUNTS, schema.DECODE_FIGURES)
    faults += time_faults(claims, schema.DECODE_TIMES)
    faults += _shares(claims, rows, rules)
    if (rows["stage"] == "select").any():
        faults += _grid(rows)
    name = table.path.rsplit("/", 1)[-1]
    return [f"{name}: {fault}" for fault in faults]


def step_rows(frame: pd.DataFrame, backend: str) -> pd.DataFrame:
    """Return the rows of the steps that select with `backend`: its own, and PyTorch's for the stages it has none of."""
    own = frame[frame["backend"] == backend]
    torch = frame[frame["backend"] == schema.TORCH]
    keys = pd.MultiIndex.from_frame(own[[*_STEP, "stage"]])
    return pd.concat([own, torch[~pd.MultiIndex.from_frame(torch[[*_STEP, "stage"]]).isin(keys)]]).sort_values("line")


def decode_remarks(table: Table, backend: str) -> list[str]:
    """Return what is odd about a believable file without deciding anything: for the reader of the record."""
    rows = step_rows(table.rows, backend)
    remarks = []
    solid = rows[rows["share"] > 0.01]  # below this the share's rounding moves the step it implies
    steps = (solid["ms_median"] / solid["share"]).groupby([solid["B"], solid["context"]])
    spread = steps.max() / steps.min()
    if (spread > 1.05).any():
        b, context = spread.idxmax()
        remarks.append(f"the stages' shares imply different steps at B={b:g}, context={context:g}")
    dense = rows[rows["context"] <= 1024]
    if len(dense):
        remarks.append(f"nothing is sparse yet at contexts up to 1,024: {where(dense)}")
    if rows["commit"].nunique() > 1:
        remarks.append(f"rows of {rows['commit'].nunique()} commits: {', '.join(sorted(set(rows['commit'])))}")
    name = table.path.rsplit("/", 1)[-1]
    return [f"{name}: {remark}" for remark in remarks]


def _stages(frame: pd.DataFrame, backend: str) -> list[str]:
    faults = []
    unknown = frame[~frame["stage"].isin(schema.STAGES)]
    if len(unknown):
        faults.append(f"unknown stage {unknown.iloc[0]['stage']!r}: {where(unknown)}")
    selecting = frame[frame["stage"] == "select"]
    if selecting.empty:
        return [*faults, "no select stage"]
    if not (selecting["backend"] == backend).any():
        held = ", ".join(sorted(set(selecting["backend"])))
        return [*faults, f"no select stage of backend {backend} (it holds {held})"]
    return faults


def _did_not_run(rows: pd.DataFrame) -> list[str]:
    faults = []
    for backend, group in rows[rows["ran"] != rows["backend"]].groupby("backend"):
        ran = group.iloc[0]["ran"]
        faults.append(f"backend {backend} did not run ({'ran ' + repr(ran) if ran else 'nothing ran'}): {where(group)}")
    return faults


def _shares(claims: pd.DataFrame, rows: pd.DataFrame, rules: Rules) -> list[str]:
    faults = []
    bad = claims[(claims["share"] < 0) | (claims["share"] > 1)]
    if len(bad):
        faults.append(f"share is no fraction of the step (got {bad.iloc[0]['share']:g}): {where(bad)}")
    total = rows.groupby(_STEP)["share"].sum()
    over = total[total > rules.trust_share_sum]
    if len(over):
        b, context = over.index[0]
        faults.append(f"the stages take more than their step: {over.iloc[0]:.3g} of it at B={b:g}, context={context:g}")
    return faults


def _grid(rows: pd.DataFrame) -> list[str]:
    """Every B at every context, every stage once: a step without a stage makes the others' shares look larger."""
    faults = []
    again = rows[rows.duplicated([*_STEP, "stage"], keep=False)]
    if len(again):
        faults.append(f"the same stage stands more than once, and nothing says which holds: {where(again)}")
    for (b, context), step in rows.groupby(_STEP):
        missing = [stage for stage in schema.STAGES if stage not in set(step["stage"])]
        if missing:
            faults.append(f"stage {', '.join(missing)} missing at B={b:g}, context={context:g}")
    contexts = set(rows["context"].dropna())
    for b, group in rows.groupby("B"):
        absent = sorted(contexts - set(group["context"]))
        if absent:
            listed = ", ".join(f"{context:g}" for context in absent)
            faults.append(f"B={b:g} not measured at context {listed}, where another B was")
    return faults
