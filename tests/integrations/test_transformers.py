"""The attention function for transformers, called as MiniMax-M3 calls it; transformers itself is a stand-in here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nsa_sel
from nsa_sel.integrations import transformers as integration
from tests.integrations import standins

B, S_KV, G, h, D, BLOCK, n = 2, 45, 2, 3, 16, 8, 3


@pytest.fixture(autouse=True)
def transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.install(standins.TRANSFORMERS, monkeypatch)


def layer(model_type: str = "minimax_m3_vl_text", kinds: tuple[str, ...] = ("full_attention", "minimax_m3_sparse")):
    config = SimpleNamespace(model_type=model_type, layer_types=list(kinds))
    return SimpleNamespace(config=config, indexer=SimpleNamespace(block_size=BLOCK))


def inputs(S: int, padding: int = 0, masked: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Queries for the last S of S_KV tokens, `padding` tokens of the first request hidden."""
    generator = torch.Generator().manual_seed(S + 10 * padding)
    q = torch.randn(B, G * h, S, D, generator=generator, dtype=dtype)
    k, v = (torch.randn(B, G, S_KV, D, generator=generator, dtype=dtype) for _ in range(2))
    scores = torch.rand(B, G, S, -(-S_KV // BLOCK), generator=generator)
    if not masked:  # the model's indexer always takes a query's own block, so that it sees something
        scores.scatter_(-1, (torch.arange(S_KV)[-S:] // BLOCK).expand(B, G, S)[..., None], 1.0)
    blocks = scores.argsort(-1, descending=True)[..., :n]
    blocks[:, :, ::2, -1] = -1
    mask = torch.ones(S_KV, S_KV, dtype=torch.bool).tril()[-S:].expand(B, 1, S, S_KV).clone()
    mask[0, :, :, :padding] = False
    return dict(query=q, key=k, value=v, attention_mask=mask if masked else None, block_indices=blocks)


def eager(query, key, value, attention_mask, block_indices):
    """Attention under the dense mask of blocks and mask: hidden logits get the smallest number, as the model's eager.

    [B, G * h, S, D] -> [B, S, G * h, D], in fp64
    """
    B, heads, S, _ = query.shape
    S_kv = key.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(S_kv, S_kv, dtype=torch.bool).tril()[-S:].expand(B, 1, S, S_kv)
    chosen = torch.zeros(B, key.shape[1], S, S_kv, dtype=torch.bool)
    for b, g, s, slot in torch.cartesian_prod(*(torch.arange(extent) for extent in block_indices.shape)).tolist():
        block = int(block_indices[b, g, s, slot])
        if block >= 0:
            chosen[b, g, s, block * BLOCK : (block + 1) * BLOCK] = True
    hidden = ~(chosen & attention_mask).repeat_interleave(heads // key.shape[1], 1)
    k, v = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    # the logit disappears beside the smallest number of its type; fp64 is no exception
    logits = (query.double() @ k.transpose(2, 3) * D**-0.5).masked_fill(hidden, torch.finfo(torch.float64).min)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def assert_ran_on_sdpa() -> None:
    assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 1}}


@pytest.mark.parametrize("padding", [0, 5, 20, 44])
@pytest.mark.parametrize("S", [1, 7, S_KV])
def test_masked_as_eager_masks(S: int, padding: int) -> None:
    given = inputs(S, padding)
    out, weights = integration.attention_forward(layer(), **given, scaling=D**-0.5)
    assert weights is None
    torch.testing.assert_close(out, eager(**given), rtol=1e-12, atol=1e-12)
    assert_ran_on_sdpa()


def test_a_query_that_sees_nothing_averages_the_whole_cache_as_eager_does() -> None:
    given = inputs(1, padding=S_KV)
    out, _ = integration.attention_forward(layer(), **given)
    torch.testing.assert_close(out[0, 0, :h], given["value"][0, 0].mean(0).expand(h, D), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, eager(**given), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("S", [1, S_KV])
def test_without_a_mask_it_is_causal_and_reads_blocks_as_they_are(S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def attention(*args: Any, **kwargs: Any) -> Any:
        seen.update(kwargs)
        return nsa_sel.selection_attention(*args, **kwargs)

    monkeypatch.setattr(integration, "selection_attention", attention)
    given = inputs(S, masked=False)
    out, _ = integration.attention_forward(layer(), **given)
    torch.testing.assert_close(out, eager(**given), rtol=1e-12, atol=1e-12)
    assert seen["block_indices"].data_ptr() == given["block_indices"].data_ptr()
    assert_ran_on_sdpa()


def test_the_first_tokens_of_a_larger_cache_without_a_mask() -> None:
    given = inputs(S_KV, masked=False)
    expected = eager(**given)
    for name in ("key", "value"):  # a static cache: room behind the tokens, never to be read
        given[name] = torch.nn.functional.pad(given[name], (0, 0, 0, 19), value=float("nan"))
    out, _ = integration.attention_forward(layer(), **given)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_an_additive_mask_hides_what_is_not_zero() -> None:
    given = inputs(7, 5)
    additive = dict(given, attention_mask=torch.where(given["attention_mask"], 0.0, -1e30))
    expected, _ = integration.attention_forward(layer(), **given)
    got, _ = integration.attention_forward(layer(), **additive)
    assert torch.equal(got, expected)


def test_gradients_are_those_of_eager() -> None:
    given = inputs(7, 5)
    leaves = [given[name].requires_grad_() for name in ("query", "key", "value")]
    weight = torch.randn(B, 7, G * h, D, dtype=torch.float64)
    got = torch.autograd.grad((integration.attention_forward(layer(), **given)[0] * weight).sum(), leaves)
    expected = torch.autograd.grad((eager(**given) * weight).sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_layer_without_a_selection_goes_to_transformers() -> None:
    given = inputs(S_KV, 5, dtype=torch.float32)
    given["block_indices"] = None
    out, _ = integration.attention_forward(layer(), **given)
    everything = torch.arange(-(-S_KV // BLOCK)).expand(B, G, S_KV, -1)
    expected = eager(**dict(given, block_indices=everything))
    # fp32 sums of 45 terms in another order; queries of hidden tokens average the cache, as in eager
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    assert nsa_sel.stats() == {}


@pytest.mark.parametrize(
    ("module", "passed"),
    [
        (layer("llama", ("full_attention",)), {}),
        (layer("minimax_m3_vl_text", ("full_attention", "full_attention")), {"block_indices": None}),
        (layer("minimax_m3_vl_text"), {}),  # a layer that never mentions blocks is no layer of this model
        (SimpleNamespace(), {}),
    ],
)
def test_a_model_that_never_selects_is_refused(module: Any, passed: dict[str, None]) -> None:
    given = inputs(7)
    del given["block_indices"]
    with pytest.raises(nsa_sel.BackendError, match="SimpleNamespace, which never selects; use 'sdpa'"):
        integration.attention_forward(module, **given, **passed)


def test_a_tower_beside_the_decoder_may_select_nothing() -> None:
    given = inputs(7, dtype=torch.float32)
    del given["block_indices"]
    out, _ = integration.attention_forward(layer("minimax_m3_vl_vision", ()), **given)
    assert out.shape == (B, 7, G * h, D)


def test_what_cannot_be_done_is_refused() -> None:
    given = inputs(7, 5)
    with pytest.raises(nsa_sel.ArgumentError, match="dropout: expected 0"):
        integration.attention_forward(layer(), **given, dropout=0.1)
    with pytest.raises(nsa_sel.ArgumentError, match="cache: expected None"):
        integration.attention_forward(layer(), **given, cache=object())
    holes = dict(given, attention_mask=given["attention_mask"].clone())
    holes["attention_mask"][1, 0, :, 3] = False
    with pytest.raises(nsa_sel.ArgumentError, match=r"attention_mask: expected .* one stretch"):
        integration.attention_forward(layer(), **holes)
    per_head = dict(given, attention_mask=given["attention_mask"].expand(-1, 4, -1, -1))
    with pytest.raises(nsa_sel.ArgumentError, match=r"attention_mask: expected one mask for all heads"):
        integration.attention_forward(layer(), **per_head)


def test_holes_that_nobody_may_look_at_come_out_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(7, 5)
    given["attention_mask"][1, 0, 2, 3] = False
    expected = eager(**given)
    monkeypatch.setattr(integration.torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(integration, "selection_attention", _eagerly(monkeypatch))
    out, _ = integration.attention_forward(layer(), **given)
    assert out[1, 2].isnan().all()
    others = torch.ones(B, 7, dtype=torch.bool)
    others[1, 2] = False
    torch.testing.assert_close(out[others], expected[others], rtol=1e-12, atol=1e-12)


def _eagerly(monkeypatch: pytest.MonkeyPatch) -> Any:
    def attention(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()  # only the integration was to think that it is being compiled
        return nsa_sel.selection_attention(*args, **kwargs)

    return attention


def test_register_may_be_called_again() -> None:
    integration.register()
    integration.register()
    assert standins.AttentionInterface.registered == {"nsa_sel": integration.attention_forward}
    assert standins.AttentionMaskInterface.registered == {"nsa_sel": standins.sdpa_mask}
