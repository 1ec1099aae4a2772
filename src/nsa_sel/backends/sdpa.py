"""The fallback: gather each row's tokens and hand them to PyTorch's scaled_dot_product_attention.

Rows are sorted by L and packed into chunks whose gathered K and V and temporaries stay within `MEMORY_BUDGET`, so
that cost and memory follow L and never S_kv. The h heads of a row are the queries of one attention over its own tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch._C._functorch import is_legacy_batchedtensor

from nsa_sel import _fork
from nsa_sel.backends import _backward, _cpu, _gather, _pieces
from nsa_sel.backends._gather import Counters, Selection
from nsa_sel.backends._pieces import accumulator
from nsa_sel.backends._plan import MEMORY_BUDGET, Chunk, captured_bound, make_plan
from nsa_sel.call import Call
from nsa_sel.devices import DeviceInfo

_totals = Counters()
_lock = _fork.lock()


def counters() -> Counters:
    """Return what this backend has done in this process so far."""
    with _lock:
        return replace(_totals)


def limits(call: Call, device: DeviceInfo | None) -> str | None:
    """Say why this backend cannot take `call`: there is nothing that it cannot."""
    return None


def run(call: Call, memory_budget: int = MEMORY_BUDGET) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a call: out [B, S, G, h, Dv] in q's dtype and, if asked for, lse [B, S, G, h] fp32.

    Reads the lengths of the selections back once, and nothing while a CUDA graph is captured: there it computes up to
    the bound of L (for spans without `max_selected` that is n * S_kv). A row whose spans break `max_selected` comes
    out as NaN, never as a plausible wrong answer.
    """
    if call.requires_grad:
        out, lse = _Attention.apply(call.q, call.k, call.v, call, memory_budget)
        return out, lse if call.return_lse else None
    return forward(call, memory_budget)


def forward(call: Call, budget: int = MEMORY_BUDGET) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a call without gradients; results as `run` gives them."""
    with _plain_math(call):
        wide = _widened(call)
        work = _prepare(wide, budget, _is_capturing(call))
        out, lse = _attend_all(wide, work)
    out = out.view(*call.q.shape[:4], call.Dv).to(call.q.dtype)
    # columns of padding must not show: the operator promises contiguous results, and so does the kernel
    out = out.contiguous() if call.out is None else call.out.copy_(out)
    return out, None if lse is None else lse.to(torch.float32).view(call.q.shape[:4])


def backward(
    call: Call,
    out: torch.Tensor,
    d_out: torch.Tensor | None,
    d_lse: torch.Tensor | None,
    budget: int = MEMORY_BUDGET,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of q, k and v from those of out [B, S, G, h, Dv] and lse [B, S, G, h] (None: zero).

    Those of a float8 k and v are None.
    """
    dtype, call = call.q.dtype, _widened(call)
    gradients = _backward.Gradients.zeros(call, accumulator(call.q.dtype))
    flat = (call.rows, call.h, call.Dv)
    d_out = out.new_zeros(flat) if d_out is None else d_out.reshape(flat)
    d_lse = None if d_lse is None else d_lse.reshape(flat[:2])
    with _plain_math(call):
        # half the budget: the gradients of the gathered rows stand beside the rows
        work = _prepare(call, budget // 2, _is_capturing(call))
        for chunk in work.plan:
            rows = work.rows(chunk)
            _backward.accumulate(
                call, work.selection, rows, chunk, out.reshape(flat), d_out, d_lse, gradients, work.count
            )
        work.report()
    d_q = gradients.q.view(call.q.shape).to(dtype)
    if gradients.k is None or gradients.v is None:
        return d_q, None, None
    return d_q, gradients.k.to(call.k.dtype), gradients.v.to(call.v.dtype)


class _Attention(torch.autograd.Function):
    """Packed SDPA with gradients of its own, which gather again instead of keeping what was gathered.

    The backward pass consists of differentiable operations: with create_graph=True autograd differentiates it again,
    and keeps what was gathered then.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, budget: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = forward(call, budget)
        ctx.set_materialize_grads(False)
        # saved, and not just kept, so that autograd notices when one is changed in place before the backward pass
        ctx.save_for_backward(
            q, k, v, out, call.ranges, call.block_indices, call.counts, call.seq_lens, call.block_table,
            call.table_rows, call.k_scale, call.v_scale,
        )  # fmt: skip
        ctx.call, ctx.budget = call, budget
        return out, lse

    @staticmethod
    def backward(ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if d_out is None and d_lse is None:
            return None, None, None, None, None
        q, k, v, out, *_ = ctx.saved_tensors
        call = replace(ctx.call, q=q, k=k, v=v)
        if any(d is not None and is_legacy_batchedtensor(d) for d in (d_out, d_lse)):  # is_grads_batched=True
            # the operator has a rule for vmap; `nsa_sel.ops`, which is above this module, has registered it
            operator = torch.ops.nsa_sel.selection_attention_backward
            given = call.arguments() | {"backend": "auto", "requires_grad": True}
            if isinstance(given["v_scale"], float):
                given["v_scale"] = call.q.new_full((1,), given["v_scale"], dtype=torch.float32)
            d_q, *d_kv = operator(out, d_out, d_lse, **given)
            return d_q, *((None, None) if call.fp8 else d_kv), None, None
        return *backward(call, out, d_out, d_lse, ctx.budget), None, None


def _widened(call: Call) -> Call:
    """Return a call on a float8 cache as one with fp32 queries; what is gathered is widened to their dtype.

    In half precision the scaled keys would be rounded, and lse with them.
    """
    return replace(call, q=call.q.to(torch.float32), dtype="float32", out=None) if call.fp8 else call


@contextlib.contextmanager
def _plain_math(call: Call) -> Iterator[None]:
    """Switch autocast off: it would turn fp32 inputs into bf16 inside SDPA, where the contract promises fp32."""
    if not torch.is_autocast_enabled(call.device_type):
        yield
        return
    with torch.autocast(call.device_type, enabled=False):
        yield


def _is_capturing(call: Call) -> bool:
    return call.q.is_cuda and torch.cuda.is_current_stream_capturing()


@dataclass(slots=True)
class _Work:
    """What one call has to do."""

    selection: Selection
    lengths: np.ndarray  # [R] L of the rows in planned order, or its bound
    order: torch.Tensor | None  # [R] row ids, longest first; None: as they are
    plan: list[Chunk]
    count: Counters
    on_host: bool  # lengths and places are known on the CPU, where the tensors are too
    broken: torch.Tensor | None = None  # [R] rows beyond the bound that a captured graph computes

    def rows(self, chunk: Chunk) -> torch.Tensor:
        """Return the row ids [r] of a chunk."""
        if self.order is not None:
            return self.order[chunk.rows]
        return torch.arange(chunk.rows.start, chunk.rows.stop, device=self.selection.length.device)

    def report(self) -> None:
        """Add this call to the totals."""
        with _lock:
            for field in fields(Counters):
                setattr(_totals, field.name, getattr(_totals, field.name) + getattr(self.count, field.name))


def _prepare(call: Call, budget: int, capturing: bool) -> _Work:
    call, count = call, Counters(calls=1)
    selection = _gather.resolve(call)
    # without one slot, token or page there is no memory that a gather could point at
    pool = (call.num_pages and call.num_tables) or not call.paged
    if not (call.rows and call.n and call.S_kv and pool):
        return _Work(selection, np.zeros(0), None, [], count, on_host=False)
    if not capturing:
        lengths, order, masked = _read_back(selection, count)
        plan = make_plan(call, lengths, budget, masked)
        return _Work(selection, lengths, order, plan, count, on_host=call.device_type == "cpu")
    limit = captured_bound(call)
    lengths = np.full(call.rows, limit)
    plan = make_plan(call, lengths, budget, masked=True)
    broken = selection.length > limit if limit < call.largest else None
    return _Work(selection, lengths, None, plan, count, on_host=False, broken=broken)


def _read_back(selection: Selection, count: Counters) -> tuple[np.ndarray, torch.Tensor | None, bool]:
    """Look at the lengths: descending, the rows in that order (None: as they are), and whether pages are missing."""
    count.read_backs += 1
    if selection.length.device.type == "cpu":
        bad_page = selection.bad_page is not None and bool(selection.bad_page)
        values = selection.length.numpy()
        if (values == values[0]).all():
            return values, None, bad_page
        longest_first = np.argsort(-values, kind="stable")
        return values[longest_first], torch.from_numpy(longest_first), bad_page
    lengths, order = selection.length.sort(descending=True, stable=True)
    seen = lengths if selection.bad_page is None else torch.cat([lengths, selection.bad_page])
    values = seen.cpu().numpy()
    bad_page = selection.bad_page is not None and bool(values[-1])
    values = values[: lengths.shape[0]]
    return values, None if values[0] == values[-1] else order, bad_page


def _attend_all(call: Call, work: _Work) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend every row: out [R, h, Dv] and, if asked for, lse [R, h]; rows that select nothing get 0 and -inf."""
    out = lse = None
    for chunk in work.plan:
        rows = work.rows(chunk)
        part, part_lse = _attend_chunk(call, work, rows, chunk)
        if work.order is None and chunk.rows == slice(0, call.rows):
            out, lse = part, part_lse
            continue
        if out is None:
            out, lse = _empty_rows(call)
        out.index_copy_(0, rows, part)
        if lse is not None and part_lse is not None:
            lse.index_copy_(0, rows, part_lse)
    if out is None:
        out, lse = _empty_rows(call)
    if work.broken is not None:
        out = out.masked_fill(work.broken[:, None, None], math.nan)
        lse = None if lse is None else lse.masked_fill(work.broken[:, None], math.nan)
    work.report()
    return out, lse


def _empty_rows(call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    out = call.q.new_zeros((call.rows, call.h, call.Dv))
    if not call.return_lse:
        return out, None
    return out, call.q.new_full((call.rows, call.h), -math.inf, dtype=accumulator(call.q.dtype))


def _attend_chunk(
    call: Call, work: _Work, rows: torch.Tensor, chunk: Chunk
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend the rows [r] of one chunk: out [r, h, Dv] and lse [r, h] or None."""
    kept = rows.shape[0]
    if chunk.pad_rows:
        rows = torch.cat([rows, rows[-1:].expand(chunk.pad_rows)])
    if not work.on_host or chunk.piece < chunk.tokens:
        out, lse = _pieces.attend(call, work.selection, rows, chunk, work.count)
    else:
        lengths = work.lengths[chunk.rows]
        if chunk.pad_rows:
            lengths = np.append(lengths, lengths[-1:].repeat(chunk.pad_rows))
        out, lse = _cpu.attend(call, work.selection, rows.numpy(), lengths, chunk, work.count)
        if not math.isfinite(out.sum(dtype=lse.dtype).item() + lse.sum().item()):
            for row in (~(out.isfinite().all(2) & lse.isfinite())).any(1).nonzero().flatten():
                one = rows[row : row + 1]
                out[row], exact = _pieces.attend(call, work.selection, one, replace(chunk, masked=True), work.count)
                if exact is not None:
                    lse[row] = exact
        out = out.to(call.q.dtype)
    return out[:kept], lse[:kept] if call.return_lse and lse is not None else None
