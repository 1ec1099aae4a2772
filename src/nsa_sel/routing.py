"""Orders the backends for a call, by the rows of one table; what a backend cannot take, it says itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nsa_sel.call import Call
from nsa_sel.devices import DeviceInfo
from nsa_sel.errors import ArgumentError, ArgumentTypeError, BackendError
from nsa_sel.policy import Policy
from nsa_sel.switches import Switches

BACKENDS = ("auto", "cuda", "triton", "sdpa")
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


def decide(
    call: Call,
    device: DeviceInfo | None,
    policy: Policy | None,
    switches: Switches,
    limit: Callable[[str], str | None],
    refused: str | None = None,
    backend: str = "auto",
) -> Decision:
    """Choose the backend for `call`; the rules below stand in the order of the table in docs/configuration.md.

    Args:
        call: a checked call; only its bound of L is looked at here.
        device: the GPU that holds the tensors, None where they are elsewhere.
        policy: what was measured, None where nothing was.
        switches: what the environment asks for.
        limit: a backend's own word on why it cannot take the call, by its name; None where it can.
        refused: why the launch of this call's kernel is not tried again by "auto".
        backend: "auto", or a backend that must run.

    Raises:
        ArgumentError: no such backend.
        BackendError: a forced backend cannot run; the message says why.
    """
    if backend != "auto":
        return _forced(switches, limit, backend)
    barred = limit("cuda")
    if barred is None and switches.cuda is False:
        barred = "NSA_SEL_CUDA=0"
    barred = barred or refused
    if barred is not None:
        if _triton_may(call, device, policy, switches) and limit("triton") is None:
            return Decision("triton", f"NSA_SEL_TRITON=1; {barred}")
        return Decision("sdpa", barred)
    assert device is not None  # the kernel takes CUDA tensors alone, and they come with one

    if switches.cuda is True:
        return Decision("cuda", "NSA_SEL_CUDA=1")
    rule = policy.rule(device.name, "cuda") if policy is not None else None
    if rule is not None:
        if not rule.enabled:
            return Decision("sdpa", f"policy: cuda is off on {device.name}")
        if call.max_selected is not None and call.max_selected < rule.min_l:
            return Decision("sdpa", f"policy: L bound below min_l={rule.min_l} on {device.name}")
        return Decision("cuda", f"policy: cuda is on for {device.name}")
    if device.capability == ADA:
        return Decision("sdpa", "compute capability 8.9 with no policy that turns it on")
    return Decision("cuda", "not measured here")


def _triton_may(call: Call, device: DeviceInfo | None, policy: Policy | None, switches: Switches) -> bool:
    """Whether Triton was asked for where cuda cannot run, and nothing that was measured speaks against it."""
    if not switches.triton or device is None or call.max_selected is None:
        return False
    rule = policy.rule(device.name, "triton") if policy is not None else None
    if (rule is not None and not rule.enabled) or (device.capability == ADA and not switches.triton_force):
        return False
    return call.max_selected >= max(switches.triton_min_l, rule.min_l if rule is not None else 0)


def _forced(switches: Switches, limit: Callable[[str], str | None], backend: str) -> Decision:
    if not isinstance(backend, str):
        raise ArgumentTypeError(f"backend: expected one of {', '.join(BACKENDS)}, got {type(backend).__name__}")
    if backend not in BACKENDS:
        raise ArgumentError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    forbidden = {"cuda": switches.cuda, "triton": switches.triton}.get(backend) is False
    why = f"NSA_SEL_{backend.upper()}=0 forbids it" if forbidden else limit(backend)
    if why is not None:
        raise BackendError(f"backend={backend!r}: expected a call that it can run, got one that it cannot: {why}")
    return Decision(backend, f"backend={backend!r}")
