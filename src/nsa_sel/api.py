"""The public function: check the arguments, decide on a backend, run it, count it."""

from __future__ import annotations

import threading
import warnings

import torch

from nsa_sel import _build, backends, debug, ops, stats, switches
from nsa_sel import policy as policies
from nsa_sel.errors import KernelLaunchError, PlanError
from nsa_sel.problem import Call, Problem
from nsa_sel.routing import Decision, decide
from nsa_sel.validation import check

_lock = threading.Lock()
_refused: frozenset[tuple[int, str]] = frozenset()
_policy: policies.Policy | None = None
_policy_read = False
_warned_no_kernels = False


def selection_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: torch.Tensor | None = None,
    *,
    block_indices: torch.Tensor | None = None,
    block_size: int | None = None,
    seq_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    causal: bool = True,
    max_selected: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend each row (b, s, g) of queries to the tokens that the row selected.

    Equivalent to, for each row with its tokens `t` (the spans one after another, each clamped to `[0, kv_len)`):

        p = softmax(softmax_scale * q[b, s, g] @ k[b, g, t].T)
        out[b, s, g] = p @ v[b, g, t]

    >>> import torch
    >>> q, k, v = torch.randn(1, 1, 2, 4, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 128)
    >>> ranges = torch.tensor([[[[[0, 16], [80, 100]], [[5, 30], [0, 0]]]]])
    >>> out = selection_attention(q, k, v, ranges)
    >>> t = torch.arange(5, 30)
    >>> expected = torch.softmax(64**-0.5 * q[0, 0, 1] @ k[0, 1, t].T, -1) @ v[0, 1, t]
    >>> torch.allclose(out[0, 0, 1], expected, atol=1e-5)
    True

    Args:
        q: queries [B, S, G, h, Dk]; fp16 or bf16 (fp32 and fp64: fallback only).
        k: keys [B, G, S_kv, Dk], paged: [P, G, page_size, Dk]; only the last dimension must be contiguous.
        v: values [B, G, S_kv, Dv], paged: [P, G, page_size, Dv].
        ranges: half-open token spans [B, S, G, n, 2], int32 or int64, any values; `end <= start` is an unused slot.
        block_indices: instead of ranges, block ids [B, S, G, n], int32 or int64; negative: unused slot.
        block_size: tokens per block, with block_indices.
        seq_lens: valid tokens per request [B], int32, clamped to [0, S_kv]; None: S_kv.
        block_table: logical to physical page [B, max_pages], int32; S_kv is then max_pages * page_size.
        causal: query s sees `max(0, seq_len - S + s + 1)` tokens; False: all `seq_len`.
        max_selected: promise that no row selects more tokens; steers speed and routing. Results stay right if it is
            broken, but for spans on "sdpa" in a captured CUDA graph, where the rows that break it are NaN.
        softmax_scale: default `Dk ** -0.5`.
        return_lse: also return the natural log-sum-exp of the scaled logits.
        batch_invariant: a row's bits do not depend on the rest of the batch.
        out: tensor [B, S, G, h, Dv] of v's dtype to write to; its last dimension must be contiguous, and it must not
            share memory with q, k or v.
        backend: "auto", "cuda", "triton" or "sdpa".

    Returns:
        out [B, S, G, h, Dv] in v's dtype, and with `return_lse` lse [B, S, G, h] in fp32. A row with nothing
        selected gives out = 0 and lse = -inf.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is wrong (a ValueError, a TypeError).
        AutogradError, BackendError, KernelLaunchError: the call cannot run as asked for (RuntimeErrors).
        SwitchError, PolicyError: an environment variable or the policy file is wrong (ValueErrors).
    """
    if torch.compiler.is_compiling():
        compiled = ops.call(
            q, k, v, ranges, block_indices, block_size, seq_lens, block_table,
            causal, max_selected, softmax_scale, return_lse, batch_invariant, out, backend,
        )  # fmt: skip
        return compiled if return_lse else compiled[0]
    call = check(
        q, k, v, ranges,
        block_indices=block_indices, block_size=block_size, seq_lens=seq_lens, block_table=block_table,
        causal=causal, max_selected=max_selected, softmax_scale=softmax_scale, return_lse=return_lse,
        batch_invariant=batch_invariant, out=out,
    )  # fmt: skip
    result, lse = run(call, backend)
    if return_lse:
        assert lse is not None
        return result, lse
    return result


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: torch.Tensor | None = None,
    *,
    block_indices: torch.Tensor | None = None,
    block_size: int | None = None,
    seq_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    causal: bool = True,
    max_selected: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> Decision:
    """Check the arguments of `selection_attention` and say which backend it would run and why; runs nothing.

    >>> q, k = torch.zeros(1, 1, 1, 4, 64), torch.zeros(1, 1, 100, 64)
    >>> explain(q, k, k, torch.tensor([[[[[0, 16]]]]]), backend="sdpa")
    Decision(backend='sdpa', reason="backend='sdpa'")
    """
    call = check(
        q, k, v, ranges,
        block_indices=block_indices, block_size=block_size, seq_lens=seq_lens, block_table=block_table,
        causal=causal, max_selected=max_selected, softmax_scale=softmax_scale, return_lse=return_lse,
        batch_invariant=batch_invariant, out=out,
    )  # fmt: skip
    return route(call.problem, backend)


def route(problem: Problem, backend: str = "auto") -> Decision:
    """Decide on this machine, with this build, the policy and the switches as first read."""
    current = switches.current()
    on_cuda = problem.device_type == "cuda"
    cuda, triton = backends.find("cuda"), backends.find("triton")
    return decide(
        problem,
        _build.device_info(problem.device_index) if on_cuda else None,
        _build.routing_build(),
        _read_policy() if on_cuda else None,
        current,
        _refused,
        backend,
        cuda_limit=cuda.unavailable if cuda is not None else None,
        triton_limit=triton.unavailable if triton is not None else None,
    )


def run(call: Call, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a checked call on the backend that `route` chooses, and count it once it has run."""
    decision = route(call.problem, backend)
    if backend == "auto" and call.problem.device_type == "cuda":
        _warn_once_without_kernels()
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
                _remember_refusal(call.problem, error)
                decision = route(call.problem, backend)  # without the kernel that was refused
            else:
                decision = Decision("sdpa", f"{decision.backend} was refused at launch: {error}")
    stats.count(decision.backend, decision.reason)
    return result


def _run_on(decision: Decision, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    backend_run = backends.get(decision.backend).run
    if switches.current().debug:
        return debug.observed(backend_run, call, decision)
    return backend_run(call)


def refresh_routing() -> None:
    """Read the switches (NSA_SEL_*) and the policy again; they are otherwise read once, by the first call.

    Raises:
        SwitchError: a switch holds an unknown value.
        PolicyError: the policy file is missing where NSA_SEL_POLICY names one, or is wrong.
    """
    global _policy_read
    _policy_read = False
    switches.refresh()
    _read_policy()


def _read_policy() -> policies.Policy | None:
    global _policy, _policy_read
    if not _policy_read:
        named, users = switches.current().policy, policies.user_path()
        # a file that was named must be there, the user's own need not
        wanted = named or (users if users.exists() else None)
        _policy = None if wanted is None else policies.load(wanted)
        _policy_read = True
    return _policy


def _warn_once_without_kernels() -> None:
    global _warned_no_kernels
    build = _build.routing_build()
    if build.kernels or _warned_no_kernels:
        return
    with _lock:
        first, _warned_no_kernels = not _warned_no_kernels, True
    if first:
        warnings.warn(
            f"nsa_sel: CUDA tensors, but this build has no kernels ({build.reason}); packed SDPA runs instead",
            RuntimeWarning,
            stacklevel=4,
        )


def _remember_refusal(problem: Problem, error: KernelLaunchError) -> None:
    """Never try this kernel on this device again, and say so once."""
    global _refused
    instance = _build.routing_build().instance_for(problem)
    assert instance is not None  # routing chose cuda, so there is one
    with _lock:
        first = (problem.device_index, instance.name) not in _refused
        _refused = _refused | {(problem.device_index, instance.name)}
    if first:
        warnings.warn(
            f"nsa_sel: kernel {instance.name} was refused at launch on device {problem.device_index} ({error}); "
            "packed SDPA runs instead from now on",
            RuntimeWarning,
            stacklevel=4,
        )
