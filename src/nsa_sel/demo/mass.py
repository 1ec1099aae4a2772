"""How much of dense attention a selection keeps."""

from __future__ import annotations

import torch


def selected_tokens(block_indices: torch.Tensor, block_size: int, length: int) -> torch.Tensor:
    """Return which tokens [G, length] the blocks [1, 1, G, n] hold; negative ids hold none."""
    block = torch.arange(length, device=block_indices.device) // block_size
    return (block_indices[0, 0, :, :, None] == block).any(dim=1)


def random_tokens(selected: torch.Tensor, block_size: int, random: torch.Generator) -> torch.Tensor:
    """Return random blocks as tokens [G, length], cut so that each group keeps as many tokens as in `selected`."""
    groups, length = selected.shape
    order = torch.rand(groups, -(-length // block_size), generator=random).argsort(dim=-1).to(selected.device)
    rank = order.argsort(dim=-1).repeat_interleave(block_size, dim=-1)[:, :length]  # of each token's block
    # Stable: the tokens of a block keep their order, so that only the block drawn last is cut.
    place = rank.argsort(dim=-1, stable=True).argsort(dim=-1)
    return place < selected.sum(dim=-1, keepdim=True)


def dense_probabilities(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(Dk)) over the whole context, [G, h, length] fp32.

    Args:
        q: [1, 1, G, h, Dk].
        k: [1, G, length, Dk].
    """
    logits = torch.matmul(q[0, 0].float(), k[0].float().transpose(1, 2)) * q.shape[-1] ** -0.5
    return logits.softmax(dim=-1)


def captured(probabilities: torch.Tensor, selected: torch.Tensor) -> float:
    """Return the share of the softmax mass [G, h, length] on the selected tokens [G, length], mean over all heads."""
    return float((probabilities * selected[:, None]).sum(dim=-1).mean())
