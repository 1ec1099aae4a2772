"""Who takes part in a benchmark: this package's backends, the bound over gathered K/V, and the peers' adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import nsa_sel
from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.workload import Workload
from nsa_sel.measure.schema import HERE, OWN

Call = Callable[[], Any]  # returns out as [B, S, G, h, Dv]


@dataclass(frozen=True)
class Contestant:
    """What runs beside others on the same inputs.

    `prepare` returns the call to time; what it does itself is not timed.
    `refuses` returns why it cannot take these inputs, or None.
    """

    name: str
    prepare: Callable[[Inputs], Call]
    refuses: Callable[[Inputs], str | None] = lambda inputs: None


def contestants(names: list[str]) -> list[Contestant]:
    """Return the contestants among `names` that need no peer's library."""
    plain = {"sdpa_prepared": prepared, "sdpa_gathered": gathered}
    return [Contestant(n, plain[n]) if n in plain else own(n) for n in names if n in HERE]


def own(name: str, interpreted: bool = False) -> Contestant:
    """Return a backend of this package, forced, so that nothing else can run in its name.

    It is called as a serving system does: by the public function, with the row's L as its bound and no lse.
    `interpreted`: Triton's interpreter counts too; it takes CPU tensors, but its time says nothing.
    """
    assert name in OWN

    def arguments(inputs: Inputs) -> dict[str, Any]:
        bound = {"max_selected": inputs.workload.L, "backend": name}
        return {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.selection(), **bound}

    def refuses(inputs: Inputs) -> str | None:
        if name == "triton" and inputs.q.device.type != "cuda" and not interpreted:
            return "Triton's interpreter takes CPU tensors, but its time says nothing"
        try:
            nsa_sel.explain(**arguments(inputs))
        except (RuntimeError, ValueError, TypeError) as error:
            return str(error)
        return None

    return Contestant(name, lambda inputs: functools.partial(nsa_sel.selection_attention, **arguments(inputs)), refuses)


def prepared(inputs: Inputs) -> Call:
    """Return what a user would write who knows the tokens beforehand: gather by a ready index, then SDPA.

    Three operators; which tokens are selected is worked out here and is not timed.
    """
    w, index = inputs.workload, gather_index(inputs)
    q, k_all, v_all = inputs.q.reshape(w.rows, 1, w.h, w.Dk), inputs.k, inputs.v
    if inputs.block_table is None:  # one index into the flat cache is the quicker gather
        k_all, v_all = k_all.flatten(0, 2), v_all.flatten(0, 2)
        index = (((index[0] * w.G + index[1]) * w.S_kv + index[2]),)

    def call() -> torch.Tensor:
        k, v = k_all[index], v_all[index]
        return scaled_dot_product_attention(q, k[:, None], v[:, None]).view(w.B, w.S, w.G, w.h, w.Dv)

    return call


def gathered(inputs: Inputs) -> Call:
    """Return SDPA over K and V that are gathered here, which is not timed: a bound, not an option anybody has."""
    w, index = inputs.workload, gather_index(inputs)
    q, k, v = inputs.q.reshape(w.rows, 1, w.h, w.Dk), inputs.k[index][:, None], inputs.v[index][:, None]
    return lambda: scaled_dot_product_attention(q, k, v).view(w.B, w.S, w.G, w.h, w.Dv)


def gather_index(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Return the index of the selected tokens in the cache: three tensors that broadcast to [rows, L]."""
    w, tokens = inputs.workload, selected_tokens(inputs)
    row = torch.arange(w.rows, device=tokens.device)[:, None]
    request, group = row // (w.S * w.G), row % w.G
    if inputs.block_table is None or w.page_size is None:
        return request, group, tokens
    return inputs.block_table[request, tokens // w.page_size].long(), group, tokens % w.page_size


def selected_tokens(inputs: Inputs) -> torch.Tensor:
    """Return the token ids [rows, L] that the rows select, in ascending order.

    Raises:
        ValueError: a row does not select exactly L tokens.
    """
    w, (start, end) = inputs.workload, selected_spans(inputs).unbind(dim=-1)
    edges = torch.zeros(w.rows, w.S_kv + 1, dtype=torch.int32, device=start.device)
    edges.scatter_add_(1, start, torch.ones_like(start, dtype=torch.int32))
    edges.scatter_add_(1, end, torch.full_like(end, -1, dtype=torch.int32))
    held = edges.cumsum(dim=1)[:, :-1] > 0
    if not bool((held.sum(dim=1) == w.L).all()):
        raise ValueError(f"inputs: expected L = {w.L} in every row, got {sorted(set(held.sum(1).tolist()))}")
    return held.nonzero()[:, 1].view(w.rows, w.L)


def selected_spans(inputs: Inputs) -> torch.Tensor:
    """Return the spans [rows, n, 2] int64 of inputs, blocks turned into spans and clamped to the cache."""
    w = inputs.workload
    if inputs.ranges is not None:
        return inputs.ranges.view(w.rows, w.n, 2).long()
    assert inputs.block_indices is not None
    assert w.block_size is not None
    ids = inputs.block_indices.view(w.rows, w.n).long()
    start = (ids * w.block_size).clamp(min=0, max=w.S_kv)
    end = torch.where(ids < 0, start, (start + w.block_size).clamp(max=w.S_kv))
    return torch.stack([start, end], dim=-1)


def moved_bytes(inputs: Inputs) -> int:
    """Return the bytes of one call, the tokens counted in the selection itself: K, V, q, out, lse and the selection."""
    w = inputs.workload
    tokens = int(selected_spans(inputs).diff(dim=-1).clamp(min=0).sum())
    index = inputs.ranges if inputs.ranges is not None else inputs.block_indices
    assert index is not None
    row = (w.Dk + w.Dv) * inputs.q.element_size()
    return tokens * row + w.rows * w.h * (row + 4) + index.nbytes


def check_of(workload: Workload) -> float:
    """Return the MAE above which a result counts as a parity failure: rounding alone comes near 1e-3 below L = 16."""
    return 1e-3 if workload.L >= 16 else 4e-3
