"""Calls whose results show what every float8_e4m3fn code is widened to, in every column of K and of V."""

from __future__ import annotations

from typing import Any

import torch

CODES = torch.arange(256, dtype=torch.uint8)
VALUES = CODES.view(torch.float8_e4m3fn).to(torch.float64)
FINITE = CODES[VALUES.isfinite()]


def _call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of a call in which query i selects token i."""
    rows = torch.arange(len(k), dtype=torch.int32)
    ranges = torch.stack([rows, rows + 1], 1).view(1, -1, 1, 1, 2)
    caches = {name: t.view(torch.float8_e4m3fn)[None, None] for name, t in (("k", k), ("v", v))}
    return {"q": q, **caches, "ranges": ranges, "causal": False, "softmax_scale": 1.0, "return_lse": True}


def values(dtype: torch.dtype, Dk: int, Dv: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Return a call and its exact result [1, 256, 1, 1, Dv]: row i holds the code i + d in column d of V."""
    v = CODES.repeat(2 * 256)[torch.arange(256)[:, None] + torch.arange(Dv)]
    call = _call(torch.zeros(1, 256, 1, 1, Dk, dtype=dtype), torch.zeros(256, Dk, dtype=torch.uint8), v)
    return call, VALUES[v.long()].view(1, 256, 1, 1, Dv)


def keys(dtype: torch.dtype, Dk: int, Dv: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Return a call and its exact lse [1, rows, 1, 16]: head j sees one column alone, which holds a finite code."""
    count, step = len(FINITE), Dk // 16
    k = FINITE.repeat(1 + -(-Dk // count))[torch.arange(count)[:, None] + torch.arange(Dk)]
    q = torch.zeros(1, count, 1, 16, Dk, dtype=dtype)
    columns = torch.arange(16) * step + torch.arange(count)[:, None] % step  # every column in some row
    q[0, torch.arange(count)[:, None], 0, torch.arange(16), columns] = 1
    seen = VALUES[k.gather(1, columns).long()]
    return _call(q, k, torch.zeros(count, Dv, dtype=torch.uint8)), seen.view(1, count, 1, 16)


def nan_keys(dtype: torch.dtype, Dk: int, Dv: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Return a call of two rows a column, whose K holds a NaN of either sign there alone; all results are NaN."""
    k = torch.zeros(2 * Dk, Dk, dtype=torch.uint8)
    k[torch.arange(Dk), torch.arange(Dk)] = 0x7F
    k[torch.arange(Dk) + Dk, torch.arange(Dk)] = 0xFF
    call = _call(torch.zeros(1, 2 * Dk, 1, 1, Dk, dtype=dtype), k, torch.zeros(2 * Dk, Dv, dtype=torch.uint8))
    return call, torch.full((1, 2 * Dk, 1, 1, Dv), torch.nan, dtype=torch.float64)
