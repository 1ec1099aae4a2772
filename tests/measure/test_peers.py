"""The peers' adapters, without the peers: they load, say why they are absent, and refuse what they cannot take."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nsa_sel.measure.run import peers
from nsa_sel.measure.run.contestants import Contestant, Own, selected_tokens
from nsa_sel.measure.run.inputs import Inputs, variants_of
from nsa_sel.measure.run.peers import PEERS, peers_folder
from nsa_sel.measure.run.workload import from_options

FOLDER = Path(__file__).parents[2] / "benchmarks" / "peers"
CPU = torch.device("cpu")


def _adapter(name: str) -> Contestant:
    return peers.load(name, FOLDER / f"{name}.py")


def _inputs(**options: Any) -> Inputs:
    grid = {"rows": [4], "G": 2, "h": [16], "Dk": [64], "S_kv": 512, "block_size": 64, "n": [4], "dtype": ["fp32"]}
    (workload,) = from_options({name: value for name, value in (grid | options).items() if value is not None})
    return variants_of(workload, 0, CPU, 0, 1 << 30)[0]


def test_there_is_an_adapter_for_every_peer_and_the_checkout_is_found() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(PEERS)
    assert peers_folder(FOLDER) == FOLDER
    for name in PEERS:
        assert _adapter(name).name == name


@pytest.mark.parametrize("name", ["flashinfer", "fla", "xunhaolai", "vllm", "flash_attn"])
def test_a_peer_that_is_not_installed_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = _adapter(name)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda module: None)
    reason = adapter.available()
    assert reason is not None
    assert reason.endswith("is not installed")


@pytest.mark.parametrize("name", PEERS)
def test_adapters_refuse_cpu_tensors(name: str) -> None:
    reason = _adapter(name).refuses(_inputs())
    assert reason is not None
    assert "needs CUDA tensors" in reason


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("flashinfer", {"block_size": None, "n": None, "dist": ["few"]}, "takes whole blocks, got dist few"),
        ("flashinfer", {"Dk": [192], "Dv": [128]}, "one head dimension, got 192 and 128"),
        ("flashinfer", {"page_size": 64}, "not paged"),
        ("flashinfer", {"n": [16], "S_kv": 128}, "no unused slots"),
        ("fla", {"h": [4]}, "takes h = 16, 32, 64 ..., got 4"),
        ("fla", {"h": [24]}, "takes h = 16, 32, 64 ..., got 24"),
        ("fla", {"page_size": 64}, "not paged"),
        ("xunhaolai", {"Dk": [192], "Dv": [128]}, "one head dimension"),
        ("vllm", {}, "takes paged caches"),
        ("vllm", {"page_size": 64}, "blocks and pages of 128 tokens, got 64 and 64"),
        ("flex", {"n": [16], "S_kv": 128}, "no unused slots"),
        ("flash_attn", {"dtype": ["fp32"]}, "takes bf16, fp16, got fp32"),
    ],
)
def test_adapters_refuse_what_their_library_cannot_take(
    name: str, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs(**({"dtype": ["bf16"]} | options))
    _as_if_on_cuda(monkeypatch)
    found = _adapter(name).refuses(inputs)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flashinfer", {}),
        ("fla", {"Dk": [192], "Dv": [128]}),
        ("fla", {"n": [16], "S_kv": 128}),
        ("xunhaolai", {"n": [16], "S_kv": 128}),
        ("vllm", {"block_size": 128, "page_size": 128, "n": [2]}),
        ("flex", {"Dk": [192], "Dv": [128]}),
        ("flash_attn", {"block_size": None, "n": None, "dist": ["mixed"]}),
        ("flash_attn", {"page_size": 64}),
    ],
)
def test_adapters_take_what_their_library_can(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = _inputs(**({"dtype": ["bf16"]} | options))
    _as_if_on_cuda(monkeypatch)
    assert _adapter(name).refuses(inputs) is None


def test_flash_attn_adapter_hands_over_the_selected_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of the documented layout [batch, tokens, heads, dim], the adapter computes what we do."""
    module = ModuleType("flash_attn")

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        assert not causal
        swapped = (t.transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(*swapped, enable_gqa=True).transpose(1, 2)

    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    for options in ({}, {"page_size": 64}, {"block_size": None, "n": None, "dist": ["mixed"]}):
        _same(_adapter("flash_attn"), _inputs(**options))


def test_flashinfer_adapter_plans_the_selected_blocks_as_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper:
        def __init__(self, workspace: torch.Tensor, layout: str, **options: Any) -> None:
            assert layout == "HND"
            assert not workspace.any(), "its documentation asks for a workspace of zeros"

        def plan(self, **plan: Any) -> None:
            self.plan_ = SimpleNamespace(**plan)

        def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            p, outs = self.plan_, []
            for request in range(len(p.indptr) - 1):
                pages = p.indices[p.indptr[request] : p.indptr[request + 1]].long()
                k, v = (t[pages].flatten(0, 2) for t in cache)  # [pages, 1, page_size, D] -> [tokens, D]
                outs.append(scaled_dot_product_attention(q[request], k, v))
            return torch.stack(outs)

    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.full(size, 255, **how))
    _same(_adapter("flashinfer"), _inputs())


def test_fla_and_xunhaolai_adapters_hand_over_blocks_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, size: int) -> torch.Tensor:
        tokens = torch.cat([torch.arange(i * size, (i + 1) * size) for i in ids.tolist()])
        return scaled_dot_product_attention(q, k[tokens], v[tokens])

    def parallel_nsa_fwd(
        q: Any, k: Any, v: Any, block_indices: Any, block_counts: Any, block_size: int, scale: float
    ) -> tuple[torch.Tensor, None]:
        rows = []
        for i in range(q.shape[0]):
            ids = block_indices[i, 0, 0, : block_counts[i, 0, 0]]
            rows.append(attend(q[i, 0], k[i, :, 0], v[i, :, 0], ids, block_size))
        return torch.stack(rows)[:, None], None

    def decode(q: Any, k: Any, v: Any, ids: Any, block_size: int, lengths: Any) -> torch.Tensor:
        group, rows = q.shape[1] // k.shape[2], []
        for b in range(q.shape[0]):
            for g in range(k.shape[2]):
                used = ids[g, b][ids[g, b] >= 0]
                rows.append(attend(q[b, g * group : (g + 1) * group], k[b, :, g], v[b, :, g], used, block_size))
        return torch.cat(rows).view(q.shape[0], -1, v.shape[-1])

    for path, name, function in (
        ("fla.ops.nsa.parallel", "parallel_nsa_fwd", parallel_nsa_fwd),
        ("native_sparse_attention.ops.triton.topk_sparse_attention_decode", "topk_sparse_attention_decode", decode),
    ):
        _install(monkeypatch, path, name, function)
    for options in ({}, {"n": [16], "S_kv": 128}):
        _same(_adapter("fla"), _inputs(**options))
        _same(_adapter("xunhaolai"), _inputs(**options))


def test_vllm_adapter_hands_over_the_packed_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(
        q: Any,
        pool: Any,
        ids: Any,
        table: Any,
        lengths: Any,
        num_kv_heads: int,
        sm_scale: float,
        output: Any,
        **rest: Any,
    ) -> None:
        group, dim = q.shape[1] // num_kv_heads, q.shape[2]
        for b in range(q.shape[0]):
            for g in range(num_kv_heads):
                packed = pool[table[b, ids[g, b].long()].long(), g].flatten(0, 1)  # [tokens, 2 D]
                heads = slice(g * group, (g + 1) * group)
                output[b, heads] = scaled_dot_product_attention(q[b, heads], packed[:, :dim], packed[:, dim:])

    _install(monkeypatch, "vllm.models.minimax_m3.common.ops.sparse_attn", "minimax_m3_sparse_attn_decode", decode)
    _same(_adapter("vllm"), _inputs(block_size=128, page_size=128, n=[2]))


@pytest.mark.parametrize("name", ["fla", "xunhaolai"])
def test_peers_that_need_block_pointers_say_so_without_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    language = ModuleType("triton.language")
    triton = ModuleType("triton")
    triton.__version__, triton.language = "3.9.0", language  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda module: object())
    assert _adapter(name).available() == "needs block pointers, which Triton 3.9.0 no longer has"
    language.make_block_ptr = object()  # type: ignore[attr-defined]
    assert _adapter(name).available() is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler, about itself
def test_flex_adapter_compiles_more_shapes_than_dynamos_default_and_never_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After eight shapes dynamo ran flex_attention eagerly, which is dense, and its time stood under flex's name."""
    from torch.nn.attention import flex_attention

    config = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    for name in names:
        monkeypatch.setattr(config, name, getattr(config, name))
    monkeypatch.setattr(flex_attention, "flex_attention", lambda q: q * 2 if torch.compiler.is_compiling() else q * 0)
    module = sys.modules[type(_adapter("flex")).__module__]
    torch._dynamo.reset()
    run = module._compiled.__wrapped__("eager")
    assert [float(run(torch.ones(1, size)).sum()) / size for size in range(2, 14)] == [2.0] * 12
    monkeypatch.setattr(config, "recompile_limit", 1)
    torch._dynamo.reset()
    run(torch.ones(1, 2))
    with pytest.raises(Exception, match="limit"):
        run(torch.ones(1, 3))


def test_flex_adapter_masks_the_selected_blocks() -> None:
    module = sys.modules[type(_adapter("flex")).__module__]
    inputs = _inputs()
    mask = module.block_mask(inputs)
    dense = mask.to_dense()[:, 0, 0].bool()  # [B * G, blocks]
    assert inputs.block_indices is not None
    for row, ids in zip(dense, inputs.block_indices.view(-1, 4).tolist(), strict=True):
        assert row.nonzero().flatten().tolist() == sorted(ids)
    assert int(mask.full_kv_num_blocks.sum()) == 4 * 4


def _same(adapter: Contestant, inputs: Inputs) -> None:
    found, expected = adapter.prepare(inputs)(), Own("sdpa").prepare(inputs)()
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)
    assert selected_tokens(inputs).shape[1] == inputs.workload.L


def _install(monkeypatch: pytest.MonkeyPatch, path: str, name: str, function: Any) -> None:
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    setattr(sys.modules[path], name, function)


def _as_if_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let refusals be asked for as on a GPU: the first of them would otherwise always be the device."""
    original = peers.needs

    def needs(inputs: Inputs, **options: Any) -> str | None:
        device = SimpleNamespace(device=SimpleNamespace(type="cuda"))
        alike = SimpleNamespace(
            workload=inputs.workload, q=device, block_indices=inputs.block_indices, block_table=inputs.block_table
        )
        return original(alike, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(peers, "needs", needs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler, about itself
def test_flex_adapter_computes_the_same_when_compiled() -> None:
    """PyTorch compiles flex_attention for a CPU too, which is how this adapter is known to be right."""
    _same(_adapter("flex"), _inputs())
