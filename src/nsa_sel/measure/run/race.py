"""The race: contestants on the same inputs, one sample each in turn, with what proved to have run and every failure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import nsa_sel
from nsa_sel.measure.run import clock
from nsa_sel.measure.run.contestants import Contestant
from nsa_sel.measure.run.environment import clocks
from nsa_sel.measure.run.inputs import Inputs, oracle_rows, variants_of
from nsa_sel.measure.run.workload import Workload
from nsa_sel.measure.schema import OWN
from nsa_sel.reference import selection_attention_reference

CLOCK_DRIFT = 0.03  # of a case measured again, at most twice; what remains is for the judge
Oracle = tuple[torch.Tensor, list[tuple[int, int, int]]]  # values [rows, h, Dv] in fp64, and which rows (b, s, g)


class ContextLostError(RuntimeError):
    """A contestant left the CUDA context broken: nothing further can run in this process."""


@dataclass(frozen=True)
class Settings:
    """How to measure, the same for every workload of a run."""

    device: torch.device
    modes: tuple[str, ...]
    seed: int = 0
    iters: int = 50
    warmup: int = 5
    anchor_off: float = 0.03  # how far a peer's process may time sdpa from this one


@dataclass
class Timed:
    """One contestant's samples in one mode, what proved to have run, and its error against the oracle."""

    samples: list[float] = field(default_factory=list)
    ran: str = ""
    mae: float = float("nan")
    max_err: float = float("nan")
    reason: str = ""

    def columns(self) -> dict[str, str]:
        """Return times and errors as the columns of a CSV file, none where nothing was timed."""
        if not self.samples:
            return {}
        return clock.columns(self.samples) | {"mae": clock.figure(self.mae), "max_err": clock.figure(self.max_err)}


@dataclass
class Case:
    """All contestants of one workload in one mode, and the clocks in MHz before and after."""

    timed: dict[str, Timed] = field(default_factory=dict)
    clocks: list[dict[str, int] | None] = field(default_factory=list)


def drift(before: dict[str, int] | None, after: dict[str, int] | None) -> float:
    """Return the largest change of a clock, as a fraction; 0 where none could be read."""
    return max((abs(after[k] / before[k] - 1) for k in before), default=0.0) if before and after else 0.0


def race(
    contestants: Sequence[Contestant],
    variants: list[Inputs],
    mode: str,
    settings: Settings,
    oracle: Oracle,
    others: dict[str, Sequence[clock.Call]] | None = None,
) -> Case:
    """Time contestants in turns, so that all see the same clocks; `others` are calls of which nothing is proven.

    Raises:
        ContextLostError: a CUDA error that no later call in this process survives. `args[1]` is the Case so far.
    """
    with clock.measuring(settings.device):
        for _ in range(3):
            case = _once(contestants, variants, mode, settings, oracle, others or {})
            if drift(*case.clocks) <= CLOCK_DRIFT:
                break
    return case


def _once(
    contestants: Sequence[Contestant],
    variants: list[Inputs],
    mode: str,
    settings: Settings,
    oracle: Oracle,
    others: dict[str, Sequence[clock.Call]],
) -> Case:
    entrants = [_Entrant(contestant, variants, mode, settings) for contestant in contestants]
    case = Case({entrant.name: entrant.timed for entrant in entrants})
    try:
        for entrant in entrants:
            entrant.enter()
        plain = {name: clock.sampler(calls, mode, settings.device, settings.warmup) for name, calls in others.items()}
        case.timed |= {name: Timed(ran=name) for name in plain}
        case.clocks = [clocks(settings.device)]
        for _ in range(settings.iters):
            for entrant in entrants:
                entrant.take()
            for name, sample in plain.items():
                case.timed[name].samples.append(sample())
        case.clocks.append(clocks(settings.device))
        for entrant in entrants:
            entrant.finish(oracle)
    except ContextLostError as error:
        for one in case.timed.values():
            one.samples, one.ran = [], ""
            one.reason = one.reason or f"not measured: {error.args[0]}"
        raise ContextLostError(error.args[0], case) from error
    return case


class _Entrant:
    """One contestant of a race: whatever it raises ends its part, and no other's."""

    def __init__(self, contestant: Contestant, variants: list[Inputs], mode: str, settings: Settings) -> None:
        self.contestant, self.variants, self.mode, self.settings = contestant, variants, mode, settings
        self.name, self.timed = contestant.name, Timed()
        self.calls, self.ran = 0, Counter[str]()
        self.last: list[torch.Tensor] = []
        self.sample: clock.Sample | None = None

    def enter(self) -> None:
        self.timed.reason = clock.refused_mode(self.mode, self.settings.device) or ""
        self._guarded(self._prepare)

    def take(self) -> None:
        if self.sample is not None:
            self._guarded(lambda: self.timed.samples.append(self.sample()))  # type: ignore[misc]

    def finish(self, oracle: Oracle) -> None:
        self.sample = None  # and with it a graph's memory
        if self.timed.samples:
            self._guarded(lambda: self._judge(oracle))

    def _prepare(self) -> None:
        self.timed.reason = self.contestant.refuses(self.variants[0]) or ""
        if not self.timed.reason:
            calls = [self._watched(self.contestant.prepare(v), i == 0) for i, v in enumerate(self.variants)]
            self.sample = clock.sampler(calls, self.mode, self.settings.device, self.settings.warmup)

    def _judge(self, oracle: Oracle) -> None:
        # In graph mode the capture was the last call, so what is kept is what the replays write.
        self.timed.mae, self.timed.max_err = errors(self.last[0], *oracle)
        self.timed.ran = proof(self.name, self.ran, self.calls)
        if self.timed.ran != self.name:
            self.timed.reason = f"ran {self.timed.ran or 'nothing that was counted'}"

    def _watched(self, prepared: Callable[[], torch.Tensor], keep: bool) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            self.calls += 1
            out = prepared()
            if keep:
                self.last[:] = [out]
            return out

        return call

    def _guarded(self, act: Callable[[], Any]) -> None:
        if self.timed.reason:
            return
        before = counts()
        try:
            act()
        except Exception as error:  # whatever it is, it is this contestant's: a row of its own says so
            self.timed.reason = f"{type(error).__name__}: {error}"
            self.timed.samples, self.sample = [], None
            try:
                _synchronize(self.settings.device)
            except RuntimeError as lost:
                raise ContextLostError(f"{self.name} broke the CUDA context ({lost})") from error
        finally:
            self.ran.update({name: count - before.get(name, 0) for name, count in counts().items()})


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def proof(name: str, ran: Counter[str], calls: int) -> str:
    """Return which backends ran by the package's own counts: `name` only where every call is counted for it alone.

    >>> proof("cuda", Counter(cuda=3), calls=3)
    'cuda'
    >>> proof("cuda", Counter(sdpa=3, cuda=0), calls=3)
    'sdpa'
    >>> proof("cuda", Counter(cuda=2, sdpa=1), calls=3)
    'cuda+sdpa'
    >>> proof("cuda", Counter(cuda=2), calls=3)
    'cuda (2 of 3 calls)'
    """
    names = sorted(backend for backend, count in ran.items() if count)
    if name not in OWN:
        # What is not this package's own must not have called it: a peer that times this package is no peer.
        return "+".join(names) or name
    if names == [name]:
        return name if ran[name] == calls else f"{name} ({ran[name]} of {calls} calls)"
    return "+".join(names)


def errors(out: torch.Tensor, expected: torch.Tensor, rows: list[tuple[int, int, int]]) -> tuple[float, float]:
    """Return mean and largest absolute error of `out` [B, S, G, h, Dv] at the sampled rows; NaN makes both NaN.

    Raises:
        ValueError: `out` has another shape.
    """
    outside = out.ndim != 5 or any(max(r) >= n for r, n in zip(zip(*rows, strict=True), out.shape[:3], strict=True))
    if outside or out.shape[3:] != expected.shape[1:]:
        raise ValueError(f"out: expected [B, S, G, {expected.shape[1]}, {expected.shape[2]}], got {list(out.shape)}")
    index = torch.tensor(rows, device=out.device).unbind(dim=1)
    difference = (out[index].to("cpu", torch.float64) - expected).abs()
    return float(difference.mean()), float(difference.max())


def set_up(workload: Workload, settings: Settings) -> tuple[list[Inputs], Oracle]:
    """Return a workload's inputs and what is right for its sampled rows.

    The variants select up to twice L2 together, as far as their number and memory allow.
    """
    device = settings.device
    cold = 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    with clock.measuring(device):
        variants = variants_of(workload, settings.seed, device, cold, free_memory(device) // 3)
        one, rows = variants[0], oracle_rows(workload, settings.seed)
        return variants, (selection_attention_reference(one.q, one.k, one.v, **one.selection(), rows=rows)[0], rows)


def counts() -> dict[str, int]:
    """Return how many calls each backend of this package has run so far."""
    return {backend: sum(reasons.values()) for backend, reasons in nsa_sel.stats().items()}


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
    need, have = workload.cache_bytes + 3 * gathered, free_memory(device)
    return None if need <= have else f"needs {need / 1e9:.1f} GB, {have / 1e9:.1f} GB are free"
