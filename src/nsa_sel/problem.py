"""What one call asks for: `Problem` in plain values for routing, `Call` with the tensors for a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """One checked call without its tensors (a tuple: it is built on every call and must be cheap, frozen, hashable)."""

    B: int  # requests
    S: int  # query positions per request
    G: int  # KV groups
    h: int  # query heads per group
    Dk: int
    Dv: int
    S_kv: int  # tokens the cache can hold per request (paged: max_pages * page_size)
    n: int  # selection slots per row
    dtype: str  # "float16" | "bfloat16" | "float32" | "float64"
    device_type: str = "cpu"  # "cpu" | "cuda" | what else torch calls a device
    device_index: int = 0
    paged: bool = False
    page_size: int = 0  # tokens; 0 where the cache is not paged
    num_pages: int = 0  # P, physical pages; 0 where the cache is not paged
    blocks: bool = False  # selection by block_indices
    block_size: int = 0  # l_sel in tokens; 0 for ranges
    index_bits: int = 32  # of ranges or block_indices
    max_selected: int | None = None  # bound of L, where one is known
    causal: bool = True
    misaligned: str | None = None  # which tensor breaks the 16-byte rule; looked at on CUDA tensors alone
    requires_grad: bool = False
    has_lse: bool = False
    batch_invariant: bool = False

    @property
    def rows(self) -> int:
        """Rows (b, s, g) of the call."""
        return self.B * self.S * self.G


@dataclass(slots=True)
class Call:
    """The checked tensors and scalars of one call; a backend reads nothing else.

    `max_selected` is the bound that routing saw: the caller's promise, else what blocks imply, else None.
    """

    q: torch.Tensor  # [B, S, G, h, Dk]
    k: torch.Tensor  # [B, G, S_kv, Dk], paged: [P, G, page_size, Dk]
    v: torch.Tensor  # [B, G, S_kv, Dv], paged: [P, G, page_size, Dv]
    ranges: torch.Tensor | None  # [B, S, G, n, 2] int32 | int64
    block_indices: torch.Tensor | None  # [B, S, G, n] int32 | int64
    block_size: int | None
    seq_lens: torch.Tensor | None  # [B] int32
    block_table: torch.Tensor | None  # [B, max_pages] int32
    causal: bool
    max_selected: int | None
    scale: float
    return_lse: bool
    batch_invariant: bool
    out: torch.Tensor | None  # [B, S, G, h, Dv]
    problem: Problem
