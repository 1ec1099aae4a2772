"""Dense attention over the whole context, the ways PyTorch offers: the comparison is with the fastest of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    # The h heads of a group stand where the queries of a head would: K and V are read once a group.
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _sdpa_gqa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    batch, groups, heads, dim = q.shape
    out = torch.nn.functional.scaled_dot_product_attention(
        q.reshape(batch, groups * heads, 1, dim), k, v, enable_gqa=True
    )
    return out.reshape(batch, groups, heads, -1)


def _matmul(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    # Scales q alone. Where Dk != Dv, SDPA on a CPU copies all of K to scale it, and this is more than twice as fast.
    return torch.matmul(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)).softmax(dim=-1), v)


def candidates(device: torch.device) -> dict[str, Dense]:
    """Return the ways by name: of q [1, G, h, Dk], k [1, G, length, Dk], v [1, G, length, Dv]."""
    ways: dict[str, Dense] = {"sdpa": _sdpa, "matmul": _matmul}
    if device.type == "cuda":
        ways["sdpa gqa"] = _sdpa_gqa  # on a CPU it repeats K h times: 5 to 70 times slower than the others
    return ways
