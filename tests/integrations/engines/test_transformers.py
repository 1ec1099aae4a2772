"""MiniMax-M3 as transformers ships it, with random weights: nsa_sel against the model's own eager attention."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.integrations import sdpa_attention

import nsa_sel
from examples.minimax_m3 import tiny_model
from nsa_sel.integrations.transformers import register
from tests.integrations.standins import TRANSFORMERS, differences

ROOT = Path(__file__).resolve().parents[3]
DENSE, SPARSE = "full_attention", "minimax_m3_sparse"
LAYERS = (DENSE, SPARSE, DENSE, SPARSE)
SIZES = dict(
    vocab_size=97, hidden_size=64, num_attention_heads=8, head_dim=16, rotary_dim=8, index_head_dim=16,
    index_block_size=8, index_topk_blocks=3, dense_intermediate_size=64, intermediate_size=32,
    shared_intermediate_size=32, max_position_embeddings=512, initializer_range=0.3,
)  # fmt: skip
PROMPT, STEPS = 40, 64


def model(attention: str, layers: tuple[str, ...] = LAYERS, **sizes: Any) -> Any:
    register()
    return tiny_model(attention, layers, **{**SIZES, **sizes})


def prompts(padding: int) -> dict[str, Any]:
    """Two prompts, the first one padded on the left."""
    ids = torch.randint(1, SIZES["vocab_size"], (2, PROMPT), generator=torch.Generator().manual_seed(1))
    if not padding:
        return dict(input_ids=ids)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return dict(input_ids=ids, attention_mask=mask)


def assert_logits_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within fp32 rounding: 16 units in the last place of the largest logit, after four layers."""
    assert torch.isfinite(got).all()
    assert (got - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps * expected.abs().max()


def assert_ran_on_sdpa(calls: int) -> None:
    assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": calls}}


# 5 pads lie within the first block of 8; behind 20 pads the first tokens see nothing of what their indexer selects
@pytest.mark.parametrize("padding", [0, 5, 20])
@torch.no_grad()
def test_prefill(padding: int) -> None:
    inputs = prompts(padding)
    expected = model("eager")(**inputs).logits
    ours = model("nsa_sel")
    nsa_sel.reset_stats()
    assert_logits_equal(ours(**inputs).logits, expected)
    assert_ran_on_sdpa(LAYERS.count(SPARSE))


@pytest.mark.parametrize("padding", [0, 5, 20])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_same_tokens_over_64_cached_steps(cache: str, padding: int) -> None:
    kwargs = dict(
        max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True,
        **(dict(cache_implementation="static", disable_compile=True) if cache == "static" else {}),
    )  # fmt: skip
    inputs = prompts(padding)
    expected = model("eager").generate(**inputs, **kwargs)
    ours = model("nsa_sel")
    nsa_sel.reset_stats()
    got = ours.generate(**inputs, **kwargs)
    assert got.sequences.shape == (2, PROMPT + STEPS)
    assert torch.equal(got.sequences, expected.sequences)
    assert_logits_equal(torch.stack(got.logits), torch.stack(expected.logits))
    assert_ran_on_sdpa(STEPS * LAYERS.count(SPARSE))


@pytest.mark.parametrize("padding", [0, 5])
def test_prefill_in_two_parts(padding: int) -> None:
    inputs = prompts(padding)
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    parts = []
    for attention in ("eager", "nsa_sel"):
        one = model(attention)
        with torch.no_grad():
            first = one(ids[:, :24], attention_mask=None if mask is None else mask[:, :24], use_cache=True)
            second = one(ids[:, 24:], attention_mask=mask, past_key_values=first.past_key_values)
        parts.append(torch.cat([first.logits, second.logits], 1))
    assert_logits_equal(parts[1], parts[0])


@pytest.mark.parametrize("padding", [0, 5])
def test_gradients(padding: int) -> None:
    inputs = prompts(padding)
    labels = inputs["input_ids"].clone()
    if padding:
        labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
        labels[0, padding] = -100  # it is predicted from padding, through which eager's gradients are rounding noise
    gradients = []
    for attention in ("eager", "nsa_sel"):
        one = model(attention)
        one(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    expected, got = gradients
    assert got.keys() == expected.keys()
    assert any("k_proj" in name for name in got)
    for name, gradient in expected.items():
        # fp32 sums over 80 tokens in another order; the factor is against the largest entry
        assert (got[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_layers_without_a_selection_go_to_the_sdpa_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], sdpa_attention.sdpa_attention_forward

    def counted(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module.layer_idx)
        return original(module, *args, **kwargs)

    ours = model("nsa_sel")
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", counted)
    nsa_sel.reset_stats()
    with torch.no_grad():
        ours(**prompts(0))
    assert calls == [index for index, kind in enumerate(LAYERS) if kind == DENSE]
    assert_ran_on_sdpa(LAYERS.count(SPARSE))


def test_a_model_that_never_selects_is_refused_at_its_first_call() -> None:
    register()
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config._attn_implementation = "nsa_sel"
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(nsa_sel.BackendError, match="LlamaAttention, which never selects; use 'sdpa'"):
        transformers.LlamaForCausalLM(config)(ids)
    with pytest.raises(nsa_sel.BackendError, match="which never selects"):
        model("nsa_sel", (DENSE, DENSE))(ids)


@torch.no_grad()
def test_the_vision_tower_beside_the_model_runs() -> None:
    from transformers.models.minimax_m3_vl import MiniMaxM3VLVisionConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLVisionModel

    register()
    outputs = []
    for attention in ("sdpa", "nsa_sel"):
        config = MiniMaxM3VLVisionConfig(
            hidden_size=96, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=2
        )
        config._attn_implementation = attention
        torch.manual_seed(0)
        tower = MiniMaxM3VLVisionModel(config).eval()
        torch.manual_seed(1)
        outputs.append(tower(torch.randn(16, 3 * 2 * 2 * 2), grid_thw=torch.tensor([[1, 4, 4]])).last_hidden_state)
    assert torch.equal(*outputs)


def test_wrong_use_is_refused() -> None:
    ours = model("nsa_sel", attention_dropout=0.5).train()
    with pytest.raises(nsa_sel.ArgumentError, match=r"dropout: expected 0 with selected blocks, got 0.5"):
        ours(**prompts(0))
    inputs = prompts(5)
    inputs["attention_mask"][0, 20] = 0
    with pytest.raises(nsa_sel.ArgumentError, match=r"attention_mask: expected .* one stretch of the cache"):
        model("nsa_sel")(**inputs)


def test_switched_on_a_model_that_is_there() -> None:
    one = model("eager")
    with torch.no_grad():
        expected = one(**prompts(0)).logits
        one.set_attn_implementation("nsa_sel")
        nsa_sel.reset_stats()
        assert_logits_equal(one(**prompts(0)).logits, expected)
    assert_ran_on_sdpa(LAYERS.count(SPARSE))


def test_the_stand_ins_of_the_suite_have_the_signatures_of_transformers() -> None:
    assert differences(TRANSFORMERS) == []


def test_the_page_s_code_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "integrations" / "transformers.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    nsa_sel.reset_stats()
    exec(compile(code, "docs/integrations/transformers.md", "exec"), names)
    assert nsa_sel.stats()["sdpa"]["tensors on cpu"] > 0


def test_the_example_generates_the_same_tokens_and_draws(tmp_path: Path) -> None:
    command = [sys.executable, "examples/minimax_m3.py", "--contexts", "300", "600", "--steps", "4"]
    result = subprocess.run(
        [*command, "--device", "cpu", "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "minimax_m3.png").stat().st_size > 10_000
    assert re.search(r"^ +600 +[\d.]+ +[\d.]+ +[\d.]+ +b", result.stdout, re.MULTILINE), result.stdout
