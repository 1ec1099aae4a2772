"""The one list of cases that every backend runs: shapes, selections, layouts and dtypes as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from nsa_sel import _core
from nsa_sel.testing import Inputs, make_inputs

HALF = (torch.float16, torch.bfloat16)
KERNEL_DIMS = sorted({(i["Dk"], i["Dv"]) for i in _core.instances()})
INT32_MAX, INT32_MIN = 2**31 - 1, -(2**31)
INT64_MAX, INT64_MIN = 2**63 - 1, -(2**63)

Selection = Callable[["Case", torch.Generator], torch.Tensor]  # -> ranges [B, S, G, n, 2] or blocks [B, S, G, n]


@dataclass(frozen=True)
class Case:
    """One call; `select` makes the ranges, or the block ids where block_size is given."""

    name: str
    select: Selection
    B: int = 1
    S: int = 1
    G: int = 2
    h: int = 4
    Dk: int = 64
    Dv: int = 64
    S_kv: int = 256
    n: int = 4
    dtype: torch.dtype = torch.bfloat16
    index_dtype: torch.dtype = torch.int32
    block_size: int | None = None
    page_size: int | None = None
    seq_lens: tuple[int, ...] | None = None
    causal: bool = True
    softmax_scale: float | None = None
    layout: str = "contiguous"
    counts: tuple[int, ...] | None = None  # again and again, as many as there are rows
    table_rows: tuple[int, ...] | None = None
    kv_scope: str | None = None  # a float8 cache and what shares a scale in it, as make_inputs has it
    seed: int = 0
    heavy: bool = False  # many tokens: a backend that runs in slow motion may leave it to its own longer suite
    options: dict[str, object] = field(default_factory=dict)  # more keywords of the call

    def inputs(self) -> Inputs:
        """Make the tensors, NaN in all that is not selected."""
        generator = torch.Generator().manual_seed(1000 + self.seed)
        selection = self.select(self, generator).to(self.index_dtype)
        counts = None
        if self.counts is not None:
            given = [self.counts[i % len(self.counts)] for i in range(self.B * self.S * self.G)]
            counts = torch.tensor(given, dtype=torch.int32).view(self.B, self.S, self.G)
        return make_inputs(
            ranges=selection if self.block_size is None else None,
            block_indices=None if self.block_size is None else selection,
            block_size=self.block_size,
            h=self.h, Dk=self.Dk, Dv=self.Dv, S_kv=self.S_kv, dtype=self.dtype,
            seq_lens=None if self.seq_lens is None else list(self.seq_lens),
            page_size=self.page_size, causal=self.causal, softmax_scale=self.softmax_scale, layout=self.layout,
            counts=counts, table_rows=None if self.table_rows is None else list(self.table_rows),
            kv_scope=self.kv_scope, seed=self.seed,
        )  # fmt: skip


def _integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator)


def spans(longest: int) -> Selection:
    """Spans of 0 to `longest` tokens at any place: unaligned, overlapping, in no order."""

    def select(case: Case, generator: torch.Generator) -> torch.Tensor:
        shape = (case.B, case.S, case.G, case.n)
        start = _integers(0, max(1, case.S_kv), shape, generator)
        return torch.stack([start, start + _integers(0, longest + 1, shape, generator)], dim=-1)

    return select


def fixed(rows: list[list[list[int]]]) -> Selection:
    """The same spans [[start, end], ...] again and again: row i of the call gets `rows[i % len(rows)]`."""

    def select(case: Case, generator: torch.Generator) -> torch.Tensor:
        count = case.B * case.S * case.G
        chosen = [rows[i % len(rows)] for i in range(count)]
        return torch.tensor(chosen, dtype=torch.int64).view(case.B, case.S, case.G, -1, 2)

    return select


def hostile(values: tuple[int, ...]) -> Selection:
    """Spans between any two of these values."""

    def select(case: Case, generator: torch.Generator) -> torch.Tensor:
        pool = torch.tensor(values, dtype=torch.int64)
        return pool[_integers(0, len(values), (case.B, case.S, case.G, case.n, 2), generator)]

    return select


def blocks(unused: int = 0) -> Selection:
    """Distinct blocks of the cache in random order, the last `unused` slots holding -1."""

    def select(case: Case, generator: torch.Generator) -> torch.Tensor:
        assert case.block_size is not None
        count = -(-case.S_kv // case.block_size)
        weights = torch.ones(case.B * case.S * case.G, count)
        picked = torch.multinomial(weights, case.n, generator=generator)
        picked[:, case.n - unused :] = -1
        return picked.view(case.B, case.S, case.G, case.n)

    return select


def block_ids(ids: list[int]) -> Selection:
    """The same block ids in every row."""

    def select(case: Case, generator: torch.Generator) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64).expand(case.B, case.S, case.G, len(ids))

    return select


_EDGES_32 = (INT32_MIN, -1000, -1, 0, 1, 63, 64, 65, 200, 255, 256, 257, INT32_MAX)
_EDGES_64 = (INT64_MIN, -(2**32), -1, 0, 1, 100, 256, 2**31, 2**32, 2**32 + 64, INT64_MAX)


def _dims() -> list[Case]:
    base = Case("", spans(60), n=3, h=4)
    cases = []
    for dtype in HALF:
        for Dk, Dv in KERNEL_DIMS:
            name = f"dims-{Dk}x{Dv}-{'fp16' if dtype == torch.float16 else 'bf16'}"
            cases.append(replace(base, name=name, Dk=Dk, Dv=Dv, dtype=dtype, seed=Dk + Dv))
    for dtype, text in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        cases.append(replace(base, name=f"dims-64x64-{text}", dtype=dtype))
        cases.append(replace(base, name=f"dims-192x128-{text}", Dk=192, Dv=128, dtype=dtype))
    cases.append(replace(base, name="dims-80x40-bf16", Dk=80, Dv=40))
    cases.append(replace(base, name="dims-1x1-fp32", Dk=1, Dv=1, dtype=torch.float32))
    return cases


def _heads() -> list[Case]:
    few = [Case(f"h{h}", spans(50), h=h, n=3, seed=h) for h in (1, 2, 3, 4, 5, 7, 8, 12, 16, 17, 24, 32, 33, 48, 64)]
    wide = [Case(f"h{h}-192x128", spans(40), h=h, Dk=192, Dv=128, n=2, G=1, seed=h) for h in (1, 7, 16, 32, 64)]
    return [*few, *wide]


def _selections() -> list[Case]:
    return [
        Case("one-token", fixed([[[7, 8]], [[255, 256]]])),
        Case("two-tokens", fixed([[[0, 1], [255, 256]]])),
        Case("everything", fixed([[[0, 256]]])),
        Case("tile-edges", fixed([[[0, 63]], [[0, 64]], [[0, 65]], [[1, 129]]]), B=2),
        Case("unused-slots-between", fixed([[[5, 5], [10, 30], [40, 20], [100, 101], [0, 0]]])),
        Case("empty-rows", fixed([[[3, 3], [9, 1]], [[0, 20], [30, 33]]]), B=2),
        Case("all-empty", fixed([[[3, 3], [9, 1]]]), B=2),
        Case("duplicates", fixed([[[4, 9], [4, 9], [4, 9]], [[0, 70], [0, 70], [0, 70]]])),
        Case("overlapping", fixed([[[0, 50], [25, 75], [70, 80]]])),
        Case("adjacent", fixed([[[0, 16], [16, 32], [32, 48]]])),
        Case("descending", fixed([[[200, 240], [100, 140], [0, 40]]])),
        Case("odd-starts", fixed([[[1, 8], [13, 30], [101, 118], [255, 256]]])),
        Case("many-tiny-spans", spans(3), n=50, S_kv=512, seed=1),
        Case("33-single-tokens", spans(1), n=33, seed=2),
        Case("300-spans", spans(2), n=300, G=1, seed=3),
        Case("no-slots", spans(1), n=0),
        Case("hostile-int32", hostile(_EDGES_32), B=2, n=6, G=2, seed=4),
        Case("hostile-int64", hostile(_EDGES_64), B=2, n=6, G=2, index_dtype=torch.int64, seed=5),
        Case("int64", spans(60), index_dtype=torch.int64, seed=6),
        Case("scale-1", spans(60), softmax_scale=1.0, seed=7),
        Case("scale-0", spans(60), softmax_scale=0.0, seed=8),
        Case("scale-negative", spans(60), softmax_scale=-0.125, seed=9),
        Case("large-logits", spans(60), softmax_scale=30.0, dtype=torch.float16, seed=10),
    ]


def _lengths() -> list[Case]:
    return [
        Case("seq-lens", spans(100), B=3, G=1, seq_lens=(256, 100, 1), seed=11),
        Case("seq-lens-zero", spans(256), B=3, G=1, seq_lens=(0, 17, 0), seed=12),
        Case("seq-lens-out-of-range", spans(100), B=3, G=1, seq_lens=(INT32_MAX, -5, 257), seed=13),
        Case("draft-causal", spans(300), S=3, n=2, G=1, seed=14),
        Case("draft-not-causal", spans(300), S=3, n=2, G=1, causal=False, seed=15),
        Case("draft-last-tokens", fixed([[[250, 300], [0, 3]]]), S=3, G=1),
        Case("draft-longer-than-sequence", fixed([[[0, 300]]]), B=2, S=3, G=1, seq_lens=(1, 2)),
        Case("draft-seq-lens", spans(100), B=2, S=3, n=3, G=2, seq_lens=(50, 200), seed=16),
        Case("not-causal-seq-lens", spans(100), B=2, S=1, seq_lens=(50, 200), causal=False, seed=17),
        Case("no-tokens", spans(10), S_kv=0, seed=18),
        Case("one-cached-token", fixed([[[0, 1]], [[-4, 9]]]), S_kv=1),
        Case("no-requests", spans(10), B=0, seed=19),
        Case("no-queries", spans(10), S=0, seed=20),
    ]


def _blocks() -> list[Case]:
    return [
        Case("blocks-64", blocks(), block_size=64, n=3, S_kv=512, seed=21),
        Case("blocks-128", blocks(), block_size=128, n=2, S_kv=512, Dk=128, Dv=128, seed=22),
        Case("blocks-1", blocks(), block_size=1, n=40, seed=23),
        Case("blocks-17", blocks(), block_size=17, n=5, seed=24),
        Case("blocks-unused", blocks(2), block_size=64, n=4, S_kv=512, seed=25),
        Case("blocks-int64", blocks(1), block_size=64, n=4, S_kv=512, index_dtype=torch.int64, seed=26),
        Case("blocks-all-unused", block_ids([-1, -1, INT32_MIN]), block_size=64),
        Case("blocks-unsorted-duplicates", block_ids([3, 0, 3, -1, 1]), block_size=64),
        Case("blocks-beyond-the-end", block_ids([3, 4, 5, INT32_MAX, INT32_MAX - 1]), block_size=64),
        Case("blocks-64-bit-product", block_ids([2**25, 2**26, 1]), block_size=128),
        Case("blocks-int64-overflow", block_ids([2**57, 2**58, INT64_MAX, INT64_MIN, 2]), block_size=64,
             index_dtype=torch.int64),
        Case("blocks-larger-than-cache", block_ids([0, 1]), block_size=1000, S_kv=100),
        Case("blocks-ragged-end", block_ids([0, 3]), block_size=64, S_kv=200),
        Case("blocks-seq-lens", blocks(), B=3, G=1, block_size=64, n=4, S_kv=256, seq_lens=(256, 65, 0), seed=27),
        Case("blocks-draft", blocks(), S=3, G=1, block_size=64, n=3, S_kv=256, seed=28),
        Case("nsa-paper", blocks(), G=1, h=16, Dk=192, Dv=128, block_size=64, n=16, S_kv=2048, seed=29, heavy=True),
        Case("nsa-paper-short", blocks(), G=1, h=16, Dk=192, Dv=128, block_size=64, n=4, S_kv=512, seed=30),
    ]  # fmt: skip


def _counts() -> list[Case]:
    some = (0, 1, 3, 6, 99, -5, 2**31 - 1, -(2**31))
    return [
        Case("counts", hostile(_EDGES_32), B=4, n=6, counts=some, seed=40),
        Case("counts-int64", hostile(_EDGES_64), B=4, n=6, index_dtype=torch.int64, counts=some, seed=41),
        Case("counts-one-span", spans(100), B=4, n=1, counts=(1, 0, 2), seed=42),
        Case("counts-blocks", block_ids([3, 1, -1, 0, 7, 2**31 - 1]), B=4, block_size=64, counts=some),
        Case("counts-many", spans(3), n=70, S=2, counts=(70, 33, 0, 64), seed=43),
        Case("counts-all-zero", spans(100), B=2, counts=(0,), seed=44),
        Case("counts-pages", spans(60), B=2, page_size=16, seq_lens=(256, 90), counts=(2, 4, 1), seed=45),
    ]


def _table_rows() -> list[Case]:
    base = Case("", spans(60), B=6, G=2, n=3, page_size=16, seed=46, seq_lens=(200, 201, 202, 90, 91, 17))
    return [
        replace(base, name="table-rows-flat", table_rows=(0, 0, 0, 1, 1, 2)),
        replace(base, name="table-rows-any-order", table_rows=(3, 0, 3, 1, 0, 2)),
        replace(base, name="table-rows-outside", table_rows=(0, -1, 2**31 - 1, 1, 6, 0)),
        replace(base, name="table-rows-all-outside", table_rows=(-1, -1, 99, -(2**31), 6, 7)),
        replace(base, name="table-rows-no-lengths", table_rows=(1, 0, 1, 1, 0, 0), seq_lens=None),
        replace(base, name="table-rows-draft", table_rows=(0, 1, 1, 0, 2, -1), S=2, n=2),
        replace(base, name="table-rows-blocks", select=blocks(1), block_size=64, counts=(2, 3, 1),
                table_rows=(0, 0, 0, 1, 1, -1)),
    ]  # fmt: skip


def _pages() -> list[Case]:
    base = Case("", spans(60), B=2, G=2, n=3, seq_lens=(256, 90), seed=31)
    sizes = [replace(base, name=f"pages-{size}", page_size=size) for size in (1, 2, 16, 64, 128, 256)]
    odd = [replace(base, name=f"pages-{size}", page_size=size, S_kv=240, seq_lens=(240, 90)) for size in (3, 24)]
    return [
        *sizes,
        *odd,
        replace(base, name="pages-packed", page_size=64, layout="packed"),
        replace(base, name="pages-packed-192x128", page_size=64, layout="packed", Dk=192, Dv=128),
        replace(base, name="pages-tokens-first", page_size=16, layout="tokens_first"),
        replace(base, name="pages-empty-requests", page_size=64, seq_lens=(0, 0)),
        replace(base, name="pages-no-seq-lens", page_size=64, seq_lens=None),
        replace(base, name="pages-blocks", select=blocks(1), block_size=64, n=3, page_size=64),
        replace(base, name="pages-blocks-not-page-size", select=blocks(), block_size=48, n=3, page_size=32),
        replace(base, name="pages-draft", page_size=16, S=3),
        replace(base, name="pages-hostile", page_size=16, select=hostile(_EDGES_32), n=5),
        replace(base, name="pages-minimax-m3", select=blocks(), block_size=128, page_size=128, n=2, S_kv=512, h=16,
                Dk=128, Dv=128, G=1, seq_lens=(512, 300)),
    ]  # fmt: skip


SCOPES = ("none", "number", "tensor", "group", "token")


def _fp8() -> list[Case]:
    """A float8 cache: every scope of scales, and what else a call has beside "token", which has most to go wrong."""
    base = Case("", spans(60), n=3, G=2, kv_scope="token", seed=60)
    pages = replace(base, B=2, page_size=16, seq_lens=(256, 90))
    dims = [
        replace(
            base, name=f"fp8-dims-{Dk}x{Dv}-{text}-{scope}", Dk=Dk, Dv=Dv, dtype=dtype, kv_scope=scope, seed=Dk + Dv
        )
        for Dk, Dv in KERNEL_DIMS
        for dtype, text in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"))
        for scope in ("group", "token")
    ]
    return [
        *(replace(base, name=f"fp8-{scope}", kv_scope=scope) for scope in SCOPES),
        *(replace(pages, name=f"fp8-pages-{scope}", kv_scope=scope) for scope in SCOPES),
        *dims,
        *(replace(base, name=f"fp8-h{h}", h=h, seed=h) for h in (1, 3, 16, 17, 33, 64)),
        replace(base, name="fp8-h64-group", h=64, G=3, kv_scope="group"),
        replace(base, name="fp8-one-group", G=1, kv_scope="group"),
        replace(base, name="fp8-empty-rows", select=fixed([[[3, 3], [9, 1]], [[0, 20], [30, 33]]]), B=2),
        replace(base, name="fp8-one-token", select=fixed([[[7, 8]], [[255, 256]]])),
        replace(base, name="fp8-tile-edges", select=fixed([[[0, 63]], [[0, 64]], [[0, 65]], [[1, 129]]]), B=2),
        replace(base, name="fp8-many-tiny-spans", select=spans(3), n=50, S_kv=512),
        replace(base, name="fp8-hostile-int32", select=hostile(_EDGES_32), B=2, n=6),
        replace(base, name="fp8-hostile-int64", select=hostile(_EDGES_64), B=2, n=6, index_dtype=torch.int64),
        replace(base, name="fp8-scale-negative", softmax_scale=-0.125),
        replace(base, name="fp8-draft-causal", select=spans(300), S=3, G=1),
        replace(base, name="fp8-counts", select=spans(100), B=4, n=4, counts=(1, 0, 4, 2)),
        replace(base, name="fp8-blocks", select=blocks(1), block_size=64, n=4, S_kv=512),
        replace(base, name="fp8-blocks-int64-overflow", select=block_ids([2**57, 2**58, INT64_MAX, INT64_MIN, 2]),
                block_size=64, index_dtype=torch.int64),
        replace(base, name="fp8-tokens-first", layout="tokens_first", G=3),
        replace(base, name="fp8-packed", layout="packed", Dk=128, Dv=64),
        replace(base, name="fp8-many-rows", select=spans(20), B=6, S=2, h=2),
        replace(base, name="fp8-rows-of-very-different-length", S_kv=512, B=4, h=2,
                select=fixed([[[0, 1]], [[0, 500]], [[7, 9]], [[3, 130]]])),
        replace(base, name="fp8-nsa-paper-short", select=blocks(), G=1, h=16, Dk=192, Dv=128, block_size=64, S_kv=512),
        replace(base, name="fp8-dims-80x40-token", Dk=80, Dv=40),
        replace(pages, name="fp8-pages-packed", page_size=64, layout="packed"),
        replace(pages, name="fp8-pages-tokens-first", layout="tokens_first"),
        replace(pages, name="fp8-pages-blocks", select=blocks(1), block_size=64, page_size=64),
        replace(pages, name="fp8-pages-hostile", select=hostile(_EDGES_32), n=5),
        replace(pages, name="fp8-pages-draft", S=3),
        replace(pages, name="fp8-table-rows", B=6, seq_lens=(200, 201, 202, 90, 91, 17),
                table_rows=(0, 0, 0, 1, -1, 2)),
        replace(pages, name="fp8-pages-minimax-m3", select=blocks(), block_size=128, page_size=128, n=2, S_kv=512, h=16,
                Dk=128, Dv=128, G=1, seq_lens=(512, 300)),
        replace(base, name="fp8-L-4096", select=fixed([[[0, 2048], [2048, 4096]]]), G=1, S_kv=4096, heavy=True),
    ]  # fmt: skip


def _layouts() -> list[Case]:
    return [
        Case("tokens-first", spans(60), layout="tokens_first", G=3, seed=32),
        Case("packed", spans(60), layout="packed", Dk=128, Dv=64, seed=33),
        Case("many-rows", spans(20), B=6, S=2, G=2, n=3, h=2, seed=34),
        Case("rows-of-very-different-length", fixed([[[0, 1]], [[0, 500]], [[7, 9]], [[3, 130]]]), B=4, S_kv=512),
    ]


def _long() -> list[Case]:
    return [
        Case("L-2000", fixed([[[3, 2003]]]), G=1, h=4, S_kv=2048, heavy=True),
        Case("L-4096-blocks", blocks(), G=2, h=16, Dk=128, Dv=128, block_size=64, n=64, S_kv=8192, seed=35, heavy=True),
        Case("L-8192-fp16", fixed([[[0, 4096], [4096, 8192]]]), G=1, h=3, S_kv=8192, dtype=torch.float16, heavy=True),
        Case("L-65536", fixed([[[0, 65536]]]), G=1, h=2, S_kv=65536, heavy=True),
    ]


CASES: tuple[Case, ...] = (
    *_dims(),
    *_heads(),
    *_selections(),
    *_lengths(),
    *_blocks(),
    *_pages(),
    *_counts(),
    *_table_rows(),
    *_fp8(),
    *_layouts(),
    *_long(),
)


def case(name: str) -> Case:
    """Return a case by its name."""
    return next(c for c in CASES if c.name == name)
