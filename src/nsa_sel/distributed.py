"""Selection attention over a cache that is too long for one GPU: each rank of a process group holds a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nsa_sel import api
from nsa_sel.check import check
from nsa_sel.errors import ArgumentError, ArgumentTypeError, AutogradError, BackendError
from nsa_sel.merge import merge_states
from nsa_sel.ranges import blocks_to_ranges

# Its name until torch 2.13, where it warns of the new one; a torch without torch.distributed has neither.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


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
    backend: str = "auto",
    group: dist.ProcessGroup | None = None,
    interleave: int | None = None,
    shard_heads: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attend to a cache whose tokens are spread over the ranks of a group (context parallelism).

    Equivalent to `nsa_sel.selection_attention` on the whole cache: each rank attends to what it holds of the selected
    tokens, one collective exchanges these parts and their log-sum-exp, and each rank merges them in the order of ranks,
    so that every rank and every run gets the same bits. All ranks make the same call; only k, v, their scales and
    block_table differ.

    Rank r of W, whose cache has room for N tokens, holds tokens [r N, (r + 1) N) of every request. With `interleave=m`
    it holds every W-th run of m tokens instead: token t lies on rank t // m % W, behind that rank's earlier tokens.

    Args:
        q, ranges, block_indices, block_size, counts, seq_lens, table_rows, causal, max_selected, softmax_scale,
            batch_invariant, backend: as in `nsa_sel.selection_attention`, the same on every rank. Spans, blocks and
            lengths count the tokens of the whole sequence, whose S_kv is W N.
        k: this rank's keys [B, G, N, Dk], paged: [P, G, page_size, Dk].
        v: this rank's values [B, G, N, Dv], paged: [P, G, page_size, Dv].
        block_table: this rank's pages [B, max_pages], with table_rows [R, max_pages], int32; N is then max_pages *
            page_size.
        k_scale: this rank's scales of a float8 k, as in `nsa_sel.selection_attention`.
        v_scale: this rank's scales of a float8 v.
        return_lse: also return lse.
        group: the process group; None: the default one. NCCL for CUDA tensors, gloo for CPU tensors.
        interleave: tokens per run, a divisor of N; None: one run, of N tokens.
        shard_heads: return only this rank's share of the G h query heads, in their order, for which less is sent. W
            must divide G, or be a multiple of G whose quotient divides h.

    Returns:
        out [B, S, G, h, Dv] in q's dtype, and with `return_lse` lse [B, S, G, h] in fp32; with `shard_heads` out is
        [B, S, G / W, h, Dv], or [B, S, 1, G h / W, Dv] where W > G, and lse likewise.

    Raises:
        ArgumentError, ArgumentTypeError: an argument is wrong on this rank; nothing is sent then. Or N differs between
            ranks, which is seen on CPU tensors in eager calls alone (on a GPU, looking would synchronise).
        AutogradError: gradients are required; this function has none.
        BackendError: there is no process group, or this process is not in it.
        RuntimeError: of torch.distributed: another rank is gone, or the group's timeout is over.

    A runnable example, what is sent and when it pays: docs/distributed.md.
    """
    rank, world = _rank_and_world(group)
    call = check(
        q, k, v, ranges,
        block_indices=block_indices, block_size=block_size, counts=counts, seq_lens=seq_lens, block_table=block_table,
        table_rows=table_rows, causal=causal, k_scale=k_scale, v_scale=v_scale, max_selected=max_selected,
        softmax_scale=softmax_scale, return_lse=return_lse, batch_invariant=batch_invariant,
    )  # fmt: skip
    if call.requires_grad:
        raise AutogradError("q, k, v: expected no gradients to be required (a distributed call has none), got some")
    sharded = _sharded_heads(call.G, call.h, world) if shard_heads else None
    shard = Shard(rank, world, _run(interleave, call.S_kv), call.S_kv)
    if ranges is None:
        assert block_indices is not None
        assert block_size is not None
        ranges = blocks_to_ranges(block_indices, block_size)
        bound = call.n * shard.most_of(block_size)
        max_selected = bound if max_selected is None else min(bound, max_selected)
    local_ranges, local_lens = shard.localize(ranges, seq_lens, causal)
    out, lse = api.selection_attention(
        q, k, v, local_ranges,
        counts=counts, seq_lens=local_lens, block_table=block_table, table_rows=table_rows, causal=False,
        k_scale=k_scale, v_scale=v_scale, max_selected=max_selected, softmax_scale=softmax_scale, return_lse=True,
        batch_invariant=batch_invariant, backend=backend,
    )  # fmt: skip
    if world > 1:
        out, lse = merge_states(*_exchange(out, lse, shard, group, sharded))
        lse = lse.to(torch.float32)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Shard:
    """The tokens that one rank holds: every `world`-th run of `run` tokens, beginning with the run of its rank."""

    rank: int
    world: int
    run: int  # tokens
    tokens: int  # N: those that the rank's cache has room for, whole runs

    def before(self, position: torch.Tensor) -> torch.Tensor:
        """Return how many tokens of this rank lie before a position of the whole sequence.

        A rank keeps its tokens in order, so a span of the whole sequence is one span of the rank's cache, whose ends
        this function gives: a selection keeps its slots.

        >>> Shard(rank=1, world=2, run=4, tokens=8).before(torch.tensor([0, 4, 6, 8, 12, 13, 16])).tolist()
        [0, 0, 2, 4, 4, 5, 8]
        """
        period = self.run * self.world
        whole_runs = torch.div(position, period, rounding_mode="floor") * self.run
        return whole_runs + (position % period - self.rank * self.run).clamp(0, self.run)

    def most_of(self, span: int) -> int:
        """Return how many tokens of a span of the whole sequence this rank can hold at most, wherever it lies.

        >>> Shard(rank=1, world=2, run=4, tokens=8).most_of(6)
        4
        """
        period = self.run * self.world
        return min(span // period * self.run + min(span % period, self.run), self.tokens)

    def localize(
        self, ranges: torch.Tensor, seq_lens: torch.Tensor | None, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the spans [B, S, G, n, 2] and lengths [B] of the whole sequence as those of this rank's cache.

        The spans are clamped to what each query may see, which a call on the rank's cache could no longer know.
        """
        B, S = ranges.shape[:2]
        capacity = self.world * self.tokens
        if seq_lens is None:
            lengths = torch.full((B,), capacity, dtype=torch.int64, device=ranges.device)
        else:
            lengths = seq_lens.to(torch.int64).clamp(0, capacity)
        visible = lengths.unsqueeze(1).expand(B, S)
        if causal:
            visible = (visible + torch.arange(1 - S, 1, device=ranges.device)).clamp_min(0)
        clamped = torch.minimum(ranges.to(torch.int64).clamp_min(0), visible.view(B, S, 1, 1, 1))
        return self.before(clamped), None if seq_lens is None else self.before(lengths).to(torch.int32)


def _rank_and_world(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if not dist.is_available() or not dist.is_initialized():
        raise BackendError("group: expected torch.distributed.init_process_group to have been called, got no group")
    rank = dist.get_rank(group)
    if rank < 0:
        raise BackendError(f"group: expected one that this process (rank {dist.get_rank()}) is in, got another")
    return rank, dist.get_world_size(group)


def _run(interleave: object, tokens: int) -> int:
    """Return the tokens per run that `interleave` asks for."""
    if interleave is None:
        return max(tokens, 1)
    text = (
        f"interleave: expected None or a divisor >= 1 of the {tokens} tokens of each rank's cache, got {interleave!r}"
    )
    if isinstance(interleave, bool) or not isinstance(interleave, int):
        raise ArgumentTypeError(text)
    if interleave < 1 or tokens % interleave:
        raise ArgumentError(text)
    return interleave


def _sharded_heads(G: int, h: int, world: int) -> tuple[int, int]:
    """Return the groups and the heads per group of one rank's share of G * h heads."""
    if G % world == 0:
        return G // world, h
    if world % G == 0 and h % (world // G) == 0:
        return 1, h * G // world
    raise ArgumentError(
        f"shard_heads: expected G a multiple of the group's {world} ranks, or {world} a multiple of G and h of their "
        f"quotient, got G={G}, h={h}"
    )


def _exchange(
    out: torch.Tensor,
    lse: torch.Tensor,
    shard: Shard,
    group: dist.ProcessGroup | None,
    sharded: tuple[int, int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send this rank's out [B, S, G, h, Dv] and lse [B, S, G, h] and return those of all ranks: [W, B, S, G, h, ...].

    With `sharded` each rank is sent its own groups and heads alone: [W, B, S, *sharded, ...].
    """
    B, S, _, _, Dv = out.shape
    # one message: behind the out of each head its lse, whose bits stand in columns of out's dtype
    wide = torch.promote_types(out.dtype, torch.float32)
    packed = torch.cat([out, lse.to(wide).unsqueeze(-1).view(out.dtype)], dim=-1)
    if sharded is None:
        packed = packed.unsqueeze(0)
    else:
        packed = packed.view(B, S, shard.world, *sharded, -1).movedim(2, 0).clone(memory_format=torch.contiguous_format)
    # [W or 1, bytes]: bytes because not every collective knows every dtype
    sent = packed.view(torch.uint8).flatten(1)
    check_caches = sent.device.type == "cpu" and not torch.compiler.is_compiling()
    if check_caches:
        sent = torch.cat([sent, torch.tensor([shard.tokens, shard.run]).view(torch.uint8).expand(len(sent), -1)], dim=1)
    received = sent.new_empty(shard.world, sent.shape[1])
    if sharded is None:
        _all_gather(received, sent, group=group)
    else:
        # and not a reduce-scatter, which sends as much and adds in an order of its own
        dist.all_to_all_single(received, sent, group=group)
    if check_caches:
        received, told = received.split([sent.shape[1] - 16, 16], dim=1)
        _require_same_caches(told.contiguous().view(torch.int64).tolist())
    parts = received.contiguous().view(out.dtype).view(shard.world, *packed.shape[1:])
    outs, bits = parts.split([Dv, parts.shape[-1] - Dv], dim=-1)
    return outs, bits.clone(memory_format=torch.contiguous_format).view(wide).squeeze(-1)


def _require_same_caches(told: list[list[int]]) -> None:
    for name, values in zip(("k", "interleave"), zip(*told, strict=True), strict=True):
        if len(set(values)) > 1:
            what = "tokens in each rank's cache" if name == "k" else "tokens per run on each rank"
            raise ArgumentError(f"{name}: expected equally many {what}, got {list(values)} in the order of ranks")
