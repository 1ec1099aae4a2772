"""Calls as vLLM makes them, and what they must give in fp64, written from vLLM's semantics and not from our code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

PAGE = 128  # of MiniMax-M3: one block is one page
HUGE = 1_000_000


@dataclass
class M3Case:
    """Requests with a prefix in the cache and some queries at their end."""

    name: str
    lengths: list[int]  # tokens in the cache, queries included; 0: a padded request
    queries: list[int]  # per request
    G: int = 2
    h: int = 3
    D: int = 16
    n: int = 3
    dtype: torch.dtype = torch.float32
    behind: str = "garbage"  # what stands in slots that vLLM does not read: "garbage" or -1
    unused: bool = True  # -1 among the slots that are read
    layout: str = "packed"  # or "token major": [P, 128, G, 2 * D] in memory
    tensors: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the tensors; whatever no query may read is NaN."""
        generator = torch.Generator().manual_seed(len(self.name) + sum(self.lengths) + self.n)
        pages_of = [-(-length // PAGE) for length in self.lengths]
        P, width, T = sum(pages_of) + 2, max(pages_of) + 1, sum(self.queries)
        order = torch.randperm(P, generator=generator)[: sum(pages_of)].tolist()
        shape = (P, self.G, PAGE, 2 * self.D) if self.layout == "packed" else (P, PAGE, self.G, 2 * self.D)
        cache = torch.full(shape, float("nan"), dtype=self.dtype)
        cache = cache if self.layout == "packed" else cache.transpose(1, 2)
        table = torch.zeros(len(self.lengths), width, dtype=torch.int32)  # vLLM fills unused entries with page 0
        for request, length in enumerate(self.lengths):
            for logical in range(pages_of[request]):
                page = table[request, logical] = order.pop()
                tokens = min(PAGE, length - logical * PAGE)
                cache[page, :, :tokens] = torch.randn(self.G, tokens, 2 * self.D, generator=generator).to(self.dtype)

        self.kv_len, self.request, topk = [], [], torch.full((self.G, T, self.n), -1, dtype=torch.int32)
        if self.behind == "garbage":
            topk.copy_(torch.randint(0, width, topk.shape, generator=generator))
        for request, (length, queries) in enumerate(zip(self.lengths, self.queries, strict=True)):
            for s in range(queries):
                t, kv_len = len(self.kv_len), max(0, length - queries + s + 1)
                self.kv_len.append(kv_len)
                self.request.append(request)
                blocks = -(-kv_len // PAGE)
                for g in range(self.G):
                    chosen = torch.randperm(max(blocks, 1), generator=generator)[: min(self.n, blocks)]
                    topk[g, t, : len(chosen)] = chosen
                    if self.unused and len(chosen) > 1:
                        topk[g, t, 0] = -1
        self.tensors = dict(
            q=torch.randn(T, self.G * self.h, self.D, generator=generator).to(self.dtype),
            kv_cache=cache,
            # vLLM hands over a transposed view of its buffer, which is token major
            topk_idx=topk.transpose(0, 1).contiguous().transpose(0, 1),
            block_table=table,
            seq_lens=torch.tensor(self.lengths, dtype=torch.int32),
            num_kv_heads=self.G,
            sm_scale=0.3,
        )

    def decode(self) -> dict[str, Any]:
        """Return the arguments of `minimax_m3_sparse_attn_decode`, output poisoned."""
        assert len(set(self.queries)) == 1
        output = torch.full_like(self.tensors["q"], float("nan"))
        return dict(self.tensors, output=output, decode_query_len=self.queries[0])

    def prefill(self) -> dict[str, Any]:
        """Return the arguments of `minimax_m3_sparse_attn`, output poisoned."""
        queries = torch.tensor(self.queries, dtype=torch.int32)
        starts = torch.nn.functional.pad(queries.cumsum(0), (1, 0)).to(torch.int32)
        return dict(
            self.tensors,
            output=torch.full_like(self.tensors["q"], float("nan")),
            cu_seqlens_q=starts,
            prefix_lens=self.tensors["seq_lens"] - queries,
            max_query_len=max(self.queries),
        )

    def live(self) -> torch.Tensor:
        """Return which rows [T, G * h] see a token."""
        return self.expected().abs().sum(-1) > 0

    def expected(self) -> torch.Tensor:
        """Return out [T, G * h, D] in fp64."""
        q, cache = self.tensors["q"].double(), self.tensors["kv_cache"].double()
        topk, table = self.tensors["topk_idx"], self.tensors["block_table"]
        out = torch.zeros(q.shape, dtype=torch.float64)
        for t, (kv_len, request) in enumerate(zip(self.kv_len, self.request, strict=True)):
            for g in range(self.G):
                rows = []
                for block in topk[g, t, : min(self.n, -(-kv_len // PAGE))].tolist():
                    if block >= 0 and block * PAGE < kv_len:
                        rows.append(cache[table[request, block], g, : kv_len - block * PAGE])
                if rows:
                    kv = torch.cat(rows)
                    heads = slice(g * self.h, (g + 1) * self.h)
                    p = (q[t, heads] @ kv[:, : self.D].T * self.tensors["sm_scale"]).softmax(-1)
                    out[t, heads] = p @ kv[:, self.D :]
        return out


M3_DECODE = [
    M3Case("one query", [300, 90, 128], [1, 1, 1]),
    M3Case("two queries", [300, 129], [2, 2]),
    M3Case("two queries on either side of a block's end", [129, 257, 385, 129], [2] * 4, n=5),
    M3Case("shorter than its queries", [300, 1], [3, 3]),
    M3Case("padded requests", [260, 0, 0], [1, 1, 1]),
    M3Case("padded, two queries", [260, 0], [2, 2]),
    M3Case("more slots than blocks", [130, 20], [1, 1], n=8),
    M3Case("token major", [300, 90], [1, 1], layout="token major"),
    M3Case("one KV head", [200, 90], [1, 1], G=1, h=16),
]
M3_PREFILL = [
    M3Case("ragged", [20, 140, 3], [20, 12, 1], unused=False),
    M3Case("decodes beside a prefill", [300, 90, 40], [1, 1, 9], unused=False),
    M3Case("a request without queries", [10, 30, 4], [3, 0, 4], unused=False),
]


@dataclass
class QSACase:
    """Queries with token ids of their own, packed with their count, and an output gate."""

    name: str
    counts: list[int]  # ids in use of each query
    requests: list[int]  # row of the block table of each query; out of range: selects nothing
    n: int = 11
    G: int = 2
    h: int = 3
    D: int = 16
    page: int = 16
    width: int = 5  # pages per request
    dtype: torch.dtype = torch.float32
    behind: str = "garbage"  # what stands behind the count
    bad: bool = True  # ids that select nothing: negative, behind the table, on pages outside the pool
    tensors: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the tensors; tokens that nobody selects are NaN."""
        generator = torch.Generator().manual_seed(len(self.name) + self.n)
        T, R, P = len(self.counts), 3, 3 * self.width + 1
        table = torch.randperm(P, generator=generator)[: R * self.width].view(R, self.width).to(torch.int32)
        if self.bad:
            table[0, -1], table[1, -1] = P, -1
        ids = torch.full((T, self.n + 1), -1, dtype=torch.int32)
        if self.behind == "garbage":
            ids.copy_(torch.randint(0, self.page * self.width, ids.shape, generator=generator))
        room = self.page * (self.width - self.bad)
        for t, count in enumerate(self.counts):
            used = min(max(count, 0), self.n)
            ids[t, :used] = torch.randperm(room, generator=generator)[:used]
            if self.bad and count > 4:
                ids[t, 0], ids[t, 1], ids[t, 2] = -7, HUGE, self.page * self.width - 1
            ids[t, -1] = count
        self.selected = [self._tokens(ids[t], table, P, self.requests[t], self.counts[t]) for t in range(T)]
        shape = (P, self.page, self.G, self.D)
        kv = torch.full((2, *shape), float("nan"), dtype=self.dtype)
        for page, offset in {place for places in self.selected for place in places}:
            kv[:, page, offset] = torch.randn(2, self.G, self.D, generator=generator).to(self.dtype)
        self.tensors = dict(
            q=torch.randn(T, self.G * self.h, self.D, generator=generator).to(self.dtype),
            k_cache=kv[0],
            v_cache=kv[1],
            logical_indices=ids,
            block_table=table,
            token_to_req=torch.tensor(self.requests, dtype=torch.int32),
            use_prefill_config=False,
            output_gate=torch.randn(T, self.G * self.h * self.D, generator=generator).to(self.dtype),
        )

    def _tokens(
        self, ids: torch.Tensor, table: torch.Tensor, pages: int, request: int, count: int
    ) -> list[tuple[int, int]]:
        places = []
        for token in ids[: min(max(count, 0), self.n)].tolist() if 0 <= request < table.shape[0] else []:
            if 0 <= token < self.page * self.width and 0 <= table[request, token // self.page] < pages:
                places.append((int(table[request, token // self.page]), token % self.page))
        return places

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `qsa_sparse_paged_attention`, out poisoned."""
        return dict(self.tensors, out=torch.full_like(self.tensors["q"], float("nan")))

    def expected(self) -> torch.Tensor:
        """Return out [T, G * h, D] in fp64, gate included."""
        q, k, v = (self.tensors[name].double() for name in ("q", "k_cache", "v_cache"))
        out = torch.zeros(q.shape, dtype=torch.float64)
        for t, places in enumerate(self.selected):
            if not places:
                continue
            pages, offsets = (torch.tensor(x) for x in zip(*places, strict=True))
            for g in range(self.G):
                heads = slice(g * self.h, (g + 1) * self.h)
                p = (q[t, heads] @ k[pages, offsets, g].T * self.D**-0.5).softmax(-1)
                out[t, heads] = p @ v[pages, offsets, g]
        return out * self.tensors["output_gate"].double().view_as(out).sigmoid()


QSA = [
    QSACase("some", [11, 7, 1, 0], [0, 1, 2, 1]),
    QSACase("without a request", [5, 5, 5], [-1, 3, 2]),
    QSACase("counts out of range", [99, -3, 2], [0, 2, 1], bad=False),
    QSACase("2,051 ids", [2051, 900], [0, 2], n=2051, page=64, width=40, bad=False),
]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest error; NaN and inf are infinitely wrong."""
    difference = (got.double() - expected).abs()
    return float(difference.nan_to_num(float("inf"), float("inf")).max())
