"""The peers' adapters, without the peers: they load, say why they are absent, and refuse what they cannot take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

from nsa_sel.measure.run import peers
from nsa_sel.measure.run.contestants import Contestant, own
from nsa_sel.measure.run.inputs import Inputs, variants_of
from nsa_sel.measure.run.peers import PEERS, load_peers
from nsa_sel.measure.run.workload import from_options

FOLDER = Path(__file__).parents[2] / "benchmarks" / "peers"
SPANS: dict[str, Any] = {"block_size": None, "n": None}
UNUSED: dict[str, Any] = {"n": [16], "S_kv": 128}
PAGED: dict[str, Any] = {"block_size": 128, "page_size": 128, "n": [2]}


def inputs_of(**options: Any) -> Inputs:
    grid = {"rows": [4], "G": 2, "h": [16], "Dk": [64], "S_kv": 512, "block_size": 64, "n": [4], "dtype": ["fp32"]}
    (workload,) = from_options({name: value for name, value in (grid | options).items() if value is not None})
    return variants_of(workload, 0, torch.device("cpu"), 0, 1 << 30)[0]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Contestant]:
    """Load an adapter as where its library is installed."""
    monkeypatch.setattr(peers, "missing", lambda module: None)
    monkeypatch.setattr(peers, "block_pointers", lambda: None)
    return lambda name: peers.load(name, FOLDER)


def test_there_is_an_adapter_for_every_peer_and_one_that_is_not_installed_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(PEERS)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda module: None)
    found, absent = load_peers(list(PEERS), FOLDER)
    assert (found, set(absent)) == ([], set(PEERS))
    assert all(reason.endswith("is not installed") for reason in absent.values())


@pytest.mark.parametrize("name", ["fla", "xunhaolai"])
def test_peers_that_need_block_pointers_say_so_without_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    language, triton = ModuleType("triton.language"), ModuleType("triton")
    triton.__version__, triton.language = "3.9.0", language  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    monkeypatch.setattr(peers, "missing", lambda module: None)
    gone = "needs block pointers, which Triton 3.9.0 no longer has"
    assert load_peers([name], FOLDER)[1] == {name: gone}
    language.make_block_ptr = object()  # type: ignore[attr-defined]
    assert load_peers([name], FOLDER)[1] == {}


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("flashinfer", SPANS | {"dist": ["few"]}, "takes whole blocks, got dist few"),
        ("flashinfer", {"Dk": [192], "Dv": [128]}, "one head dimension, got 192 and 128"),
        ("flashinfer", {"page_size": 64}, "not paged"),
        ("flashinfer", UNUSED, "no unused slots"),
        ("flashinfer", {}, None),
        ("fla", {"h": [4]}, "takes h = 16, 32, 64 ..., got 4"),
        ("fla", {"h": [24]}, "takes h = 16, 32, 64 ..., got 24"),
        ("fla", {"page_size": 64}, "not paged"),
        ("fla", {"Dk": [192], "Dv": [128]}, None),
        ("fla", UNUSED, None),
        ("xunhaolai", {"Dk": [192], "Dv": [128]}, "one head dimension"),
        ("xunhaolai", UNUSED, None),
        ("vllm", {}, "takes paged caches"),
        ("vllm", {"page_size": 64}, "blocks and pages of 128 tokens, got 64 and 64"),
        ("vllm", PAGED, None),
        ("flex", UNUSED, "no unused slots"),
        ("flex", {"Dk": [192], "Dv": [128]}, None),
        ("flash_attn", {"dtype": ["fp32"]}, "takes bf16, fp16, got fp32"),
        ("flash_attn", SPANS | {"dist": ["mixed"]}, None),
        ("flash_attn", {"page_size": 64}, None),
    ],
)
def test_adapters_refuse_what_their_library_cannot_take(
    name: str, options: dict[str, Any], reason: str | None, adapter: Callable[[str], Contestant]
) -> None:
    inputs = inputs_of(**({"dtype": ["bf16"]} | options))
    assert "needs CUDA tensors" in (adapter(name).refuses(inputs) or "")
    on_cuda = SimpleNamespace(**vars(inputs) | {"q": SimpleNamespace(device=SimpleNamespace(type="cuda"))})
    found = adapter(name).refuses(on_cuda)  # type: ignore[arg-type]
    assert found is reason is None or (reason or "") in (found or ""), found


# ---- With stand-ins of the documented calls, each adapter computes what packed SDPA does -----------------------------


def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    assert not causal
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [batch, tokens, heads, dim]
    return attend(q, k, v, enable_gqa=True).transpose(1, 2)


class FlashInferWrapper:
    def __init__(self, workspace: torch.Tensor, layout: str, **options: Any) -> None:
        assert layout == "HND"
        assert not workspace.any(), "its documentation asks for a workspace of zeros"

    def plan(self, **plan: Any) -> None:
        self.ids = torch.tensor_split(plan["indices"].long(), plan["indptr"].tolist()[1:-1])

    def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        # [pages, 1, page_size, D] -> [tokens, D]
        return torch.stack(
            [attend(one, *(t[ids].flatten(0, 2) for t in cache)) for one, ids in zip(q, self.ids, strict=True)]
        )


def over_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor, size: int) -> torch.Tensor:
    tokens = torch.cat([torch.arange(i * size, (i + 1) * size) for i in ids.tolist()])
    return attend(q, k[tokens], v[tokens])


def parallel_nsa_fwd(
    q: Any, k: Any, v: Any, block_indices: Any, block_counts: Any, block_size: int, scale: float
) -> tuple[torch.Tensor, None]:
    used = [row[0, 0, : int(count)] for row, count in zip(block_indices, block_counts, strict=True)]
    rows = [over_blocks(q[i, 0], k[i, :, 0], v[i, :, 0], ids, block_size) for i, ids in enumerate(used)]
    return torch.stack(rows)[:, None], None


def topk_sparse_attention_decode(q: Any, k: Any, v: Any, ids: Any, block_size: int, lengths: Any) -> torch.Tensor:
    group, rows = q.shape[1] // k.shape[2], []
    for b in range(q.shape[0]):
        for g in range(k.shape[2]):
            used = ids[g, b][ids[g, b] >= 0]
            rows.append(over_blocks(q[b, g * group : (g + 1) * group], k[b, :, g], v[b, :, g], used, block_size))
    return torch.cat(rows).view(q.shape[0], -1, v.shape[-1])


def minimax_m3_sparse_attn_decode(
    q: Any, pool: Any, ids: Any, table: Any, lengths: Any, num_kv_heads: int, output: Any, **rest: Any
) -> None:
    group, dim = q.shape[1] // num_kv_heads, q.shape[2]
    for b in range(q.shape[0]):
        for g in range(num_kv_heads):
            packed = pool[table[b, ids[g, b].long()].long(), g].flatten(0, 1)  # [tokens, 2 D]
            heads = slice(g * group, (g + 1) * group)
            output[b, heads] = attend(q[b, heads], packed[:, :dim], packed[:, dim:])


STAND_INS: dict[str, tuple[str, Any, list[dict[str, Any]]]] = {
    "flash_attn": ("flash_attn_func", flash_attn_func, [{}, {"page_size": 64}, SPANS | {"dist": ["mixed"]}]),
    "flashinfer": ("BatchDecodeWithPagedKVCacheWrapper", FlashInferWrapper, [{}]),
    "fla": ("parallel_nsa_fwd", parallel_nsa_fwd, [{}, UNUSED]),
    "xunhaolai": ("topk_sparse_attention_decode", topk_sparse_attention_decode, [{}, UNUSED]),
    "vllm": ("minimax_m3_sparse_attn_decode", minimax_m3_sparse_attn_decode, [PAGED]),
}


def same(one: Contestant, inputs: Inputs) -> None:
    found, expected = one.prepare(inputs)(), own("sdpa").prepare(inputs)()
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", STAND_INS)
def test_adapters_hand_over_the_selection(
    name: str, adapter: Callable[[str], Contestant], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = adapter(name)
    function, stand_in, cases = STAND_INS[name]
    parts = sys.modules[f"nsa_sel_peer_{name}"].MODULE.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    setattr(module, function, stand_in)
    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.full(size, 255, **how))
    for options in cases:
        same(one, inputs_of(**options))


# ---- flex_attention comes with PyTorch -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler, about itself
def test_flex_adapter_compiles_more_shapes_than_dynamos_default_and_never_falls_back(
    adapter: Callable[[str], Contestant], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After eight shapes dynamo ran flex_attention eagerly, which is dense, and its time stood under flex's name."""
    from torch.nn.attention import flex_attention

    config = torch._dynamo.config
    for name in ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit"):
        monkeypatch.setattr(config, name, getattr(config, name))
    monkeypatch.setattr(flex_attention, "flex_attention", lambda q: q * 2 if torch.compiler.is_compiling() else q * 0)
    adapter("flex")
    torch._dynamo.reset()
    run = sys.modules["nsa_sel_peer_flex"]._compiled.__wrapped__("eager")
    assert [float(run(torch.ones(1, size)).sum()) / size for size in range(2, 14)] == [2.0] * 12
    monkeypatch.setattr(config, "recompile_limit", 1)
    torch._dynamo.reset()
    run(torch.ones(1, 2))
    with pytest.raises(Exception, match="limit"):
        run(torch.ones(1, 3))


def test_flex_adapter_masks_the_selected_blocks(adapter: Callable[[str], Contestant]) -> None:
    adapter("flex")
    inputs = inputs_of()
    mask = sys.modules["nsa_sel_peer_flex"].block_mask(inputs)
    dense = mask.to_dense()[:, 0, 0].bool()  # [B * G, blocks]
    assert inputs.block_indices is not None
    for row, ids in zip(dense, inputs.block_indices.view(-1, 4).tolist(), strict=True):
        assert row.nonzero().flatten().tolist() == sorted(ids)
    assert int(mask.full_kv_num_blocks.sum()) == 4 * 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler, about itself
def test_flex_adapter_computes_the_same_when_compiled(adapter: Callable[[str], Contestant]) -> None:
    """PyTorch compiles flex_attention for a CPU too, which is how this adapter is known to be right."""
    same(adapter("flex"), inputs_of())
