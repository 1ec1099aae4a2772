"""Chooses a backend: a pure function of the problem, the device, the build, the policy and the switches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from nsa_sel.errors import ArgumentError, ArgumentTypeError, BackendError
from nsa_sel.policy import Policy
from nsa_sel.problem import Problem
from nsa_sel.switches import Switches

BACKENDS = ("auto", "cuda", "triton", "sdpa")
KERNEL_DTYPES = ("float16", "bfloat16")
ADA = (8, 9)  # off until a policy turns it on: no decode kernel has been shown to pay there


class Decision(NamedTuple):
    """Which backend runs a call and why.

    >>> import nsa_sel, torch
    >>> q, k = torch.zeros(1, 1, 1, 1, 8), torch.zeros(1, 1, 4, 8)
    >>> nsa_sel.explain(q, k, k, torch.tensor([[[[[0, 4]]]]]))
    Decision(backend='sdpa', reason='tensors on cpu')
    """

    backend: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """The GPU that holds the tensors."""

    name: str  # as the driver reports it; the key of a policy
    capability: tuple[int, int]
    sm_count: int = 0


class Instance(NamedTuple):
    """One compiled kernel."""

    name: str
    dtype: str
    Dk: int
    Dv: int
    head_tile: int = 0  # query heads that it handles at once; 0 where it does not matter


@dataclass(frozen=True, slots=True)
class BuildInfo:
    """What this build holds."""

    kernels: bool
    reason: str | None = None  # why there are no kernels
    instances: tuple[Instance, ...] = ()
    architectures: tuple[int, ...] = ()  # as 90; PTX of the last serves what is newer; empty: not looked at
    max_heads: int = 64  # per group

    def instance_for(self, problem: Problem) -> Instance | None:
        """Return the instance that runs `problem`: the smallest head tile that holds h, else the largest."""
        if problem.h > self.max_heads:
            return None
        best = None
        for instance in self.instances:
            if (instance.dtype, instance.Dk, instance.Dv) != (problem.dtype, problem.Dk, problem.Dv):
                continue
            if best is None or _tile_rank(instance, problem.h) < _tile_rank(best, problem.h):
                best = instance
        return best

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether the build holds machine code, or PTX, for a device of this compute capability."""
        wanted = capability[0] * 10 + capability[1]
        same_major = any(a // 10 == capability[0] and a <= wanted for a in self.architectures)
        return not self.architectures or same_major or max(self.architectures) <= wanted


def _tile_rank(instance: Instance, heads: int) -> tuple[bool, int]:
    too_small = instance.head_tile < heads
    return too_small, -instance.head_tile if too_small else instance.head_tile


Refused = frozenset[tuple[int, str]]  # (device index, instance name) whose launch was refused before
Limit = Callable[[Problem], str | None]  # a backend's own word on why it cannot run a problem


def decide(
    problem: Problem,
    device: DeviceInfo | None,
    build: BuildInfo,
    policy: Policy | None,
    switches: Switches,
    refused: Refused = frozenset(),
    backend: str = "auto",
    *,
    cuda_limit: Limit | None = None,
    triton_limit: Limit | None = None,
) -> Decision:
    """Choose the backend for `problem`; the rules below stand in the order of the contract's table.

    Args:
        device: the GPU that holds the tensors, None where they are elsewhere.
        policy: what was measured, None where nothing was.
        refused: launches that failed before and are not tried again by "auto".
        backend: "auto", or a backend that must run.
        cuda_limit: what the kernel path itself cannot do (asked last of all that bars it); None: no limits.
        triton_limit: the same for Triton; None: this build has no Triton backend.

    Raises:
        ArgumentError: no such backend.
        BackendError: a forced backend cannot run; the message says why.
    """
    if backend != "auto":
        return _forced(problem, device, build, switches, backend, cuda_limit, triton_limit)

    barred = _cuda_bar(problem, device, build, cuda_limit)
    if barred is None and switches.cuda is False:
        barred = "NSA_SEL_CUDA=0"
    if barred is None and refused:
        instance = build.instance_for(problem)
        if instance is not None and (problem.device_index, instance.name) in refused:
            barred = f"kernel {instance.name} was refused at launch on this device before"
    if barred is not None:
        return _without_cuda(problem, device, policy, switches, triton_limit, barred)
    assert device is not None  # CUDA tensors always come with one

    if switches.cuda is True:
        return Decision("cuda", "NSA_SEL_CUDA=1")
    rule = policy.rule(device.name, "cuda") if policy is not None else None
    if rule is not None:
        if not rule.enabled:
            return Decision("sdpa", f"policy: cuda is off on {device.name}")
        if problem.max_selected is not None and problem.max_selected < rule.min_l:
            return Decision("sdpa", f"policy: L bound below min_l={rule.min_l} on {device.name}")
        return Decision("cuda", f"policy: cuda is on for {device.name}")
    if device.capability == ADA:
        return Decision("sdpa", "compute capability 8.9 with no policy that turns it on")
    return Decision("cuda", "not measured here")


def _cuda_bar(problem: Problem, device: DeviceInfo | None, build: BuildInfo, limit: Limit | None) -> str | None:
    """Say why the kernel cannot run this problem, or None."""
    if problem.device_type != "cuda" or device is None:
        return f"tensors on {problem.device_type}"
    if problem.dtype not in KERNEL_DTYPES:
        return f"no kernel takes {problem.dtype}"
    if problem.requires_grad:
        return "gradients required"
    if not build.kernels:
        return f"this build has no kernels: {build.reason}"
    if build.instance_for(problem) is None:
        return f"no kernel compiled for {problem.dtype} Dk={problem.Dk} Dv={problem.Dv} h={problem.h}"
    if not build.runs_on(device.capability):
        return f"no kernel compiled for compute capability {device.capability[0]}.{device.capability[1]}"
    if problem.misaligned is not None:
        return problem.misaligned
    return limit(problem) if limit is not None else None


def _triton_bar(problem: Problem, limit: Limit | None) -> str | None:
    if limit is None:
        return "this build has no Triton backend"
    return limit(problem)


def _without_cuda(
    problem: Problem,
    device: DeviceInfo | None,
    policy: Policy | None,
    switches: Switches,
    triton_limit: Limit | None,
    barred: str,
) -> Decision:
    """Choose where cuda cannot run: packed SDPA, unless Triton was asked for and may."""
    if switches.triton and device is not None and problem.max_selected is not None:
        rule = policy.rule(device.name, "triton") if policy is not None else None
        least = max(switches.triton_min_l, rule.min_l if rule is not None else 0)
        allowed = (rule is None or rule.enabled) and (device.capability != ADA or switches.triton_force)
        if allowed and problem.max_selected >= least and _triton_bar(problem, triton_limit) is None:
            return Decision("triton", f"NSA_SEL_TRITON=1; {barred}")
    return Decision("sdpa", barred)


def _forced(
    problem: Problem,
    device: DeviceInfo | None,
    build: BuildInfo,
    switches: Switches,
    backend: str,
    cuda_limit: Limit | None,
    triton_limit: Limit | None,
) -> Decision:
    if not isinstance(backend, str):
        raise ArgumentTypeError(f"backend: expected one of {', '.join(BACKENDS)}, got {type(backend).__name__}")
    if backend == "cuda":
        why = "NSA_SEL_CUDA=0 forbids it" if switches.cuda is False else None
        why = why or _cuda_bar(problem, device, build, cuda_limit)
    elif backend == "triton":
        why = "NSA_SEL_TRITON=0 forbids it" if switches.triton is False else None
        why = why or _triton_bar(problem, triton_limit)
    elif backend == "sdpa":
        why = None
    else:
        raise ArgumentError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if why is not None:
        raise BackendError(f"backend={backend!r}: expected a call that it can run, got one that it cannot: {why}")
    return Decision(backend, f"backend={backend!r}")
