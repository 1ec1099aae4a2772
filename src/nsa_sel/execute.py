"""Runs a checked call: asks routing for a backend, runs it, counts it, and remembers launches that a device refused."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from nsa_sel import _build, _fork, backends, debug, devices, routing, stats, switches
from nsa_sel import policy as policies
from nsa_sel.backends import cuda
from nsa_sel.call import Call
from nsa_sel.check import check
from nsa_sel.errors import KernelLaunchError, PlanError
from nsa_sel.routing import Decision

_lock = _fork.lock()
_refused: frozenset[tuple[int, str]] = frozenset()  # (device index, kernel): never tried again by "auto"
_policy: policies.Policy | None = None
_policy_read = False
_warned: set[str] = set()


def attend(*arguments: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Check and run a call given by the arguments of `selection_attention` in their order: out, or (out, lse)."""
    out, lse = run(check(*arguments[:-1]), arguments[-1])
    return out if lse is None else (out, lse)


def run(call: Call, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a checked call on the backend that `route` chooses, and count it once it has run."""
    decision = route(call, backend)
    if backend == "auto" and call.device_type == "cuda" and decision.backend != "cuda":
        _warn_once(cuda.unusable(call), decision.reason)
    while True:
        try:
            result = _run_on(decision, call)
            break
        except PlanError as error:
            if backend != "auto":
                raise
            decision = Decision("sdpa", f"no launch of the kernel fits: {error}")
        except KernelLaunchError as error:
            if backend != "auto" or decision.backend == "sdpa":
                raise
            if decision.backend == "cuda":
                _remember_refusal(call, error)
                decision = route(call, backend)  # without the kernel that was refused
            else:
                decision = Decision("sdpa", f"{decision.backend} was refused at launch: {error}")
    stats.count(decision.backend, decision.reason)
    if decision.backend == "cuda" and not switches.current().debug:
        cuda.core.confirm_launch(decision.backend, decision.reason)
    return result


def route(call: Call, backend: str = "auto") -> Decision:
    """Decide on this machine, with this build, the policy and the switches as first read."""
    device = devices.info(call.device_index) if call.device_type == "cuda" else None
    return routing.decide(
        call,
        device,
        _read_policy() if device is not None else None,
        switches.current(),
        lambda name: backends.get(name).limits(call, device),
        _refusal(call),
        backend,
    )


def _run_on(decision: Decision, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    backend_run = backends.get(decision.backend).run
    if switches.current().debug:
        return debug.observed(backend_run, call, decision)
    return backend_run(call)


def refresh_routing() -> None:
    """Read the switches (NSA_SEL_*) and the policy again, and let kernels that did not load be tried again.

    Switches and policy are otherwise read once, by the first call.

    Raises:
        SwitchError: a switch holds an unknown value.
        PolicyError: the policy file is missing where NSA_SEL_POLICY names one, or is wrong.
    """
    global _policy_read
    _policy_read = False
    _forget_launches()
    switches.refresh()
    _read_policy()
    if _build.core is not None and _build.build_info()["kernels"]:
        _build.core.forget_kernel_bars()


def _read_policy() -> policies.Policy | None:
    global _policy, _policy_read
    if not _policy_read:
        wanted = policies.find(switches.current().policy)
        _policy = None if wanted is None else policies.load(wanted)
        _policy_read = True
    return _policy


def _warn_once(why: str | None, reason: str) -> None:
    """Say why CUDA tensors cannot come to the kernel, if that decided and was not said before."""
    if why is None or why not in reason or why in _warned:
        return
    with _lock:
        first = why not in _warned
        _warned.add(why)
    if first:
        warnings.warn(f"nsa_sel: CUDA tensors, but {why}; packed SDPA runs instead", RuntimeWarning, stacklevel=5)


def _refusal(call: Call) -> str | None:
    """Say that the launch of this call's kernel was refused before."""
    if not _refused or (call.device_index, kernel := cuda.kernel_name(call)) not in _refused:
        return None
    return f"kernel {kernel} was refused at launch on this device before"


def _remember_refusal(call: Call, error: KernelLaunchError) -> None:
    """Never try this kernel on this device again, and say so once."""
    global _refused
    kernel = cuda.kernel_name(call)
    with _lock:
        first = (call.device_index, kernel) not in _refused
        _refused = _refused | {(call.device_index, kernel)}
    _forget_launches()
    if first:
        warnings.warn(
            f"nsa_sel: kernel {kernel} was refused at launch on device {call.device_index} ({error}); "
            "packed SDPA runs instead from now on",
            RuntimeWarning,
            stacklevel=5,
        )


def _forget_launches() -> None:
    """Empty the cache of prepared launches: what routing would say now may differ."""
    if _build.core is not None:
        _build.core.forget_launches()
