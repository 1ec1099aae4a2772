"""The public function and the one that says what it would do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch.compiler import is_compiling

from nsa_sel import arrays, entry, execute, ops
from nsa_sel.check import check
from nsa_sel.routing import Decision

Arguments = ParamSpec("Arguments")


def selection_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: torch.Tensor | None = None,
    *,
    block_indices: torch.Tensor | None = None,
    block_size: int | None = None,
    counts: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    table_rows: torch.Tensor | None = None,
    causal: bool = True,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
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
        k: keys [B, G, S_kv, Dk], paged: [P, G, page_size, Dk]; only the last dimension must be contiguous. In q's
            dtype or, with q in fp16 or bf16, in float8_e4m3fn, and v likewise.
        v: values [B, G, S_kv, Dv], paged: [P, G, page_size, Dv].
        ranges: half-open token spans [B, S, G, n, 2], int32 or int64, any values; `end <= start` is an unused slot.
        block_indices: instead of ranges, block ids [B, S, G, n], int32 or int64; negative: unused slot.
        block_size: tokens per block, with block_indices.
        counts: slots of the selection in use [B, S, G], int32, clamped to [0, n]; the slots behind may hold anything.
            None: n.
        seq_lens: valid tokens per batch entry [B], int32, clamped to [0, S_kv]; None: S_kv.
        block_table: logical to physical page [R, max_pages], int32; S_kv is then max_pages * page_size. R = B without
            table_rows.
        table_rows: row of block_table that each batch entry uses [B], int32, so that the query tokens of one request
            can be entries of their own. Outside [0, R): the entry selects nothing. None: entry b uses row b.
        causal: query s sees `max(0, seq_len - S + s + 1)` tokens; False: all `seq_len`.
        k_scale: of a float8 k, which has the values `k * k_scale`: a number, or fp32 [1] (or []), [G], or one for each
            token and group [B, G, S_kv], paged: [P, G, page_size], any strides. Those of unselected tokens may hold
            anything. None: 1. `quantize_kv` makes them.
        v_scale: the same for v.
        max_selected: promise that no row selects more tokens; steers speed and routing. Results stay right if it is
            broken, but for spans on "sdpa" in a captured CUDA graph, where the rows that break it are NaN.
        softmax_scale: default `Dk ** -0.5`.
        return_lse: also return the natural log-sum-exp of the scaled logits.
        batch_invariant: a row's bits do not depend on the rest of the batch.
        out: tensor [B, S, G, h, Dv] of q's dtype to write to; its last dimension must be contiguous, and it must not
            share memory with any other argument or with itself.
        backend: "auto", "cuda", "triton" or "sdpa".

    Returns:
        out [B, S, G, h, Dv] in q's dtype, and with `return_lse` lse [B, S, G, h] in fp32. A row with nothing
        selected gives out = 0 and lse = -inf.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is wrong (a ValueError, a TypeError).
        AutogradError, BackendError, KernelLaunchError: the call cannot run as asked for (RuntimeErrors).
        SwitchError, PolicyError: an environment variable or the policy file is wrong (ValueErrors).
    """
    attend = ops.attend if is_compiling() and isinstance(q, torch.Tensor) else entry.attend
    return attend(
        q, k, v, ranges, block_indices, block_size, counts, seq_lens, block_table, table_rows, causal, k_scale, v_scale,
        max_selected, softmax_scale, return_lse, batch_invariant, out, backend,
    )  # fmt: skip


def _with_arguments_of(
    function: Callable[Arguments, Any],
) -> Callable[[Callable[..., Decision]], Callable[Arguments, Decision]]:
    """Give a function that forwards whatever it gets the signature of the function that it forwards for."""

    def decorate(forwarding: Callable[..., Decision]) -> Callable[Arguments, Decision]:
        forwarding.__signature__ = inspect.signature(function).replace(  # type: ignore[attr-defined]
            return_annotation="Decision"
        )
        return forwarding

    return decorate


@_with_arguments_of(selection_attention)
def explain(*arguments: Any, **keywords: Any) -> Decision:
    """Check the arguments of `selection_attention` and say which backend it would run and why; runs nothing.

    >>> q, k = torch.zeros(1, 1, 1, 4, 64), torch.zeros(1, 1, 100, 64)
    >>> explain(q, k, k, torch.tensor([[[[[0, 16]]]]]), backend="sdpa")
    Decision(backend='sdpa', reason="backend='sdpa'")
    """
    given = inspect.signature(selection_attention).bind(*arguments, **keywords)
    given.apply_defaults()
    *checked, backend = arrays.as_tensors(*given.args, *given.kwargs.values())
    return execute.route(check(*checked), backend)
