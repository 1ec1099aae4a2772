"""The sweep over the Triton backend's settings, and the best of them for each bucket of L."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from nsa_sel.measure import schema
from nsa_sel.measure.files import csv_text, write_atomically
from nsa_sel.measure.run.contestants import Contestant, check_of, own
from nsa_sel.measure.run.environment import device_columns, environment
from nsa_sel.measure.run.race import Settings, race, set_up, too_large
from nsa_sel.measure.run.workload import Workload

FILE = "tune_triton.csv"
SETTINGS = ("block_tokens", "block_dims", "num_warps", "num_stages")
COLUMNS = (
    "workload", "dist", "dtype", "L", "bucket", "rows", *SETTINGS, "ran", "mode", "iters", *schema.TIMES, "mae",
    "max_err", *schema.WHERE,
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One setting of a Triton kernel: tokens and head dimensions of a block, warps, stages of the pipeline."""

    block_tokens: int
    block_dims: int
    num_warps: int
    num_stages: int


class Tunable(Protocol):
    """A backend whose settings can be set for the calls inside a `with`."""

    def using(self, config: Config) -> contextlib.AbstractContextManager[None]:
        """Run every call inside with `config`."""


def grid() -> list[Config]:
    """Return every configuration of the sweep.

    >>> len(grid())
    81
    """
    return [Config(*values) for values in itertools.product((64, 128, 256), (32, 64, 128), (2, 4, 8), (1, 2, 3))]


def bucket_of(length: int) -> int:
    """Return the bucket of L: the next power of two, at least 16.

    >>> [bucket_of(length) for length in (1, 16, 17, 1000)]
    [16, 16, 32, 1024]
    """
    return max(16, 1 << (length - 1).bit_length())


def run_tune(workloads: list[Workload], backend: Tunable, settings: Settings, out: Path) -> Iterator[str]:
    """Sweep `workloads` and write tune_triton.csv and tune_triton.json; yields the names of what is done.

    Raises:
        ValueError: there is no GPU here, nor Triton's interpreter.
    """
    if settings.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("tune: expected a GPU, or Triton's interpreter (TRITON_INTERPRET=1), got neither")
    rows: list[dict[str, Any]] = []
    yield from sweep(workloads, backend, settings, rows, own("triton", interpreted=True))
    how = {"seed": settings.seed, "iters": settings.iters, "warmup": settings.warmup, "modes": list(settings.modes)}
    data = {"environment": environment(settings.device, **how), "best": best_by_bucket(rows, "triton")}
    write_atomically((out / FILE).with_suffix(".json"), json.dumps(data, indent=1) + "\n")
    write_atomically(out / FILE, csv_text(COLUMNS, rows))


def sweep(
    workloads: Iterable[Workload],
    backend: Tunable,
    settings: Settings,
    rows: list[dict[str, Any]],
    contestant: Contestant,
) -> Iterator[str]:
    """Time every configuration on every workload in the first mode, adding to `rows`; yields each workload's name."""
    mode, device = settings.modes[0], settings.device
    for workload in workloads:
        if too_large(workload, device) is None:
            variants, oracle = set_up(workload, settings)
            for config in grid():
                with backend.using(config):
                    one = race([contestant], variants, mode, settings, oracle).timed[contestant.name]
                row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
                row |= {"workload": workload.name, "dist": workload.dist, "dtype": workload.dtype, "L": workload.L}
                row |= {"bucket": bucket_of(workload.L), "rows": workload.rows, **asdict(config)}
                row |= {"mode": mode, "iters": len(one.samples), **one.columns(), **device_columns(device)}
                # A configuration that computes something else is no candidate.
                rows.append(row | {"ran": one.ran if one.mae <= check_of(workload) else ""})
        yield workload.name


def best_by_bucket(rows: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """Return for each bucket of L the configuration with the smallest worst slowdown over the bucket's workloads.

    A workload's slowdown is its time over the best time that any configuration reached on it. A configuration that
    did not run on every workload of the bucket is no candidate.
    """
    import pandas as pd

    found: dict[str, dict[str, Any]] = {}
    for bucket, mine in pd.DataFrame(rows).groupby("bucket"):
        ran = mine[mine["ran"] == name].astype({"ms_median": float})
        times = ran.pivot_table(index=list(SETTINGS), columns="workload", values="ms_median")
        times = times.reindex(columns=sorted(set(mine["workload"]))).dropna()  # [settings, workloads]
        if not times.empty:
            worst = (times / times.min()).max(axis="columns")
            chosen = dict(zip(SETTINGS, map(int, worst.idxmin()), strict=True))
            found[str(bucket)] = chosen | {"worst_slowdown": round(worst.min(), 4), "workloads": times.shape[1]}
    return found
