"""Chooses blocks: the queries of a group, summed over its heads, against the mean key of each block."""

from __future__ import annotations

import torch

FIRST, LOCAL = 1, 2  # blocks forced at the start of the context and at its end


class PooledKeys:
    """The mean key of each block of a growing cache, kept up to date token by token.

    Args:
        keys: [1, G, capacity, Dk] shows the sizes and the device; its values are not read.
        block_size: tokens per block.
    """

    def __init__(self, keys: torch.Tensor, block_size: int) -> None:
        batch, groups, capacity, dim = keys.shape
        self.block_size = block_size
        self.length = 0  # tokens pooled
        # fp32: a bf16 sum of 64 keys would lose what tells blocks apart
        self._sums = torch.zeros(batch, groups, -(-capacity // block_size), dim, device=keys.device)

    def append(self, keys: torch.Tensor) -> None:
        """Pool new keys [1, G, tokens, Dk], which follow those pooled before."""
        end = self.length + keys.shape[2]
        block = torch.arange(self.length, end, device=keys.device) // self.block_size
        self._sums.index_add_(2, block, keys.float())
        self.length = end

    def choose(self, q: torch.Tensor, n: int) -> torch.Tensor:
        """Return the ids [1, 1, G, n] int32 of the n best blocks; the first and the local ones are always among them.

        Equivalent to a top-n over `q.sum(heads) @ mean_key.T` with the forced blocks at +inf; -1 where the context has
        fewer than n blocks.
        """
        blocks = -(-self.length // self.block_size)
        sums = self._sums[:, :, :blocks]
        # The last block may hold fewer tokens and so have a smaller sum; it is local, its score does not count.
        scores = torch.einsum("bsghd,bgnd->bsgn", q.float(), sums) / self.block_size
        scores[..., :FIRST] = torch.inf
        scores[..., -LOCAL:] = torch.inf
        ids = scores.topk(min(n, blocks), dim=-1).indices.int()
        return torch.nn.functional.pad(ids, (0, n - ids.shape[-1]), value=-1)
