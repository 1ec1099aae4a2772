"""One decode step of the NSA paper's attention (arXiv 2502.11089, section 3): compress, score, select, window, gate.

Projections and the MLP are not part of it. Where the paper leaves a choice open, this is the one made here: the
compression's learned map is a weighting of the 32 positions; a new compressed token is made in every step, although
one in sixteen steps needs one; and each branch has keys and values of its own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import conv1d, pad, scaled_dot_product_attention

import nsa_sel
from nsa_sel.measure.schema import STAGES

Mark = Callable[[int], None]
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """The NSA paper's shape (its table 4): lengths in tokens."""

    G: int = 4  # KV groups
    h: int = 16  # query heads per group
    Dk: int = 192
    Dv: int = 128
    l_cmp: int = 32  # tokens that one compressed token stands for
    d_cmp: int = 16  # stride between them
    l_sel: int = 64  # tokens of a selection block
    n: int = 16  # selected blocks, the first and the local ones among them
    local: int = 2  # local blocks that are always selected
    window: int = 512

    def compressed(self, context: int) -> int:
        """Return how many compressed tokens a context has."""
        return (context - self.l_cmp) // self.d_cmp + 1

    def dense_until(self) -> int:
        """Return the context up to which the selection holds every token, so that nothing is sparse yet."""
        return self.n * self.l_sel


class DecodeStep:
    """Preallocated caches of one layer and the step over them; every stage keeps its result for the next.

    Args:
        batch: requests B. context: cached tokens, the newest included. backend: what runs the selection.
        leave_out: stages that do nothing, so that their results are what the caches were made with.
    """

    def __init__(
        self,
        batch: int,
        context: int,
        backend: str,
        device: torch.device,
        seed: int = 0,
        leave_out: tuple[str, ...] = (),
        shape: Shape | None = None,
    ) -> None:
        self.shape = s = shape or Shape()
        if context < s.l_cmp + s.d_cmp or batch < 1:
            raise ValueError(
                f"decode: expected B >= 1 and a context of at least {s.l_cmp + s.d_cmp}, got {batch}, {context}"
            )
        if unknown := sorted(set(leave_out) - set(STAGES)):
            raise ValueError(f"leave_out: expected stages of {', '.join(STAGES)}, got {', '.join(unknown)}")
        self.batch, self.context, self.backend, self.left_out = batch, context, backend, frozenset(leave_out)
        self.reads: dict[str, int] | None = None
        self.select_calls = 0
        make = functools.partial(
            torch.randn, device=device, dtype=DTYPE, generator=torch.Generator(device).manual_seed(seed)
        )
        B, G, blocks = batch, s.G, -(-context // s.l_sel)
        self.q = make(B, G, s.h, s.Dk)
        row, held = s.Dk + s.Dv, min(s.window, context)
        self.new = make(B, G, 3, row)  # this step's token, one for each branch: K and V side by side, as in the caches
        self.raw, self.cmp = make(B, G, s.l_cmp, row), make(B, G, s.compressed(context), row)
        self.sel, self.win = make(B, G, context, row), make(B, G, held, row)
        self.k_raw, self.v_raw = self.raw.split((s.Dk, s.Dv), dim=-1)
        self.k_cmp, self.v_cmp = self.cmp.split((s.Dk, s.Dv), dim=-1)
        self.k_sel, self.v_sel = self.sel.split((s.Dk, s.Dv), dim=-1)
        self.k_win, self.v_win = self.win.split((s.Dk, s.Dv), dim=-1)
        self.position = make(s.l_cmp, row)
        self.mix = torch.full((1, s.l_cmp), 1 / s.l_cmp, device=device, dtype=DTYPE)
        self.shift = self.mix @ self.position  # what the positions add to every compressed token
        self.gate_logits = make(B, G, 3, s.h, 1)
        # A block of 64 overlaps the compressed tokens that start from 16 before it; these are the shares of their 32
        # tokens in it.
        self.overlap = torch.tensor([[[0.5, 1.0, 1.0, 1.0, 0.5]]], device=device)
        self.forced = torch.zeros(blocks, device=device)
        self.forced[[0, *range(max(0, blocks - s.local), blocks)]] = float("inf")
        self.ids = torch.full((B, 1, G, s.n), -1, dtype=torch.int32, device=device)
        taken = min(s.n, blocks)
        self.ids[..., :taken] = torch.arange(taken, dtype=torch.int32, device=device)
        self.p_cmp = torch.full((B, G, s.h, s.compressed(context)), 1 / s.compressed(context), device=device)
        self.outs = [make(B, G, s.h, s.Dv) for _ in range(3)]  # of compression, selection and window
        self.out = make(B, G, s.h, s.Dv)

    def run(self, mark: Mark | None = None) -> torch.Tensor:
        """Run one step and return its output [B, G, h, Dv]; `mark(i)` is called before stage i and once after the last.

        Appending the new token lies before the first mark: it is part of the step and of no stage.
        """
        self._append()
        for index, stage in enumerate(STAGES):
            if mark is not None:
                mark(index)
            if stage not in self.left_out:
                getattr(self, f"_{stage}")()
        if mark is not None:
            mark(len(STAGES))
        return self.out

    def with_backend(self, backend: str) -> DecodeStep:
        """Return the same step over the same caches with another backend for the selection."""
        other = copy.copy(self)
        other.backend, other.select_calls, other.outs = backend, 0, list(self.outs)
        return other

    def count_reads(self) -> dict[str, int]:
        """Run one step and return the bytes of K and V that each stage read, counted where it read them."""
        self.reads = dict.fromkeys(STAGES, 0)
        try:
            self.run()
            return self.reads
        finally:
            self.reads = None

    def selected_tokens(self) -> int:
        """Return the tokens that the ids of the last step select, over all rows, clamped to the context."""
        start = self.ids.long() * self.shape.l_sel
        length = (start + self.shape.l_sel).clamp(max=self.context) - start
        return int(length.masked_fill(self.ids < 0, 0).clamp(min=0).sum())

    def _read(self, stage: str, cache: torch.Tensor) -> torch.Tensor:
        if self.reads is not None:
            self.reads[stage] += cache.numel() * cache.element_size()
        return cache

    def _append(self) -> None:
        for branch, cache in enumerate((self.raw, self.sel, self.win)):
            cache[:, :, -1] = self.new[:, :, branch]

    def _compress(self) -> None:
        s, groups = self.shape, self.batch * self.shape.G
        self.cmp[:, :, -1:] = self.mix @ self._read("compress", self.raw) + self.shift
        k, v = (self._read("compress", cache).flatten(0, 1) for cache in (self.k_cmp, self.v_cmp))
        q, nothing = self.q.flatten(0, 1), self.q.new_empty(())
        logits = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=s.Dk**-0.5)
        # These probabilities score the blocks, so they are needed as such: fused attention would not give them.
        self.p_cmp = torch.softmax(logits, dim=-1, dtype=torch.float32).view(self.batch, s.G, s.h, -1)
        self.outs[0] = (self.p_cmp.view(groups, s.h, -1).to(DTYPE) @ v).view(self.batch, s.G, s.h, s.Dv)

    def _score(self) -> None:
        s, blocks = self.shape, self.forced.numel()
        by_group = self.p_cmp.sum(dim=2).view(-1, 1, self.p_cmp.shape[-1])
        stride = s.l_sel // s.d_cmp
        short = stride * (blocks - 1) + self.overlap.shape[-1] - 1 - by_group.shape[-1]
        if short != 1:  # a context that is no whole number of blocks
            by_group = pad(by_group, (0, max(0, short - 1)))
        scores = conv1d(by_group, self.overlap, stride=stride, padding=1)[..., :blocks] + self.forced
        taken = min(s.n, blocks)
        best = scores.topk(taken, dim=-1).indices.view(self.batch, 1, s.G, taken)
        self.ids[..., :taken].copy_(best)

    def _select(self) -> None:
        out = nsa_sel.selection_attention(
            self.q[:, None],
            self.k_sel,
            self.v_sel,
            block_indices=self.ids,
            block_size=self.shape.l_sel,
            backend=self.backend,
        )
        assert isinstance(out, torch.Tensor)
        self.outs[1] = out[:, 0]
        self.select_calls += 1
        if self.reads is not None:
            self.reads["select"] += self.selected_tokens() * (self.shape.Dk + self.shape.Dv) * self.k_sel.element_size()

    def _window(self) -> None:
        # The h heads of a group are the queries of one attention over its keys: nothing is repeated.
        self.outs[2] = scaled_dot_product_attention(
            self.q, self._read("window", self.k_win), self._read("window", self.v_win)
        )

    def _gate(self) -> None:
        gates = torch.sigmoid(self.gate_logits)
        out = gates[:, :, 0] * self.outs[0]
        self.out = out.addcmul_(gates[:, :, 1], self.outs[1]).addcmul_(gates[:, :, 2], self.outs[2])
