"""Planted data sets: believable files, and one change for each way in which such files have lied.

Every figure in a believable file follows from a shape and a time, so that one changed cell is one contradiction.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from nsa_sel.measure import schema

DEVICE, SM, COMMIT = "NVIDIA H100 80GB HBM3", "90", "0123456789ab"
LENGTHS = (64, 256, 1024)
CEILING = 2500.0  # GB/s


def bench(
    speedups: dict[int, float] | None = None,
    modes: tuple[str, ...] = ("graph",),
    dists: tuple[str, ...] = schema.DISTRIBUTIONS,
    backend: str = "cuda",
) -> pd.DataFrame:
    """Return a believable bench frame; `speedups` by L, 2x everywhere by default."""
    rows = []
    for mode in modes:
        for dist in dists:
            for length, speedup in (speedups or dict.fromkeys(LENGTHS, 2.0)).items():
                rows += _case(dist, length, speedup, mode, backend)
    return pd.DataFrame(rows, columns=list(schema.BENCH_COLUMNS))


def _case(dist: str, length: int, speedup: float, mode: str, backend: str) -> list[dict]:
    slots = {"few": 1}.get(dist, 8)
    moved = schema.call_bytes(rows=256, h=4, dims=(128, 128), n=slots, length=length, element=2)
    shape = {"B": 128, "S": 1, "G": 2, "h": 4, "Dk": 128, "Dv": 128, "S_kv": 4096, "n": slots, "L": length, "rows": 256}
    baseline_ms = 0.02 + 4 * moved / CEILING / 1e6
    cases = []
    for name, ms, factor in ((backend, baseline_ms / speedup, speedup), ("sdpa", baseline_ms, 1.0)):
        rate = moved / ms / 1e6
        cases.append(
            {"workload": f"w-{dist}-L{length}", "dist": dist, "dtype": "bf16", **shape, "backend": name, "ran": name}
            | {"mode": mode, "iters": 50, "ms_median": ms, "ms_p20": ms * 0.98, "ms_p80": ms * 1.03, "bytes": moved}
            | {"gbps": rate, "ceiling_gbps": CEILING, "ceiling_share": rate / CEILING, "speedup": factor}
            | {"mae": 2e-4, "max_err": 4e-3, "device": DEVICE, "sm": SM, "commit": COMMIT}
        )
    return cases


def decode(
    shares: dict[int, tuple[float, ...]] | None = None, contexts: tuple[int, ...] = (4096, 16384, 65536)
) -> pd.DataFrame:
    """Return a believable decode frame; `shares` of the select stage by B, one for each context (0.4 by default)."""
    rows = []
    for batch, by_context in (shares or {1: (0.4,) * 3, 8: (0.4,) * 3}).items():
        for context, select in zip(contexts, by_context, strict=True):
            rest = (0.97 - select) / 4  # 3 % of the step lies between the stages
            for stage in schema.STAGES:
                share = select if stage == "select" else rest
                backend = "cuda" if stage == "select" else schema.TORCH
                ms = 0.2 * batch**0.5 * share
                rows.append(
                    {
                        "B": batch,
                        "context": context,
                        "stage": stage,
                        "ms_median": ms,
                        "ms_p20": ms * 0.98,
                        "ms_p80": ms * 1.05,
                    }
                    | {"share": share, "backend": backend, "ran": backend, "device": DEVICE, "sm": SM, "commit": COMMIT}
                )
    return pd.DataFrame(rows, columns=list(schema.DECODE_COLUMNS))


def write(
    folder: Path, bench_frame: pd.DataFrame | None = None, decode_frame: pd.DataFrame | None = None
) -> tuple[Path, Path]:
    """Write bench.csv and decode.csv into `folder` (believable ones where none is given) and return their paths."""
    paths = folder / "bench.csv", folder / "decode.csv"
    (bench() if bench_frame is None else bench_frame).to_csv(paths[0], index=False)
    (decode() if decode_frame is None else decode_frame).to_csv(paths[1], index=False)
    return paths


def cell(frame: pd.DataFrame, column: str, value: object, **where: object) -> pd.DataFrame:
    """Return `frame` with `column` set to `value` in the rows whose other columns are as `where` says."""
    changed = frame.astype(object)
    mask = pd.Series(True, index=frame.index)
    for name, wanted in where.items():
        mask &= frame[name] == wanted
    assert mask.any(), f"no row where {where}"
    changed.loc[mask, column] = value
    return changed


def without(frame: pd.DataFrame, **where: object) -> pd.DataFrame:
    """Return `frame` without the rows whose columns are as `where` says."""
    mask = pd.Series(True, index=frame.index)
    for name, wanted in where.items():
        mask &= frame[name] == wanted
    assert mask.any(), f"no row where {where}"
    return frame[~mask]
