"""The decode loop: grow the context, choose blocks, attend to them, and hold the result against dense attention."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch

import nsa_sel
from nsa_sel.demo import dense, mass
from nsa_sel.demo.cache import SIGNAL, Cache
from nsa_sel.demo.scorer import PooledKeys
from nsa_sel.demo.shapes import SHAPES, Shape
from nsa_sel.reference import selection_attention_reference

WARMUP = 2  # steps at the start of each context that are not timed


@dataclass(frozen=True, slots=True)
class Settings:
    """What to decode and on what."""

    contexts: tuple[int, ...]  # ascending, tokens
    device: torch.device
    dtype: torch.dtype
    backend: str = "auto"
    seed: int = 0
    steps: int = 10  # timed decode steps per context
    shapes: tuple[Shape, ...] = SHAPES
    signal: float = SIGNAL


@dataclass(frozen=True, slots=True)
class Row:
    """What one context length showed; times are medians over the steps, in milliseconds."""

    shape: str
    context: int  # tokens in the cache at the last step
    device: str
    dtype: str
    backend: str  # that ran, as stats() counted it
    reason: str
    calls: int
    L: int  # tokens selected per row
    score_ms: float  # pool the new key, score the blocks, choose
    select_ms: float  # selection_attention
    dense_ms: float  # attention over the whole context, K and V contiguous, by `dense_how`
    dense_how: str  # the fastest of demo.dense.candidates in the warm-up
    speedup: float  # dense / select
    speedup_with_scoring: float  # dense / (score + select)
    max_err: float  # against the fp64 oracle
    captured: float  # share of the dense softmax mass on the selected tokens
    captured_random: float  # the same for random blocks with as many tokens


def run(settings: Settings, advance: Callable[[str], None] = lambda what: None) -> Iterator[Row]:
    """Decode each shape over each context length; `advance` hears of every step."""
    for shape in settings.shapes:
        cache = Cache(
            shape, settings.contexts[-1], dtype=settings.dtype, device=settings.device, seed=settings.seed,
            signal=settings.signal,
        )  # fmt: skip
        pooled = PooledKeys(cache.k, shape.block_size)
        random = torch.Generator().manual_seed(settings.seed)
        for context in settings.contexts:
            yield _decode(settings, cache, pooled, context, random, advance)


def steps_in(settings: Settings) -> int:
    """Return how often `run` calls `advance`."""
    return len(settings.shapes) * len(settings.contexts) * (WARMUP + settings.steps)


def _decode(
    settings: Settings,
    cache: Cache,
    pooled: PooledKeys,
    context: int,
    random: torch.Generator,
    advance: Callable[[str], None],
) -> Row:
    shape = cache.shape
    steps = WARMUP + settings.steps
    pooled.append(cache.extend(context - steps - cache.length))
    times: dict[str, list[float]] = {"score": [], "select": [], "dense": []}
    shares: list[tuple[float, float]] = []
    for step in range(steps):
        if step == WARMUP:  # only the timed calls are counted
            before = nsa_sel.stats()
        new_key = cache.extend(1)
        q = cache.query()
        block_indices, score = _timed(settings.device, _choose, pooled, new_key, q, shape.n)
        seq_lens = torch.tensor([cache.length], dtype=torch.int32, device=settings.device)
        out, select = _timed(settings.device, _select, settings, cache, q, block_indices, seq_lens)
        if step < WARMUP:
            dense_how = _fastest(settings.device, q[:, 0], *cache.dense)
        else:
            _, whole = _timed(settings.device, dense.candidates(settings.device)[dense_how], q[:, 0], *cache.dense)
            times["score"].append(score)
            times["select"].append(select)
            times["dense"].append(whole)
            selected = mass.selected_tokens(block_indices, shape.block_size, cache.length)
            probabilities = mass.dense_probabilities(q, cache.dense[0])
            other = mass.random_tokens(selected, shape.block_size, random)
            shares.append((mass.captured(probabilities, selected), mass.captured(probabilities, other)))
        advance(f"{shape.name}, {context:,} tokens")
    backend, reason, calls = _what_ran(before, nsa_sel.stats())
    if calls != settings.steps:
        raise RuntimeError(f"stats: expected {settings.steps} calls to be counted, got {calls}")
    score_ms, select_ms, dense_ms = (median(times[stage]) for stage in ("score", "select", "dense"))
    return Row(
        shape=shape.name,
        context=cache.length,
        device=_device_name(settings.device),
        dtype=str(settings.dtype).removeprefix("torch."),
        backend=backend,
        reason=reason,
        calls=calls,
        L=int(selected.sum(dim=-1).max()),
        score_ms=score_ms,
        select_ms=select_ms,
        dense_ms=dense_ms,
        dense_how=dense_how,
        speedup=dense_ms / select_ms,
        speedup_with_scoring=dense_ms / (score_ms + select_ms),
        max_err=_max_error(cache, q, block_indices, seq_lens, out),
        captured=sum(share for share, _ in shares) / len(shares),
        captured_random=sum(share for _, share in shares) / len(shares),
    )


def _choose(pooled: PooledKeys, new_key: torch.Tensor, q: torch.Tensor, n: int) -> torch.Tensor:
    pooled.append(new_key)
    return pooled.choose(q, n)


def _select(
    settings: Settings, cache: Cache, q: torch.Tensor, block_indices: torch.Tensor, seq_lens: torch.Tensor
) -> torch.Tensor:
    k, v = cache.stored
    out = nsa_sel.selection_attention(
        q, k, v, block_indices=block_indices, block_size=cache.shape.block_size, seq_lens=seq_lens,
        block_table=cache.block_table, backend=settings.backend,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out


def _fastest(device: torch.device, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    took = {name: _timed(device, way, q, k, v)[1] for name, way in dense.candidates(device).items()}
    return min(took, key=lambda name: took[name])


def _timed(device: torch.device, call: Callable[..., torch.Tensor], *args: object) -> tuple[torch.Tensor, float]:
    """Return the result of `call(*args)` and its time in ms, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call(*args)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, (time.perf_counter() - start) * 1e3


def _what_ran(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> tuple[str, str, int]:
    """Return backend, reason and calls between two stats(); more than one backend or reason is named as such."""
    new = [
        (backend, reason, calls - before.get(backend, {}).get(reason, 0))
        for backend, reasons in after.items()
        for reason, calls in reasons.items()
    ]
    new = [entry for entry in new if entry[2] > 0]
    backends, reasons = sorted({entry[0] for entry in new}), sorted({entry[1] for entry in new})
    return " + ".join(backends), "; ".join(reasons), sum(entry[2] for entry in new)


def _max_error(
    cache: Cache, q: torch.Tensor, block_indices: torch.Tensor, seq_lens: torch.Tensor, out: torch.Tensor
) -> float:
    k, v = cache.stored
    expected, _ = selection_attention_reference(
        q, k, v, block_indices=block_indices, block_size=cache.shape.block_size, seq_lens=seq_lens,
        block_table=cache.block_table,
    )  # fmt: skip
    return float((out.double().cpu() - expected.cpu()).abs().max())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
