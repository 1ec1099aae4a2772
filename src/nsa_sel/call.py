"""`Call`: one checked call, the only form in which routing, the backends, the binding and the emulator see it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

KERNEL_ALIGNMENT = 16  # bytes: the kernel loads q, K and V 16 bytes at a time


@dataclass(slots=True, kw_only=True)
class Call:
    """The checked arguments of one call and what follows from them; built by `check` and by nobody else.

    `max_selected` is a bound of L: the caller's promise, what the selection can hold at the most, or the smaller of
    both; None where nothing is known but the size of the cache. `block_size` is cut to the cache: a block longer than
    the cache covers it and every other one starts behind it, so that products with a block id stay small.
    """

    q: torch.Tensor  # [B, S, G, h, Dk]
    k: torch.Tensor  # [B, G, S_kv, Dk], paged: [P, G, page_size, Dk]
    v: torch.Tensor  # [B, G, S_kv, Dv], paged: [P, G, page_size, Dv]
    ranges: torch.Tensor | None = None  # [B, S, G, n, 2] int32 | int64
    block_indices: torch.Tensor | None = None  # [B, S, G, n] int32 | int64
    counts: torch.Tensor | None = None  # [B, S, G] int32
    seq_lens: torch.Tensor | None = None  # [B] int32
    block_table: torch.Tensor | None = None  # [R, max_pages] int32
    table_rows: torch.Tensor | None = None  # [B] int32
    k_scale: torch.Tensor | None = None  # fp32 [1] | [G] | [B, G, S_kv], paged: [P, G, page_size]; None: 1
    v_scale: torch.Tensor | None = None  # as k_scale
    out: torch.Tensor | None = None  # [B, S, G, h, Dv]

    B: int  # batch entries
    S: int  # query positions per batch entry
    G: int  # KV groups
    h: int  # query heads per group
    Dk: int
    Dv: int
    S_kv: int  # tokens the cache can hold per batch entry (paged: max_pages * page_size)
    n: int  # selection slots per row
    page_size: int = 0  # tokens; 0 where the cache is not paged
    num_pages: int = 0  # P, physical pages; 0 where the cache is not paged
    num_tables: int = 0  # R, rows of block_table; 0 where the cache is not paged
    block_size: int = 0  # l_sel in tokens, at most S_kv; 0 for ranges

    dtype: str  # of q and out: "float16" | "bfloat16" | "float32" | "float64"
    kv_dtype: str = ""  # of k and v: "float8_e4m3fn", or that of q, which stands for ""
    device_type: str = "cpu"  # "cpu" | "cuda" | what else torch calls a device
    device_index: int = 0
    causal: bool = True
    max_selected: int | None = None  # a bound of L in tokens
    scale: float  # of the logits; a k_scale that was given as a number is a factor of it
    v_factor: float = 1.0  # of out: a v_scale that was given as a number
    return_lse: bool = False
    batch_invariant: bool = False
    requires_grad: bool = False

    rows: int = field(init=False)  # rows (b, s, g)
    largest: int = field(init=False)  # the most tokens that a row can select, whatever the values are

    def __post_init__(self) -> None:
        """Derive every bound, here and nowhere else."""
        self.kv_dtype = self.kv_dtype or self.dtype
        self.rows = self.B * self.S * self.G
        if self.block_size > self.S_kv:
            self.block_size = max(self.S_kv, 1)
        self.largest = self.n * (self.block_size or self.S_kv)
        if self.max_selected is not None:
            self.max_selected = min(self.max_selected, self.largest)
        elif self.block_size:
            self.max_selected = self.largest

    @property
    def selection(self) -> torch.Tensor:
        """The ranges or the block indices, whichever the call has."""
        selection = self.ranges if self.ranges is not None else self.block_indices
        assert selection is not None
        return selection

    @property
    def paged(self) -> bool:
        """Whether k and v are pools of pages."""
        return self.block_table is not None

    @property
    def fp8(self) -> bool:
        """Whether k and v are float8_e4m3fn, with or without scales."""
        return self.kv_dtype == "float8_e4m3fn"

    def scale_strides(self, scale: torch.Tensor | None) -> tuple[int, int, int]:
        """Return the strides by which k_scale or v_scale goes along with k's first three dimensions, in elements.

        A stride is 0 where the scale does not depend on that dimension: all of them for one scale of the whole cache,
        all but that of the group for [G].
        """
        if scale is None:
            return 0, 0, 0
        if scale.dim() == 3:
            s0, s1, s2 = scale.stride()
            return s0, s1, s2
        return 0, scale.stride(0) if scale.numel() > 1 else 0, 0

    def arguments(self) -> dict[str, object]:
        """Return the arguments of `check` that give this call again, but for out.

        A k_scale that was a number is in the softmax_scale.
        """
        return {
            "q": self.q, "k": self.k, "v": self.v, "ranges": self.ranges, "block_indices": self.block_indices,
            "block_size": self.block_size or None, "counts": self.counts, "seq_lens": self.seq_lens,
            "block_table": self.block_table, "table_rows": self.table_rows, "causal": self.causal,
            "max_selected": self.max_selected, "softmax_scale": self.scale, "return_lse": self.return_lse,
            "batch_invariant": self.batch_invariant, "k_scale": self.k_scale,
            "v_scale": self.v_factor if self.fp8 and self.v_scale is None else self.v_scale,
        }  # fmt: skip

    def unreadable(self) -> str | None:
        """Say which tensor's memory does not hold its values, so that no kernel can read it; None where all do."""
        for tensor in (
            self.q, self.k, self.v, self.ranges, self.block_indices, self.counts, self.seq_lens, self.block_table,
            self.table_rows, self.k_scale, self.v_scale, self.out,
        ):  # fmt: skip
            if tensor is None or tensor.is_meta:  # "tensors on meta" is another reason's business
                continue
            if tensor.is_neg() or (not tensor.data_ptr() and tensor.numel()):
                name = next(name for name in self.__slots__ if getattr(self, name) is tensor)
                return f"{name}: its memory holds its negative (resolve_neg()), or nothing"
        return None

    def misaligned(self) -> str | None:
        """Say which base or stride of q, k, v is no multiple of 16 bytes; None where all are."""
        for name, tensor in (("q", self.q), ("k", self.k), ("v", self.v)):
            size, bits = tensor.element_size(), tensor.data_ptr()
            for stride in tensor.stride()[:-1]:
                bits |= stride * size
            if bits % KERNEL_ALIGNMENT and (why := _misaligned(name, tensor)) is not None:
                return why
        return None


def _misaligned(name: str, tensor: torch.Tensor) -> str | None:
    if tensor.data_ptr() % KERNEL_ALIGNMENT:
        return f"{name}: expected a base address of a multiple of 16 bytes, got {tensor.data_ptr():#x}"
    size = tensor.element_size()
    for extent, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if extent > 1 and stride * size % KERNEL_ALIGNMENT:  # a size-1 dimension may have any stride
            got = [s * size for s in tensor.stride()[:-1]]
            return f"{name}: expected strides of multiples of 16 bytes, got {got} bytes"
    return None
