"""vLLM's own implementation classes, metadata and Triton kernels, with and without our functions in their place."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nsa_sel
from nsa_sel.integrations import _vllm_plugin
from tests.integrations import standins
from tests.integrations.engines import vllm_on_cpu
from tests.integrations.vllm_cases import M3_DECODE, M3_PREFILL, QSA, M3Case, QSACase, error

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
# The class orders decodes before prefills and wants every request to have a query.
M3_STEPS = [case for case in M3_DECODE + M3_PREFILL if 0 not in case.queries and sorted(case.queries) == case.queries]


@pytest.fixture(scope="module")
def models() -> SimpleNamespace:
    return vllm_on_cpu.load_models()


@pytest.fixture
def ours(models: SimpleNamespace) -> Iterator[None]:
    """The plug-in's replacements, on the backend that a CPU has."""
    theirs = {(module, name): getattr(module, name) for module, name in places(models)}
    _vllm_plugin.install(backends=("sdpa",), prefill=True)
    for module, name in theirs:
        assert isinstance(getattr(module, name), _vllm_plugin.Replacement)
    yield
    for (module, name), function in theirs.items():
        setattr(module, name, function)


def places(models: SimpleNamespace) -> list[tuple[Any, str]]:
    return [
        (models.m3, "minimax_m3_sparse_attn_decode"),
        (models.m3, "minimax_m3_sparse_attn"),
        (models.qsa_ops, "qsa_sparse_paged_attention"),
    ]


def with_dtype(case: Any, dtype: torch.dtype, **changes: Any) -> Any:
    return dataclasses.replace(case, dtype=dtype, tensors={}, **changes)


def results(request: pytest.FixtureRequest, run: Any) -> tuple[Any, Any]:
    """Run with vLLM's kernels, then with ours."""
    theirs = run()
    assert nsa_sel.stats() == {}
    request.getfixturevalue("ours")
    return theirs, run()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", M3_STEPS, ids=lambda case: case.name)
def test_m3_implementation_class(
    case: M3Case, dtype: torch.dtype, models: SimpleNamespace, request: pytest.FixtureRequest
) -> None:
    case = with_dtype(case, dtype)
    (theirs, _), (got, metadata) = results(request, lambda: vllm_on_cpu.run_m3(models, case.tensors, case.queries))
    calls = bool(metadata.num_decodes) + bool(metadata.num_prefills)
    assert nsa_sel.stats() == {"sdpa": {"backend='sdpa'": calls}}
    live, expected = case.live(), case.expected()
    assert error(got, expected) <= TOLERANCE[dtype]
    assert error(theirs[live], expected[live]) <= TOLERANCE[dtype]
    assert error(got[live], theirs[live].double()) <= 2 * TOLERANCE[dtype]
    assert (got[~live] == 0).all()


def test_the_steps_hold_decodes_and_prefills(models: SimpleNamespace) -> None:
    kinds = set()
    for case in M3_STEPS:
        metadata = vllm_on_cpu.m3_metadata(models, case.tensors, case.queries)
        kinds.add((metadata.num_decodes > 0, metadata.num_prefills > 0, metadata.decode.decode_query_len))
    assert {(True, False, 1), (True, False, 2), (True, False, 3), (True, True, 1)} <= kinds


@pytest.mark.parametrize("case", M3_PREFILL, ids=lambda case: case.name)
def test_m3_prefill_function(case: M3Case, models: SimpleNamespace, request: pytest.FixtureRequest) -> None:
    def run() -> torch.Tensor:
        arguments = case.prefill()
        models.m3.minimax_m3_sparse_attn(**arguments)
        return arguments["output"]

    theirs, got = results(request, run)
    assert nsa_sel.stats() == {"sdpa": {"backend='sdpa'": 1}}
    for out in (theirs, got):
        assert error(out, case.expected()) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("case", QSA, ids=lambda case: case.name)
def test_qsa_implementation_class(
    case: QSACase,
    dtype: torch.dtype,
    models: SimpleNamespace,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # vLLM reads on to the end of the last tile of 32 ids; its own expansion leaves -1 there
    case = with_dtype(case, dtype, behind="-1")
    for module in (models.qsa, models.qsa_ops):
        monkeypatch.setattr(module, "torch", vllm_on_cpu.BFloat16Is(dtype))
    theirs, got = results(request, lambda: vllm_on_cpu.run_qsa(models, case.tensors))
    assert nsa_sel.stats() == {"sdpa": {"backend='sdpa'": 1}}
    expected = case.expected()
    for out in (theirs, got):
        assert error(out, expected) <= TOLERANCE[dtype]
    assert error(got, theirs.double()) <= 2 * TOLERANCE[dtype]


def test_vllm_s_indexer_leaves_nothing_but_minus_one_behind_the_slots_that_count(models: SimpleNamespace) -> None:
    from vllm.models.qwen4_exp.nvidia.ops.qsa_indexer import expand_qsa_block_indices

    blocks = torch.tensor([[2, 0, 1], [0, -1, -1]], dtype=torch.int32)
    positions, visible = torch.tensor([13, 5], dtype=torch.int64), torch.tensor([3, 1], dtype=torch.int32)
    packed = torch.full((2, 16), 77, dtype=torch.int32)
    expand_qsa_block_indices(blocks, positions, visible, 4, 12, packed)
    assert packed[0].tolist() == [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7, 12, 13, -1, 14]
    assert packed[1].tolist() == [0, 1, 2, 3, 4, 5, *[-1] * 9, 6]


def test_the_replacements_take_the_arguments_of_vllm(models: SimpleNamespace) -> None:
    for (module, name), target in zip(places(models), _vllm_plugin.TARGETS, strict=True):
        assert (target.module, target.name) == (module.__name__, name)
        assert _vllm_plugin.signature_problem(target, getattr(module, name)) is None
        assert target.problem(module) is None


def test_the_stand_ins_of_the_suite_have_the_signatures_of_vllm(
    models: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert standins.differences(standins.vllm_modules()) == []
    from vllm.platforms.interface import Platform

    for name in ("is_cuda", "get_device_capability"):
        assert standins.parameters(getattr(Platform(), name)) == standins.parameters(getattr(standins.Platform(), name))


# A vLLM process as it starts: plug-ins first, the model's modules later.
PROCESS = """
import sys
from tests.integrations.engines import vllm_on_cpu
from vllm.config import LoggingConfig
from vllm.logger import configure_logging
from vllm.plugins import load_general_plugins
import vllm.platforms

configure_logging(LoggingConfig())

if {pretend}:
    vllm.platforms.current_platform.is_cuda = lambda: True
    from vllm.platforms.interface import DeviceCapability
    vllm.platforms.current_platform.get_device_capability = lambda device_id=0: DeviceCapability(9, 0)
load_general_plugins()
assert not any(name.startswith("vllm.models.") for name in sys.modules), "the plug-in has imported a model"
vllm.platforms.current_platform.__dict__.pop("is_cuda", None)  # the models are imported for what this machine is
models = vllm_on_cpu.load_models()
print([type(getattr(*place)).__name__ for place in (
    (models.m3, "minimax_m3_sparse_attn_decode"), (models.m3, "minimax_m3_sparse_attn"),
    (models.qsa_ops, "qsa_sparse_paged_attention"))])
"""


@pytest.mark.parametrize(
    ("switches", "pretend", "kinds", "told"),
    [
        ({}, True, ["function"] * 3, []),
        (
            {"NSA_SEL_VLLM": "1"},
            False,
            ["function"] * 3,
            ["vLLM goes on without us: expected a CUDA platform, got CpuPlatform"],
        ),
        (
            {"NSA_SEL_VLLM": "1"},
            True,
            ["Replacement", "function", "Replacement"],
            [f"stands in for {target.module}.{target.name}" for target in _vllm_plugin.TARGETS[::2]],
        ),
        ({"NSA_SEL_VLLM": "1", "NSA_SEL_VLLM_PREFILL": "1"}, True, ["Replacement"] * 3, ["minimax_m3_sparse_attn\n"]),
    ],
)
def test_a_process_of_vllm_loads_the_plug_in(
    switches: dict[str, str], pretend: bool, kinds: list[str], told: list[str]
) -> None:
    environment = {**os.environ, **switches}
    result = subprocess.run(
        [sys.executable, "-c", PROCESS.format(pretend=pretend)],
        capture_output=True, text=True, env=environment, check=False, timeout=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    output = result.stdout + result.stderr
    assert str(kinds) in output, output
    for line in told:
        assert line in output, output
    if not told:
        assert "nsa_sel" not in output, output


# A whole vLLM: its engine core and its worker are processes of their own, which load the plug-in or inherit it.
ENGINE = """
import sys
from transformers import LlamaConfig
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, architectures=["LlamaForCausalLM"],
    ).save_pretrained(sys.argv[1])
    llm = LLM(
        sys.argv[1], load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
        dtype="float32",
    )
    sampling = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False)
    (request,) = llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling)
    print("tokens:", len(request.outputs[0].token_ids))
"""


def test_a_running_vllm_loads_the_plug_in_and_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "engine.py"  # a file: vLLM starts its processes from it
    script.write_text(ENGINE)
    environment = {**os.environ, "NSA_SEL_VLLM": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "model")],
        capture_output=True, text=True, env=environment, check=False, timeout=900,
    )  # fmt: skip
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    assert "tokens: 4" in output
    assert "nsa_sel: vLLM goes on without us: expected a CUDA platform, got CpuPlatform" in output, output[-4000:]
