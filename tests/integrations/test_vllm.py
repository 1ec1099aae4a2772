"""vLLM's functions on `selection_attention`, and the plug-in; vLLM itself is a stand-in here."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nsa_sel
from nsa_sel import switches
from nsa_sel.errors import KernelLaunchError
from nsa_sel.integrations import _vllm_calls, _vllm_plugin, vllm
from tests.integrations import standins
from tests.integrations.vllm_cases import M3_DECODE, M3_PREFILL, QSA, M3Case, QSACase, error

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations" / "vllm.md"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)


def with_dtype(case: Any, dtype: torch.dtype, **changes: Any) -> Any:
    return dataclasses.replace(case, dtype=dtype, tensors={}, **changes)


def named(cases: list[Any]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def assert_ran_on_sdpa(reason: str = "tensors on cpu") -> None:
    assert nsa_sel.stats() == {"sdpa": {reason: 1}}


# --- the functions -------------------------------------------------------------------------------------------------


@named(M3_DECODE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_m3_decode(case: M3Case, dtype: torch.dtype) -> None:
    case = with_dtype(case, dtype)
    arguments = case.decode()
    assert vllm.minimax_m3_sparse_attn_decode(**arguments) is None
    assert error(arguments["output"], case.expected()) <= TOLERANCE[dtype]
    assert (arguments["output"][~case.live()] == 0).all()
    assert_ran_on_sdpa()


@named(M3_PREFILL + M3_DECODE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_m3_prefill(case: M3Case, dtype: torch.dtype) -> None:
    case = with_dtype(case, dtype)
    arguments = case.prefill()
    assert vllm.minimax_m3_sparse_attn(**arguments) is None
    assert error(arguments["output"], case.expected()) <= TOLERANCE[dtype]
    assert_ran_on_sdpa()


def test_m3_queries_behind_the_last_request_come_out_as_0() -> None:
    case = M3Case("ragged", [20, 140], [4, 3])
    arguments = case.prefill()
    arguments["cu_seqlens_q"] = arguments["cu_seqlens_q"].clamp(max=5)
    vllm.minimax_m3_sparse_attn(**arguments)
    assert (arguments["output"][5:] == 0).all()
    assert error(arguments["output"][:4], case.expected()[:4]) <= TOLERANCE[torch.float32]


@named(QSA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_qsa(case: QSACase, dtype: torch.dtype) -> None:
    case = with_dtype(case, dtype)
    arguments = case.arguments()
    out = vllm.qsa_sparse_paged_attention(**arguments)
    assert out is arguments["out"]
    assert error(out, case.expected()) <= TOLERANCE[dtype]
    assert_ran_on_sdpa()


def test_qsa_makes_its_own_out_and_takes_one_with_strides() -> None:
    case = QSA[0]
    arguments = case.arguments()
    expected = vllm.qsa_sparse_paged_attention(**arguments)
    arguments["out"] = None
    assert torch.equal(vllm.qsa_sparse_paged_attention(**arguments), expected)
    arguments["out"] = torch.empty(*expected.shape[:2], 2 * case.D)[..., : case.D]
    assert torch.equal(vllm.qsa_sparse_paged_attention(**arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_qsa_rounds_the_attention_before_it_gates_in_fp32(dtype: torch.dtype) -> None:
    case = with_dtype(QSA[0], dtype)
    arguments = case.arguments()
    gate = arguments["output_gate"]
    gated = vllm.qsa_sparse_paged_attention(**arguments)
    # sigmoid(88) is 1 in fp32, so that this is the attention itself
    attention = vllm.qsa_sparse_paged_attention(
        **{**arguments, "output_gate": torch.full_like(gate, 88.0), "out": None}
    )
    expected = (attention.float() * gate.view_as(attention).float().sigmoid()).to(dtype)
    torch.testing.assert_close(
        gated, expected, rtol=torch.finfo(dtype).eps, atol=0
    )  # one rounding, sigmoid's own error


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        ("decode", {"decode_query_len": 2}, r"q: expected 3 requests \* 2 queries in front, got \[3, 6, 16\]"),
        ("decode", {"num_kv_heads": 4}, r"q: expected \[T, heads, D\] with heads a multiple of 4"),
        ("decode", {"kv_cache": torch.zeros(2, 2, 64, 32)}, r"kv_cache: expected \[P, G=2, 128, 2 \* D=32\]"),
        ("decode", {"topk_idx": torch.zeros(2, 4, 3, dtype=torch.int32)}, r"topk_idx: expected \[G=2, T=3, n\]"),
        ("decode", {"output": torch.zeros(3, 6, 8)}, r"output: expected q's shape \[3, 6, 16\], got \[3, 6, 8\]"),
        (
            "prefill",
            {"cu_seqlens_q": torch.zeros(3, dtype=torch.int32)},
            r"cu_seqlens_q: expected \[4\] for 3 requests",
        ),
        (
            "qsa",
            {"k_cache": torch.zeros(2, 16, 4, 16)},
            r"q, k_cache: expected \[T, G \* h, D\], \[P, page_size, G, D\]",
        ),
        ("qsa", {"logical_indices": torch.zeros(4, 1, dtype=torch.int32)}, r"logical_indices: expected \[T=4, n \+ 1"),
        ("qsa", {"output_gate": torch.zeros(4, 3)}, r"output_gate: expected the elements of q \[4, 6, 16\]"),
        ("qsa", {"out": torch.zeros(4, 6, 8)}, r"out: expected torch.float32 \[4, 6, 16\] \(q's\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(function: str, change: dict[str, Any], message: str) -> None:
    calls = {
        "decode": (vllm.minimax_m3_sparse_attn_decode, M3_DECODE[0].decode()),
        "prefill": (vllm.minimax_m3_sparse_attn, M3_PREFILL[0].prefill()),
        "qsa": (vllm.qsa_sparse_paged_attention, QSA[0].arguments()),
    }
    called, arguments = calls[function]
    with pytest.raises(nsa_sel.ArgumentError, match=message):
        called(**{**arguments, **change})
    assert nsa_sel.stats() == {}


def test_float8_caches_are_refused_by_name() -> None:
    arguments, scale = M3_DECODE[0].decode(), torch.ones(1)
    arguments["kv_cache"] = arguments["kv_cache"].to(torch.float8_e4m3fn)
    with pytest.raises(nsa_sel.ArgumentTypeError, match=r"kv_cache: .* got torch.float8_e4m3fn; float8 caches are not"):
        vllm.minimax_m3_sparse_attn_decode(**arguments, k_scale=scale, v_scale=scale)
    arguments = QSA[0].arguments()
    for name in ("k_cache", "v_cache"):
        arguments[name] = arguments[name].to(torch.float8_e4m3fn)
    with pytest.raises(nsa_sel.ArgumentTypeError, match=r"k_cache: .* got torch.float8_e4m3fn; float8 caches are not"):
        vllm.qsa_sparse_paged_attention(**arguments, k_scale=1.0, v_scale=1.0)


def test_scales_beside_other_caches_are_ignored_as_vllm_ignores_them() -> None:
    arguments = M3_DECODE[0].decode()
    vllm.minimax_m3_sparse_attn_decode(**arguments, k_scale=torch.full((1,), 7.0), v_scale=torch.full((1,), 7.0))
    assert error(arguments["output"], M3_DECODE[0].expected()) <= TOLERANCE[torch.float32]


# --- what a GPU asks for, as far as a CPU can show it ----------------------------------------------------------------


class OnTheDevice(TorchDispatchMode):
    """Fail on what would wait for the GPU (a value read on the host) and on what makes memory out of the cache."""

    READS_BACK = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::masked_select", "aten::equal")

    def __init__(self, *cache: torch.Tensor) -> None:
        super().__init__()
        self.cache = {tensor.untyped_storage().data_ptr() for tensor in cache}
        self.launches: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        assert name not in self.READS_BACK, f"{name} waits for the device"
        result = func(*args, **kwargs)
        fresh = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, torch.Tensor)]
        inputs = {x.untyped_storage().data_ptr() for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)}
        views = all(x.untyped_storage().data_ptr() in inputs for x in fresh)
        assert views or not inputs & self.cache, f"{name} copies the cache"
        if not views or func._schema.is_mutable:
            self.launches.append(name)
        return result


def prepared(function: str) -> tuple[Any, dict[str, Any], list[torch.Tensor]]:
    if function == "qsa":
        arguments = QSA[0].arguments()
        return vllm.qsa_sparse_paged_attention, arguments, [arguments["k_cache"], arguments["v_cache"]]
    case = M3_DECODE[0] if function == "decode" else M3_DECODE[1] if function == "decode 2" else M3_PREFILL[0]
    called = vllm.minimax_m3_sparse_attn if function == "prefill" else vllm.minimax_m3_sparse_attn_decode
    arguments = case.prefill() if function == "prefill" else case.decode()
    return called, arguments, [arguments["kv_cache"]]


@pytest.mark.parametrize(
    ("function", "launches"),
    [
        # how many slots count: one launch; two for several queries per request, whose offsets are made and added
        ("decode", ["aten::bucketize"]),
        ("decode 2", ["aten::arange", "aten::add", "aten::bucketize"]),
        # room for attention and gate, the gate into it, their product
        ("qsa", ["aten::new_empty", "aten::copy_", "aten::glu"]),
        ("prefill", None),
    ],
)
def test_around_the_kernel_nothing_waits_and_nothing_copies_the_cache(
    function: str, launches: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is left out (it needs a GPU): what stands around it is what a graph would capture besides it."""
    called, arguments, cache = prepared(function)
    called(**arguments)  # constants are made by the first call
    handed: dict[str, Any] = {}
    monkeypatch.setattr(vllm, "selection_attention", lambda **given: handed.update(given))
    with OnTheDevice(*cache) as mode:
        called(**arguments)
    if launches is not None:
        assert [name for name in mode.launches if name != "aten::detach"] == launches
    assert {handed[name].untyped_storage().data_ptr() for name in ("k", "v")} == mode.cache
    output = arguments.get("output")
    if output is not None:
        assert handed["out"].data_ptr() == output.data_ptr()
        assert handed["block_indices"].data_ptr() == arguments["topk_idx"].data_ptr()
    else:
        assert handed["block_indices"].data_ptr() == arguments["logical_indices"].data_ptr()
        assert handed["table_rows"] is arguments["token_to_req"]


def test_the_mode_notices_what_it_is_there_for() -> None:
    cache = torch.zeros(4)
    for offence in (lambda: cache.sum().item(), lambda: cache[::2].clone(), lambda: bool(torch.ones(1))):
        with pytest.raises(AssertionError, match=r"waits for the device|copies the cache"), OnTheDevice(cache):
            offence()


def test_a_constant_made_during_a_capture_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = _vllm_calls._block_begins(3, torch.device("cpu"))
    assert _vllm_calls._block_begins(3, torch.device("cpu")) is kept
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    lengths = torch.tensor([0, 1, 128, 129, 256, 257, 9999], dtype=torch.int32)

    class OnCuda:  # a tensor that says it is on a GPU
        is_cuda, device = True, torch.device("cpu")

    seen = []
    monkeypatch.setattr(torch, "bucketize", lambda x, begins, **_: seen.append(begins))
    _vllm_calls._blocks_in_sight(OnCuda(), 3)  # type: ignore[arg-type]
    assert seen[0] is not kept
    monkeypatch.undo()
    assert _vllm_calls._blocks_in_sight(lengths, 3).tolist() == [0, 1, 1, 2, 2, 3, 3]


# --- the plug-in -----------------------------------------------------------------------------------------------------


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="vllm.nsa_sel")
    return caplog


def start(monkeypatch: pytest.MonkeyPatch, on: dict[str, str], **vllm_is: Any) -> standins.Modules:
    """Let a vLLM like this call the plug-in, with these switches."""
    modules = standins.vllm_modules(**vllm_is)
    standins.install(modules, monkeypatch)
    for name, value in on.items():
        monkeypatch.setenv(name, value)
    switches.refresh()
    vllm.register()
    vllm.register()  # vLLM may call it twice in a process
    return modules


M3 = "vllm.models.minimax_m3.common.sparse_attention"
QSA_OPS = "vllm.models.qwen4_exp.nvidia.ops.qsa"


def call_all(modules: standins.Modules) -> None:
    """Call as vLLM calls: by the name in the module."""
    for case in M3_DECODE[:2]:
        modules[M3].minimax_m3_sparse_attn_decode(**case.decode())
    modules[M3].minimax_m3_sparse_attn(**M3_PREFILL[0].prefill())
    for prefill in (False, True):
        modules[QSA_OPS].qsa_sparse_paged_attention(**{**QSA[0].arguments(), "use_prefill_config": prefill})


OWN = ["minimax_m3_sparse_attn_decode"] * 2 + ["minimax_m3_sparse_attn"] + ["qsa_sparse_paged_attention"] * 2


def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    for on in ({}, {"NSA_SEL_VLLM": "0"}, {"NSA_SEL_VLLM_PREFILL": "1"}):
        modules = start(monkeypatch, on)
        call_all(modules)
        assert standins.ran == OWN
        assert modules[M3].minimax_m3_sparse_attn_decode is standins.minimax_m3_sparse_attn_decode
    assert log.text == ""
    with pytest.raises(nsa_sel.SwitchError, match="NSA_SEL_VLLM: expected 0, 1 or nothing, got 'yes'"):
        start(monkeypatch, {"NSA_SEL_VLLM": "yes"})


@pytest.mark.parametrize(
    ("vllm_is", "reason"),
    [
        (dict(version="0.33.0"), "vllm: expected version 0.32, got 0.33.0"),
        (dict(version="0.320.0"), "vllm: expected version 0.32, got 0.320.0"),
        (dict(platform=standins.Platform(10, 0)), "expected compute capability 8.0 to 9.0, got 10.0"),
        (dict(platform=standins.Platform(7, 5)), "expected compute capability 8.0 to 9.0, got 7.5"),
        (dict(platform=type("RocmPlatform", (), {"is_cuda": lambda self: False})()), "got RocmPlatform"),
    ],
)
def test_another_vllm_or_gpu_goes_on_without_us(
    vllm_is: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    modules = start(monkeypatch, {"NSA_SEL_VLLM": "1"}, **vllm_is)
    assert f"vLLM goes on without us: {reason}" in log.text.replace("expected a CUDA platform, ", "")
    call_all(modules)
    assert standins.ran == OWN
    assert nsa_sel.stats() == {}


def test_a_function_with_other_arguments_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def minimax_m3_sparse_attn_decode(q, kv_cache, topk_idx, block_table, seq_lens, num_kv_heads, sm_scale, output): ...

    theirs = minimax_m3_sparse_attn_decode
    monkeypatch.setattr(standins, "minimax_m3_sparse_attn_decode", theirs)
    modules = start(monkeypatch, {"NSA_SEL_VLLM": "1"})
    assert modules[M3].minimax_m3_sparse_attn_decode is theirs
    expected = r"minimax_m3_sparse_attn_decode is left alone: expected the arguments q, .*output, decode_query_len, "
    assert re.search(expected + r"k_scale=None, v_scale=None, got q, .*sm_scale, output$", log.text, re.MULTILINE)
    assert isinstance(modules[QSA_OPS].qsa_sparse_paged_attention, _vllm_plugin.Replacement)


def test_other_blocks_are_left_alone(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    modules = standins.vllm_modules()
    modules[M3].SPARSE_BLOCK_SIZE = 64  # type: ignore[attr-defined]
    standins.install(modules, monkeypatch)
    _vllm_plugin.install()
    assert modules[M3].minimax_m3_sparse_attn_decode is standins.minimax_m3_sparse_attn_decode
    assert "SPARSE_BLOCK_SIZE: expected 128, got 64" in log.text


def test_where_the_kernel_cannot_run_vllm_s_own_does(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    modules = start(monkeypatch, {"NSA_SEL_VLLM": "1"})
    call_all(modules)
    assert standins.ran == OWN
    assert nsa_sel.stats() == {}
    told = "minimax_m3_sparse_attn_decode is left to vLLM's own kernel, it would run on sdpa: tensors on cpu"
    assert log.text.count(told) == 1  # both calls are of one kind
    assert f"nsa_sel {nsa_sel.__version__} stands in for {M3}.minimax_m3_sparse_attn_decode" in log.text


@pytest.mark.parametrize("prefill", [False, True])
def test_ours_run_where_routing_chooses_a_backend_of_ours(
    prefill: bool, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    modules = standins.vllm_modules()
    standins.install(modules, monkeypatch)
    _vllm_plugin.install(backends=("sdpa",), prefill=prefill)
    call_all(modules)
    assert standins.ran == ([] if prefill else ["minimax_m3_sparse_attn", "qsa_sparse_paged_attention"])
    assert nsa_sel.stats() == {"sdpa": {"backend='sdpa'": 5 if prefill else 3}}
    assert "minimax_m3_sparse_attn_decode runs on sdpa: tensors on cpu" in log.text
    arguments = QSA[0].arguments()
    out = modules[QSA_OPS].qsa_sparse_paged_attention(*list(arguments.values())[:6], False, arguments["out"],
                                                      output_gate=arguments["output_gate"])  # fmt: skip
    assert out is arguments["out"]
    assert error(out, QSA[0].expected()) <= TOLERANCE[torch.float32]


def test_the_switch_for_prefills(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(_vllm_plugin, "install", lambda **kwargs: asked.append(kwargs))
    start(monkeypatch, {"NSA_SEL_VLLM": "1"})
    start(monkeypatch, {"NSA_SEL_VLLM": "1", "NSA_SEL_VLLM_PREFILL": "1"})
    assert asked == [{"prefill": False}] * 2 + [{"prefill": True}] * 2


def test_a_kernel_that_is_refused_leaves_the_call_to_vllm(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    modules = standins.vllm_modules()
    standins.install(modules, monkeypatch)
    _vllm_plugin.install(backends=("sdpa",))
    tried = []

    def refused(**kwargs: Any) -> None:
        tried.append(1)
        raise KernelLaunchError("too much shared memory")

    monkeypatch.setattr(nsa_sel, "selection_attention", refused)
    for _ in range(2):
        modules[M3].minimax_m3_sparse_attn_decode(**M3_DECODE[0].decode())
    assert standins.ran == ["minimax_m3_sparse_attn_decode"] * 2
    assert len(tried) == 1
    assert "minimax_m3_sparse_attn_decode: vLLM's own kernel runs: too much shared memory" in log.text


def test_float8_caches_are_left_to_vllm(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    modules = standins.vllm_modules()
    standins.install(modules, monkeypatch)
    _vllm_plugin.install(backends=("sdpa",))
    arguments, scale = M3_DECODE[0].decode(), torch.ones(1)
    arguments["kv_cache"] = arguments["kv_cache"].to(torch.float8_e4m3fn)
    for _ in range(2):
        modules[M3].minimax_m3_sparse_attn_decode(**arguments, k_scale=scale, v_scale=scale)
    modules[M3].minimax_m3_sparse_attn_decode(**M3_DECODE[0].decode())
    assert standins.ran == ["minimax_m3_sparse_attn_decode"] * 2
    assert log.text.count("vLLM's own kernel runs: kv_cache: expected q's dtype, got torch.float8_e4m3fn") == 1
    assert_ran_on_sdpa("backend='sdpa'")


def test_what_breaks_the_gpu_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = standins.vllm_modules()
    standins.install(modules, monkeypatch)
    _vllm_plugin.install(backends=("sdpa",))

    def broken(**kwargs: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(nsa_sel, "selection_attention", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        modules[M3].minimax_m3_sparse_attn_decode(**M3_DECODE[0].decode())
    assert standins.ran == []


def test_without_wrapt_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "wrapt", None)
    start(monkeypatch, {"NSA_SEL_VLLM": "1"})
    assert "wrapt is not installed: pip install 'nsa-sel[vllm]'" in log.text


def test_an_error_of_the_plug_in_is_told_and_vllm_starts(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def broken(**kwargs: Any) -> None:
        raise RuntimeError("something unforeseen")

    monkeypatch.setattr(_vllm_plugin, "install", broken)
    start(monkeypatch, {"NSA_SEL_VLLM": "1"})
    assert "vLLM goes on without us" in log.text
    assert "something unforeseen" in log.text


def test_vllm_finds_the_plug_in_by_its_entry_point() -> None:
    from importlib.metadata import entry_points

    (found,) = [one for one in entry_points(group="vllm.general_plugins") if one.name == "nsa_sel"]
    assert found.load() is vllm.register


def test_our_functions_take_the_arguments_of_the_stand_ins() -> None:
    for target in _vllm_plugin.TARGETS:
        ours, theirs = getattr(vllm, target.name), getattr(standins, target.name)
        assert standins.parameters(ours) == standins.parameters(theirs)
        assert inspect.signature(target.prepare).parameters.keys() == inspect.signature(ours).parameters.keys()


def test_the_page_s_code_runs() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})
    assert_ran_on_sdpa()
