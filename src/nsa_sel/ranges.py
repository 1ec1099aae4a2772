"""Small tools on selections: a disjoint cover of spans, and blocks written as spans."""

from __future__ import annotations

import torch

from nsa_sel.errors import ArgumentError, ArgumentTypeError

_INDICES = (torch.int32, torch.int64)


def merge_ranges(ranges: torch.Tensor) -> torch.Tensor:
    """Return the same tokens as disjoint spans in ascending order, each token once; unused slots are (0, 0) at the end.

    Spans that overlap or touch become one. Shape and dtype stay: [..., n, 2], int32 or int64; no value is read back.

    >>> merge_ranges(torch.tensor([[8, 12], [0, 4], [3, 6], [9, 9]])).tolist()
    [[0, 6], [8, 12], [0, 0], [0, 0]]

    Raises:
        ArgumentError, ArgumentTypeError: `ranges` is no integer tensor [..., n, 2].
    """
    if not isinstance(ranges, torch.Tensor):
        raise ArgumentTypeError(f"ranges: expected a torch.Tensor, got {type(ranges).__name__}")
    text = f"ranges: expected int32 or int64 [..., n, 2], got {str(ranges.dtype)[6:]} {list(ranges.shape)}"
    if ranges.dtype not in _INDICES:
        raise ArgumentTypeError(text)
    if ranges.dim() < 2 or ranges.shape[-1] != 2:
        raise ArgumentError(text)
    if ranges.shape[-2] == 0:
        return ranges.clone()

    start, end = ranges.unbind(-1)
    used = end > start
    # unused slots sort behind every used one, and their end must not stretch a span
    limits = torch.iinfo(ranges.dtype)
    order = torch.where(used, start, limits.max).sort(dim=-1, stable=True).indices
    start, end, used = start.gather(-1, order), end.gather(-1, order), used.gather(-1, order)
    reach = torch.where(used, end, limits.min).cummax(dim=-1).values  # the furthest end so far
    # a span opens a new group where it starts beyond all that came before it
    opens = used.clone()
    opens[..., 1:] &= start[..., 1:] > reach[..., :-1]
    group = (opens.cumsum(-1) - 1).clamp_min(0)
    merged_start = torch.zeros_like(start).scatter_add(-1, group, torch.where(opens, start, 0))
    lowest = torch.full_like(end, limits.min)
    merged_end = lowest.scatter_reduce(-1, group, torch.where(used, end, limits.min), "amax")
    filled = torch.arange(start.shape[-1], device=start.device) < opens.sum(-1, keepdim=True)
    zero = torch.zeros_like(start)
    return torch.stack([torch.where(filled, merged_start, zero), torch.where(filled, merged_end, zero)], dim=-1)


def blocks_to_ranges(block_indices: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return block ids [..., n] as int64 spans [..., n, 2]; a negative id gives the unused slot (0, 0).

    >>> blocks_to_ranges(torch.tensor([2, -1, 0]), 64).tolist()
    [[128, 192], [0, 0], [0, 64]]

    Raises:
        ArgumentError, ArgumentTypeError: not int32 or int64, or a block_size below 1.
    """
    if not isinstance(block_indices, torch.Tensor) or block_indices.dtype not in _INDICES:
        got = str(block_indices.dtype)[6:] if isinstance(block_indices, torch.Tensor) else type(block_indices).__name__
        raise ArgumentTypeError(f"block_indices: expected an int32 or int64 tensor [..., n], got {got}")
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise ArgumentTypeError(f"block_size: expected an int >= 1, got {type(block_size).__name__}")
    if block_size < 1:
        raise ArgumentError(f"block_size: expected an int >= 1, got {block_size}")
    # a block beyond 64 bits lies beyond every cache: it is cut off at the largest value instead of wrapping around
    largest = torch.iinfo(torch.int64).max
    block_size = min(block_size, largest)
    ids = block_indices.to(torch.int64)
    start = ids.clamp(0, largest // block_size) * block_size
    spans = torch.stack([start, start + (largest - start).clamp_max(block_size)], dim=-1)
    return torch.where((ids < 0).unsqueeze(-1), 0, spans)
