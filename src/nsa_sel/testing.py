"""Inputs that betray stray reads, and comparisons that NaN cannot pass: helpers to test any backend with.

Every K/V row that no query selected is NaN, as are pages that nobody refers to; unused page-table entries hold ids that
lead nowhere. Where each token of a float8 cache has a scale, that of an unselected one is NaN too. A backend that
touches what it should not gives NaN or fails.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from nsa_sel.quantize import quantize_kv
from nsa_sel.reference import row_tokens, selection_attention_reference

LAYOUTS = ("contiguous", "tokens_first", "packed")
_HALF = (torch.float16, torch.bfloat16)
_SPARE_PAGES = 3
MAE_LIMIT = 1e-3  # N(0, 1) inputs, L >= 16, default scale, fp16 and bf16
LSE_LIMIT = 2e-5  # of max(1, |lse|): a sum of D products and of L exponentials in fp32


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ranges: torch.Tensor | None = None
    block_indices: torch.Tensor | None = None
    block_size: int | None = None
    counts: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    table_rows: torch.Tensor | None = None
    causal: bool = True
    k_scale: float | torch.Tensor | None = None
    v_scale: float | torch.Tensor | None = None
    softmax_scale: float | None = None

    def arguments(self, **more: Any) -> dict[str, Any]:
        """Return keyword arguments for `selection_attention`, with `more` added."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | more

    def to(self, device: str | torch.device) -> Inputs:
        """Return the same inputs on another device, strides kept."""
        moved: dict[str, Any] = {
            field.name: _move(value, device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)

    def rows(self) -> list[tuple[int, int, int]]:
        """Return every row (b, s, g)."""
        B, S, G = self.q.shape[:3]
        return [(b, s, g) for b in range(B) for s in range(S) for g in range(G)]

    def tokens(self, row: tuple[int, int, int]) -> list[int]:
        """Return the token ids that a row selects, by the oracle's rules."""
        return row_tokens(
            self.q, self.k, self.ranges, self.block_indices, self.block_size, self.counts, self.seq_lens,
            self.block_table, self.table_rows, self.causal, row,
        )  # fmt: skip


def _move(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    if tensor.device == torch.device(device) or not tensor.numel():
        return tensor.to(device)
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    storage = tensor.as_strided((extent,), (1,)).to(device)
    return storage.as_strided(tensor.shape, tensor.stride())


def make_inputs(
    *,
    ranges: torch.Tensor | None = None,
    block_indices: torch.Tensor | None = None,
    block_size: int | None = None,
    h: int = 4,
    Dk: int = 64,
    Dv: int = 64,
    S_kv: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    seq_lens: list[int] | None = None,
    page_size: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    layout: str = "contiguous",
    counts: torch.Tensor | None = None,
    table_rows: list[int] | None = None,
    kv_scope: str | None = None,
    seed: int = 0,
) -> Inputs:
    """Make N(0, 1) inputs on the CPU for a given selection, with NaN in every K/V row that no query selects.

    Args:
        ranges: [B, S, G, n, 2], or block_indices: [B, S, G, n] with block_size; B, S and G come from them.
        S_kv: tokens of the cache; with page_size a multiple of it.
        layout: strides of k and v: "contiguous"; "tokens_first", a view of [B, S_kv, G, D]; "packed", the two slices
            of one tensor [B, G, S_kv, Dk + Dv].
        counts: [B, S, G] slots in use; what stands behind them is given to the call as it is.
        table_rows: with page_size, row of the page table that each of the B entries uses; outside [0, B): none.
        kv_scope: k and v in float8_e4m3fn, with scales as `quantize_kv` gives them for this scope; "none": without
            scales, "number": with one number each. None: k and v in `dtype`.
    """
    selection = ranges if ranges is not None else block_indices
    if selection is None or layout not in LAYOUTS:
        raise ValueError(f"make_inputs: expected ranges or block_indices and a layout of {LAYOUTS}, got {layout!r}")
    if table_rows is not None and page_size is None:
        raise ValueError("make_inputs: expected a page_size with table_rows, got None")
    B, S, G = selection.shape[:3]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    caches, cache_of = B, list(range(B))
    if table_rows is not None:
        cache_of = table_rows
        caches = 1 + max([row for row in table_rows if 0 <= row < B] or [0])  # one per row of the page table
    q, k, v = normal(B, S, G, h, Dk), normal(caches, G, S_kv, Dk), normal(caches, G, S_kv, Dv)
    lengths = None if seq_lens is None else torch.tensor(seq_lens, dtype=torch.int32)
    flat = Inputs(
        q, k, v, ranges, block_indices=block_indices, block_size=block_size, counts=counts, seq_lens=lengths,
        causal=causal, softmax_scale=softmax_scale,
    )  # fmt: skip
    selected = torch.zeros(caches, G, S_kv, dtype=torch.bool)
    for row in flat.rows():
        if 0 <= cache_of[row[0]] < caches:
            selected[cache_of[row[0]], row[2], flat.tokens(row)] = True
    caches_of_call: dict[str, torch.Tensor] = {"k": k, "v": v}  # and scales of tokens: [B, G, S_kv, ...], NaN-poisoned
    numbers: dict[str, Any] = {}  # scales of more than a token
    if kv_scope is not None:
        caches_of_call, numbers = _quantized(k, v, kv_scope)
    for cache in caches_of_call.values():
        cache[~selected] = _poison(cache)
    table = None
    if page_size is not None:
        reach = None
        if seq_lens is not None:
            longest = [
                max([n for n, row in zip(seq_lens, cache_of, strict=True) if row == i] or [0]) for i in range(caches)
            ]
            reach = torch.tensor(longest, dtype=torch.int32)
        caches_of_call, table = _paginate(caches_of_call, reach, page_size, generator)
    k, v = _lay_out(caches_of_call.pop("k"), caches_of_call.pop("v"), layout)
    if kv_scope is not None:
        k, v = k.view(torch.float8_e4m3fn), v.view(torch.float8_e4m3fn)
    if caches_of_call:
        pair = _lay_out(caches_of_call["k_scale"], caches_of_call["v_scale"], layout)
        numbers = {"k_scale": pair[0].squeeze(3), "v_scale": pair[1].squeeze(3)}
    rows = None if table_rows is None else torch.tensor(table_rows, dtype=torch.int32)
    return replace(flat, k=k, v=v, block_table=table, table_rows=rows, **numbers)


def _poison(cache: torch.Tensor) -> float | int:
    """Return NaN, of bytes that of float8_e4m3fn."""
    return 0x7F if cache.dtype == torch.uint8 else torch.nan


def _quantized(
    k: torch.Tensor, v: torch.Tensor, scope: str
) -> tuple[dict[str, torch.Tensor], dict[str, float | torch.Tensor]]:
    """Return K and V as float8 bytes, beside them the scales [B, G, S_kv, 1] of each token; and all other scales."""
    if scope in ("none", "number"):
        step = 1.0 if scope == "none" else 2.0**-5
        k8, v8 = ((t.float() / step).to(torch.float8_e4m3fn).view(torch.uint8) for t in (k, v))
        return {"k": k8, "v": v8}, {} if scope == "none" else {"k_scale": step, "v_scale": step}
    k8, v8, k_scale, v_scale = quantize_kv(k, v, scope)
    stored = {"k": k8.view(torch.uint8), "v": v8.view(torch.uint8)}
    if scope == "token":
        return stored | {"k_scale": k_scale.unsqueeze(3), "v_scale": v_scale.unsqueeze(3)}, {}
    return stored, {"k_scale": k_scale, "v_scale": v_scale}


def _paginate(
    caches: dict[str, torch.Tensor], lengths: torch.Tensor | None, page_size: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Scatter caches [B, G, S_kv, D] over pages [P, G, page_size, D] in random order."""
    B, G, S_kv, _ = caches["k"].shape
    if S_kv % page_size:
        raise ValueError(f"S_kv: expected a multiple of page_size={page_size}, got {S_kv}")
    max_pages = S_kv // page_size
    pages = B * max_pages + _SPARE_PAGES
    table = torch.randperm(pages, generator=generator)[: B * max_pages].view(B, max_pages).to(torch.int32)
    pools = {}
    for name, cache in caches.items():
        pool = torch.full((pages, G, page_size, cache.shape[3]), _poison(cache), dtype=cache.dtype)
        pool[table.long()] = cache.view(B, G, max_pages, page_size, -1).transpose(1, 2)
        pools[name] = pool
    if lengths is not None:
        # entries past seq_lens: no page at all, or somebody else's
        wrong = torch.tensor([-1, pages, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
        unused = torch.arange(0, S_kv, page_size) >= lengths.clamp(0, S_kv).unsqueeze(1)
        filler = wrong[torch.arange(B * max_pages) % len(wrong)].view(B, max_pages)
        table = torch.where(unused, filler, table)
    return pools, table


def _lay_out(k: torch.Tensor, v: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    if layout == "tokens_first":
        return k.transpose(1, 2).contiguous().transpose(1, 2), v.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":
        both = torch.cat([k, v], dim=-1)
        return both[..., : k.shape[-1]], both[..., k.shape[-1] :]
    return k, v


def pytorch_in_dtype(inputs: Inputs) -> torch.Tensor:
    """Do the same computation plainly by PyTorch in the inputs' dtype: the yardstick of a fair error."""
    scale = inputs.q.shape[-1] ** -0.5 if inputs.softmax_scale is None else inputs.softmax_scale
    out = inputs.q.new_zeros((*inputs.q.shape[:4], inputs.v.shape[-1]))
    for b, s, g in inputs.rows():
        tokens = torch.tensor(inputs.tokens((b, s, g)), dtype=torch.int64)
        if not tokens.numel():
            continue
        place: tuple[torch.Tensor | int, ...] = (b, g, tokens)
        if inputs.block_table is not None:
            size = inputs.k.shape[2]
            table_row = b if inputs.table_rows is None else int(inputs.table_rows[b])
            place = (inputs.block_table[table_row, tokens // size].long(), g, tokens % size)
        keys, values = _in_dtype(inputs, "k", place), _in_dtype(inputs, "v", place)
        out[b, s, g] = torch.softmax(inputs.q[b, s, g] @ keys.T * scale, dim=-1) @ values
    return out


def _in_dtype(inputs: Inputs, name: str, place: tuple[torch.Tensor | int, ...]) -> torch.Tensor:
    """Return rows of k or v in q's dtype, those of a float8 cache times their scales."""
    cache: torch.Tensor = getattr(inputs, name)
    if cache.dtype == inputs.q.dtype:
        return cache[place]
    rows = cache.view(torch.uint8)[place].view(cache.dtype).float()
    scale: float | torch.Tensor | None = getattr(inputs, f"{name}_scale")
    if isinstance(scale, torch.Tensor):
        scale = scale[place].unsqueeze(1) if scale.dim() == 3 else scale.reshape(-1).expand(cache.shape[1])[place[1]]
    return (rows if scale is None else rows * scale).to(inputs.q.dtype)


@dataclass(frozen=True)
class Errors:
    """Distance from the oracle; `allowed` is what the contract grants."""

    max_err: float
    max_allowed: float
    mae: float  # over rows with L >= 16, NaN where there are none
    lse_err: float  # relative to max(1, |lse|)


def assert_matches_reference(out: torch.Tensor, lse: torch.Tensor | None, inputs: Inputs) -> Errors:
    """Compare out [B, S, G, h, Dv] and lse [B, S, G, h] with the oracle by the contract's rule of accuracy.

    Positions of inf and NaN must agree first. Then the error may be twice that of plain PyTorch in the same dtype, plus
    one rounding of the largest result; half inputs keep MAE <= 1e-3 over rows of L >= 16 at the default scale.
    """
    inputs = inputs.to("cpu")
    expected, expected_lse = selection_attention_reference(**inputs.arguments())
    dtype = inputs.q.dtype
    assert out.dtype == dtype, f"out: expected {dtype}, got {out.dtype}"
    assert out.shape == expected.shape, f"out: expected {tuple(expected.shape)}, got {tuple(out.shape)}"
    got = out.detach().cpu().to(torch.float64)
    _assert_same_specials("out", got, expected)

    usable = torch.isfinite(expected)
    # NaN where all logits are -inf and out is 0: PyTorch's softmax divides 0 by 0 there, and excuses no error
    plain = torch.where(usable, (pytorch_in_dtype(inputs).to(torch.float64) - expected).abs(), 0).nan_to_num(0.0)
    error = torch.where(usable, (got - expected).abs(), 0)
    largest = torch.where(usable, expected.abs(), 0)
    epsilon = torch.finfo(dtype).eps
    # half a unit in the last place is one rounding; fp32 and fp64 results may also differ by the order of their sums
    rounding = epsilon / 2 if dtype in _HALF else 8 * epsilon
    max_allowed = 2 * _max(plain) + rounding * _max(largest)
    assert _max(error) <= max_allowed, f"out: expected an error of at most {max_allowed:.3g}, got {_max(error):.3g}"

    mae = float("nan")
    long_rows = torch.tensor([len(inputs.tokens(row)) >= 16 for row in inputs.rows()]).view(inputs.q.shape[:3])
    if long_rows.any():
        mae = error[long_rows].mean().item()
        if dtype in _HALF and inputs.softmax_scale is None:
            assert mae <= MAE_LIMIT, f"out: expected a mean error of at most {MAE_LIMIT}, got {mae:.3g}"
    return Errors(_max(error), max_allowed, mae, _check_lse(lse, expected_lse))


def _check_lse(lse: torch.Tensor | None, expected: torch.Tensor) -> float:
    if lse is None:
        return float("nan")
    assert lse.dtype == torch.float32, f"lse: expected float32, got {lse.dtype}"
    assert lse.shape == expected.shape, f"lse: expected {tuple(expected.shape)}, got {tuple(lse.shape)}"
    got = lse.detach().cpu().to(torch.float64)
    _assert_same_specials("lse", got, expected)
    usable = torch.isfinite(expected)
    error = _max(torch.where(usable, (got - expected).abs() / expected.abs().clamp_min(1), 0))
    assert error <= LSE_LIMIT, f"lse: expected a relative error of at most {LSE_LIMIT}, got {error:.3g}"
    return error


def _assert_same_specials(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Require NaN, +inf and -inf in the same places: afterwards no comparison can be passed by NaN."""
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(got) != test(expected)
        assert not wrong.any(), (
            f"{name}: expected {what} in {int(test(expected).sum())} places, got it in {int(test(got).sum())}; "
            f"first difference at {tuple(wrong.nonzero()[0].tolist())}"
        )


def _max(tensor: torch.Tensor) -> float:
    return tensor.max().item() if tensor.numel() else 0.0
