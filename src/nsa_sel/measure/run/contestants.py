"""Who takes part in a benchmark: this package's backends, the bound over gathered K/V, and the peers' adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

import nsa_sel
from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.workload import Workload
from nsa_sel.measure.schema import HERE


class Contestant(Protocol):
    """What runs beside others on the same inputs."""

    name: str

    def refuses(self, inputs: Inputs) -> str | None:
        """Return why it cannot take these inputs, or None."""

    def prepare(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """Return the call to time; it returns out as [B, S, G, h, Dv]. What is done here is not timed."""


class Own:
    """A backend of this package, forced, so that nothing else can run in its name."""

    def __init__(self, name: str, interpreted: bool = False) -> None:
        self.name, self.interpreted = name, interpreted

    def refuses(self, inputs: Inputs) -> str | None:
        """Return why the forced backend does not take these inputs."""
        if self.name == "triton" and inputs.q.device.type != "cuda" and not self.interpreted:
            return "Triton's interpreter takes CPU tensors, but its time says nothing"
        try:
            nsa_sel.explain(**self._arguments(inputs))
        except (RuntimeError, ValueError, TypeError) as error:
            return str(error)
        return None

    def prepare(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """Return the public call, with the row's L as its bound and no lse, as a serving system calls it."""
        arguments = self._arguments(inputs)

        def call() -> torch.Tensor:
            out = nsa_sel.selection_attention(**arguments)
            assert isinstance(out, torch.Tensor)
            return out

        return call

    def _arguments(self, inputs: Inputs) -> dict[str, Any]:
        bound = {"max_selected": inputs.workload.L, "backend": self.name}
        return {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.selection(), **bound}


class Prepared:
    """What a user would write who knows the tokens beforehand: gather K and V by a ready index, then SDPA."""

    name = "sdpa_prepared"

    def refuses(self, inputs: Inputs) -> str | None:
        """Return None: it takes everything."""
        return None

    def prepare(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """Return gather and SDPA, three operators; which tokens are selected is worked out here and is not timed."""
        w, index = inputs.workload, gather_index(inputs)
        q, k_all, v_all = inputs.q.reshape(w.rows, 1, w.h, w.Dk), inputs.k, inputs.v
        if inputs.block_table is None:  # one index into the flat cache is the quicker gather
            k_all, v_all = k_all.flatten(0, 2), v_all.flatten(0, 2)
            index = (((index[0] * w.G + index[1]) * w.S_kv + index[2]),)

        def call() -> torch.Tensor:
            k, v = k_all[index], v_all[index]
            return scaled_dot_product_attention(q, k[:, None], v[:, None]).view(w.B, w.S, w.G, w.h, w.Dv)

        return call


class Gathered:
    """SDPA over K and V that were gathered beforehand: a bound for what gathers, not an option anybody has."""

    name = "sdpa_gathered"

    def refuses(self, inputs: Inputs) -> str | None:
        """Return None: it takes everything."""
        return None

    def prepare(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        """Return SDPA over the gathered tensors; the gather is done here and is not timed."""
        w = inputs.workload
        k, v = gather(inputs)
        q = inputs.q.reshape(w.rows, 1, w.h, w.Dk)

        def call() -> torch.Tensor:
            return scaled_dot_product_attention(q, k[:, None], v[:, None]).view(w.B, w.S, w.G, w.h, w.Dv)

        return call


def gather(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the selected K [rows, L, Dk] and V [rows, L, Dv] of inputs whose every row selects exactly L tokens."""
    index = gather_index(inputs)
    return inputs.k[index], inputs.v[index]


def gather_index(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """Return the index of the selected tokens in the cache: three tensors that broadcast to [rows, L]."""
    tokens = selected_tokens(inputs)
    w = inputs.workload
    request = torch.arange(w.rows, device=tokens.device)[:, None] // (w.S * w.G)
    group = torch.arange(w.rows, device=tokens.device)[:, None] % w.G
    if inputs.block_table is None or w.page_size is None:
        return request, group, tokens
    return inputs.block_table[request, tokens // w.page_size].long(), group, tokens % w.page_size


def selected_tokens(inputs: Inputs) -> torch.Tensor:
    """Return the token ids [rows, L] that the rows select, in the order of their spans.

    Raises:
        ValueError: a row does not select exactly L tokens.
    """
    spans = selected_spans(inputs)
    rows = spans.shape[0]
    lengths = (spans[..., 1] - spans[..., 0]).clamp(min=0)
    if not bool((lengths.sum(dim=1) == inputs.workload.L).all()):
        raise ValueError(
            f"inputs: expected L = {inputs.workload.L} in every row, got {sorted(set(lengths.sum(1).tolist()))}"
        )
    flat = lengths.flatten()
    first = torch.repeat_interleave(spans[..., 0].flatten(), flat)
    within = torch.arange(rows * inputs.workload.L, device=spans.device) - torch.repeat_interleave(
        flat.cumsum(0) - flat, flat
    )
    return (first + within).view(rows, inputs.workload.L)


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
    spans = selected_spans(inputs)
    tokens = int((spans[..., 1] - spans[..., 0]).clamp(min=0).sum())
    index = inputs.ranges if inputs.ranges is not None else inputs.block_indices
    assert index is not None
    row = (w.Dk + w.Dv) * inputs.q.element_size()
    return tokens * row + w.rows * w.h * (row + 4) + index.nbytes


def own_contestants(names: list[str]) -> list[Contestant]:
    """Return the contestants of this package and its baselines among `names`."""
    plain: dict[str, Contestant] = {one.name: one for one in (Prepared(), Gathered())}
    return [plain.get(name) or Own(name) for name in names if name in HERE]


def check_of(workload: Workload) -> float:
    """Return the MAE above which a result counts as a parity failure: rounding alone comes near 1e-3 below L = 16."""
    return 1e-3 if workload.L >= 16 else 4e-3
