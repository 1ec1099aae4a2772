"""The sweep over the Triton backend's settings, and the best of them for each bucket of L."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from nsa_sel.measure.run import clock
from nsa_sel.measure.run.bench import figure
from nsa_sel.measure.run.contestants import Contestant, Own, check_of
from nsa_sel.measure.run.environment import device_columns
from nsa_sel.measure.run.race import Settings, cold_variants, oracle_of, race, too_large
from nsa_sel.measure.run.workload import Workload

COLUMNS = (
    "workload",
    "dist",
    "dtype",
    "L",
    "bucket",
    "rows",
    "block_tokens",
    "block_dims",
    "num_warps",
    "num_stages",
    "ran",
    "mode",
    "iters",
    "ms_median",
    "ms_p20",
    "ms_p80",
    "mae",
    "max_err",
    "device",
    "sm",
    "commit",
)
FILE = "tune_triton.csv"


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


def sweep(
    workloads: Iterable[Workload],
    backend: Tunable,
    settings: Settings,
    rows: list[dict[str, Any]],
    contestant: Contestant | None = None,
    configs: list[Config] | None = None,
) -> Iterator[str]:
    """Time every configuration on every workload in the first mode, adding to `rows`; yields each workload's name."""
    contestant, mode, device = contestant or Own("triton", interpreted=True), settings.modes[0], settings.device
    for workload in workloads:
        if too_large(workload, device) is None:
            variants = cold_variants(workload, settings)
            oracle = oracle_of(workload, variants[0], settings.seed)
            for config in configs or grid():
                with backend.using(config):
                    one = race([contestant], variants, mode, settings, oracle).timed[contestant.name]
                row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
                row |= {"workload": workload.name, "dist": workload.dist, "dtype": workload.dtype, "L": workload.L}
                row |= {"bucket": bucket_of(workload.L), "rows": workload.rows, **asdict(config), "ran": one.ran}
                row |= {"mode": mode, "iters": len(one.samples), **device_columns(device)}
                if one.samples:
                    median, low, high = clock.quantiles(one.samples)
                    row |= {"ms_median": figure(median), "ms_p20": figure(low), "ms_p80": figure(high)}
                    row |= {"mae": figure(one.mae), "max_err": figure(one.max_err)}
                    if not one.mae <= check_of(workload):
                        row["ran"] = ""  # a configuration that computes something else is no candidate
                rows.append(row)
        yield workload.name


def best_by_bucket(rows: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    """Return for each bucket of L the configuration with the smallest worst slowdown over the bucket's workloads.

    A workload's slowdown is its time over the best time that any configuration reached on it. A configuration that
    did not run on every workload of the bucket is no candidate.
    """
    found: dict[str, dict[str, Any]] = {}
    for bucket in sorted({row["bucket"] for row in rows}):
        mine = [row for row in rows if row["bucket"] == bucket]
        names = {row["workload"] for row in mine}
        times: dict[Config, dict[str, float]] = {}
        for row in mine:
            if row["ran"] == name:
                config = Config(row["block_tokens"], row["block_dims"], row["num_warps"], row["num_stages"])
                times.setdefault(config, {})[row["workload"]] = float(row["ms_median"])
        whole = {config: by_name for config, by_name in times.items() if set(by_name) == names}
        if not whole:
            continue
        best = {workload: min(by_name[workload] for by_name in whole.values()) for workload in names}
        slowdown = {config: max(by_name[w] / best[w] for w in names) for config, by_name in whole.items()}
        chosen = min(slowdown, key=lambda config: slowdown[config])
        found[str(bucket)] = {**asdict(chosen), "worst_slowdown": round(slowdown[chosen], 4), "workloads": len(names)}
    return found
