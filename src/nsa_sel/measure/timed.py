"""Timing one contestant: its samples, what proved to have run, and its error against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import nsa_sel
from nsa_sel.measure import clock
from nsa_sel.measure.contestants import OWN, Contestant
from nsa_sel.measure.inputs import Inputs, variants_of
from nsa_sel.measure.workload import Workload


@dataclass(frozen=True)
class Settings:
    """How to measure, the same for every workload of a run."""

    device: torch.device
    modes: tuple[str, ...]
    seed: int = 0
    iters: int = 50
    warmup: int = 5


@dataclass
class Timed:
    """One contestant's samples in one mode, what proved to have run, and its error against the oracle."""

    samples: list[float]
    ran: str
    mae: float
    max_err: float
    reason: str = ""


def time_contestant(
    contestant: Contestant,
    variants: list[Inputs],
    mode: str,
    settings: Settings,
    oracle: tuple[torch.Tensor, list[tuple[int, int, int]]],
) -> Timed:
    """Time a contestant on the variants and hold its result on the first against the oracle's (values, rows)."""
    nothing = Timed([], "", float("nan"), float("nan"))
    reason = clock.refused_mode(mode, settings.device) or contestant.refuses(variants[0])
    if reason:
        nothing.reason = reason
        return nothing
    before = counts()
    calls = 0
    last: list[torch.Tensor] = []

    def watched(prepared: Callable[[], torch.Tensor], keep: bool) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            nonlocal calls
            calls += 1
            out = prepared()
            if keep:
                # In graph mode the capture is the last call, so what is kept is what the replays write.
                last[:] = [out]
            return out

        return call

    try:
        prepared = [watched(contestant.prepare(variant), index == 0) for index, variant in enumerate(variants)]
        samples = clock.samples(prepared, mode, settings.device, settings.iters, settings.warmup)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, ImportError) as error:
        # A peer's own refusal, or no memory: the row says that it did not run. Sticky CUDA errors come up again at
        # the next call.
        nothing.reason = f"{type(error).__name__}: {error}"
        return nothing
    ran = proof(contestant.name, before, counts(), calls)
    mae, max_err = errors(last[0], *oracle)
    return Timed(
        samples, ran, mae, max_err, "" if ran == contestant.name else f"ran {ran or 'nothing that was counted'}"
    )


def proof(name: str, before: dict[str, int], after: dict[str, int], calls: int) -> str:
    """Return which backends ran by the package's own counts: `name` only where every call is counted for it alone.

    >>> proof("cuda", {"cuda": 1}, {"cuda": 4}, calls=3)
    'cuda'
    >>> proof("cuda", {}, {"sdpa": 3}, calls=3)
    'sdpa'
    >>> proof("cuda", {}, {"cuda": 2, "sdpa": 1}, calls=3)
    'cuda+sdpa'
    >>> proof("cuda", {}, {"cuda": 2}, calls=3)
    'cuda (2 of 3 calls)'
    """
    ran = {
        backend: count - before.get(backend, 0) for backend, count in after.items() if count > before.get(backend, 0)
    }
    if name not in OWN:
        # What is not this package's own must not have called it: a peer that times this package is no peer.
        return name if not ran else "+".join(sorted(ran))
    if ran == {name: calls}:
        return name
    if set(ran) == {name}:
        return f"{name} ({ran[name]} of {calls} calls)"
    return "+".join(sorted(ran))


def errors(out: torch.Tensor, expected: torch.Tensor, rows: list[tuple[int, int, int]]) -> tuple[float, float]:
    """Return mean and largest absolute error of `out` [B, S, G, h, Dv] at the sampled rows; NaN makes both NaN."""
    index = torch.tensor(rows, device=out.device).unbind(dim=1)
    difference = (out[index].to("cpu", torch.float64) - expected).abs()
    return float(difference.mean()), float(difference.max())


def cold_variants(workload: Workload, settings: Settings) -> list[Inputs]:
    """Return the workload's inputs in so many variants that together they do not fit into L2."""
    device = settings.device
    return variants_of(workload, settings.seed, device, _cold_bytes(device), free_memory(device) // 3)


def counts() -> dict[str, int]:
    """Return how many calls each backend of this package has run so far."""
    return {backend: sum(reasons.values()) for backend, reasons in nsa_sel.stats().items()}


def _cold_bytes(device: torch.device) -> int:
    return 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def free_memory(device: torch.device) -> int:
    """Return the bytes that inputs may take: of a GPU's free memory, or a fixed part of a CPU machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return 3 << 30


def too_large(workload: Workload, device: torch.device) -> str | None:
    """Return why a workload does not fit into this device's memory, for any backend, or None."""
    gathered = workload.rows * workload.L * (workload.Dk + workload.Dv) * 4
    if device.type == "cuda":
        torch.cuda.empty_cache()
    need, have = workload.cache_bytes + 2 * gathered, free_memory(device)
    return None if need <= have else f"needs {need / 1e9:.1f} GB, {have / 1e9:.1f} GB are free"
