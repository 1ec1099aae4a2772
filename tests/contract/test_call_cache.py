"""Calls that look like an earlier one: what is served without Python, with which addresses, and what never is."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import nsa_sel
from benchmarks.call_cost import HAS_EXCHANGE, arguments, pretended
from nsa_sel import _core, execute

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class Watch:
    """Counts the calls that went the long way, and keeps the bytes of the launches that did not."""

    def __init__(self) -> None:
        self.long, self.launches, self.code = 0, list[bytes](), 0
        self.on_the_long_way = False
        self.callback = LAUNCHER(self._launch)

    def _launch(self, launch: int, device: int, stream: int | None) -> int:
        if self.on_the_long_way:
            return 0
        self.launches.append(ctypes.string_at(launch, 640))  # a DecodeLaunch up to the last of its decode parameters
        return self.code

    def served(self, **call: Any) -> bool:
        """Run a call; True where it did not go the long way."""
        before = self.long
        nsa_sel.selection_attention(**call)
        return self.long == before


@pytest.fixture(params=["exchange", "attributes"])
def watch(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Watch]:
    if request.param == "exchange" and not HAS_EXCHANGE:
        pytest.skip("this torch has no DLPack exchange interface")
    watch = Watch()
    real = execute.attend

    def attend(*given: Any) -> Any:
        watch.long += 1
        watch.on_the_long_way = True
        try:
            return real(*given)
        finally:
            watch.on_the_long_way = False

    with pretended(exchange=request.param == "exchange"):
        monkeypatch.setattr(execute, "attend", attend)
        _core.replace_launches(ctypes.cast(watch.callback, ctypes.c_void_p).value or 0)
        yield watch


def call(**changes: Any) -> dict[str, Any]:
    return arguments(4096) | changes


def test_a_second_call_like_the_first_launches_with_its_own_addresses(watch: Watch) -> None:
    first, second = call(), call()
    assert not watch.served(**first)
    out = nsa_sel.selection_attention(**second)
    assert watch.long == 1
    assert isinstance(out, torch.Tensor)
    assert (out.shape, out.dtype, out.is_contiguous()) == (second["q"].shape, torch.bfloat16, True)
    (launch,) = watch.launches
    for name in ("q", "k", "v", "block_indices", "seq_lens", "block_table"):
        assert struct.pack("q", second[name].data_ptr()) in launch, name
        assert struct.pack("q", first[name].data_ptr()) not in launch, name
    assert struct.pack("q", out.data_ptr()) in launch
    assert nsa_sel.stats() == {"cuda": {"not measured here": 2}}
    nsa_sel.reset_stats()
    assert nsa_sel.stats() == {}


def test_lse_and_out_are_those_of_this_call(watch: Watch) -> None:
    given = call(return_lse=True)
    nsa_sel.selection_attention(**given)
    out, lse = nsa_sel.selection_attention(**given)
    assert watch.long == 1
    assert (lse.shape, lse.dtype) == (given["q"].shape[:4], torch.float32)
    assert struct.pack("q", lse.data_ptr()) in watch.launches[-1]
    mine = torch.empty_like(out)
    assert not watch.served(**given, out=mine)
    assert nsa_sel.selection_attention(**given, out=mine)[0] is mine
    assert watch.long == 2


def padded(tensor: torch.Tensor) -> torch.Tensor:
    wide = tensor.new_zeros((*tensor.shape[:-1], tensor.shape[-1] + 8))
    return wide[..., : tensor.shape[-1]]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape)


ALTERED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "shape": lambda c: {"block_table": c["block_table"].repeat(1, 2)},
    "strides": lambda c: {"q": padded(c["q"])},
    "alignment": lambda c: {"seq_lens": shifted(c["seq_lens"])},
    "dtype": lambda c: {"block_indices": c["block_indices"].long()},
    "block_size": lambda c: {"block_size": 64},
    "counts": lambda c: {"counts": torch.ones(8, 1, 4, dtype=torch.int32)},
    "table_rows": lambda c: {"table_rows": torch.zeros(8, dtype=torch.int32)},
    "no seq_lens": lambda c: {"seq_lens": None},
    "causal": lambda c: {"causal": False},
    "max_selected": lambda c: {"max_selected": 100},
    "softmax_scale": lambda c: {"softmax_scale": 0.5},
    "lse": lambda c: {"return_lse": True},
    "batch_invariant": lambda c: {"batch_invariant": True},
    "out": lambda c: {"out": torch.empty_like(c["q"])},
    "backend": lambda c: {"backend": "cuda"},
    "ranges": lambda c: {"block_indices": None, "block_size": None, "ranges": torch.zeros(8, 1, 4, 16, 2).int()},
}


@pytest.mark.parametrize("name", ALTERED)
def test_another_signature_goes_the_long_way_once(name: str, watch: Watch) -> None:
    base = call()
    nsa_sel.selection_attention(**base)
    altered = base | ALTERED[name](base)
    assert not watch.served(**altered)
    assert watch.served(**altered)
    assert watch.served(**base)


def float8(**changes: Any) -> dict[str, Any]:
    pool = torch.zeros(4, 4, 128, 128).to(torch.float8_e4m3fn)
    return call(k=pool, v=pool) | changes


SCALES: dict[str, Callable[[], Any]] = {
    "none": lambda: None, "number": lambda: 0.5, "other number": lambda: 0.25, "element": lambda: torch.ones(1),
    "group": lambda: torch.ones(4), "token": lambda: torch.ones(4, 4, 128),
    "token, strided": lambda: torch.ones(4, 4, 256)[..., ::2],
}  # fmt: skip


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_scales_are_part_of_the_signature_and_come_with_their_own_addresses(name: str, watch: Watch) -> None:
    nsa_sel.selection_attention(**call())
    for kind, make in SCALES.items():
        first, second = make(), make()
        assert not watch.served(**float8(**{name: first})), kind
        assert watch.served(**float8(**{name: second})), kind
        if isinstance(second, torch.Tensor):
            assert struct.pack("q", second.data_ptr()) in watch.launches[-1], kind
            assert struct.pack("q", first.data_ptr()) not in watch.launches[-1], kind
    assert watch.served(**call())
    both = float8(k_scale=torch.ones(4), v_scale=torch.ones(1))
    assert not watch.served(**both)
    assert watch.served(**both)
    swapped = both | {"k_scale": both["v_scale"], "v_scale": both["k_scale"]}
    assert not watch.served(**swapped)
    assert set(nsa_sel.stats()) == {"cuda"}


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
def test_a_scale_that_is_not_plain_is_never_served(name: str, watch: Watch) -> None:
    out = torch.empty(8, 1, 4, 16, 128, dtype=torch.bfloat16)
    base = float8(out=out, **{name: torch.ones(4)})
    nsa_sel.selection_attention(**base)
    assert watch.served(**base)
    assert not watch.served(**base | {name: torch._neg_view(base[name])})
    with pytest.raises(nsa_sel.AutogradError, match=f"{name}: expected no gradient"):
        nsa_sel.selection_attention(**base | {name: base[name].clone().requires_grad_()})
    with pytest.raises(nsa_sel.ArgumentError, match=f"out: expected memory of its own, got some that is {name}'s"):
        nsa_sel.selection_attention(**base | {name: out.flatten()[:8].view(torch.float32)})


class Subclass(torch.Tensor):
    pass


class Mode(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_what_is_not_plain_is_never_served(watch: Watch) -> None:
    base = call()
    nsa_sel.selection_attention(**base)
    assert watch.served(**base)
    assert watch.served(**base | {"q": torch.nn.Parameter(base["q"], requires_grad=False)})
    for name in ("k", "seq_lens"):
        odd = base | {name: base[name].as_subclass(Subclass)}
        assert not watch.served(**odd)
        assert not watch.served(**odd)
    with Mode():
        assert not watch.served(**base)
    with torch.autograd.forward_ad.dual_level():
        assert not watch.served(**base)
    assert watch.served(**base)


def test_gradients_are_never_served_and_come_back_when_they_are_off(watch: Watch) -> None:
    base = call()
    nsa_sel.selection_attention(**base)
    for name in ("q", "k", "v"):
        wants = base | {name: base[name].clone().requires_grad_()}
        ran = watch.long
        assert nsa_sel.selection_attention(**wants).requires_grad or watch.long == ran + 1
        with torch.no_grad():
            assert watch.served(**wants)


@pytest.mark.parametrize("name", ["q", "k", "block_indices", "seq_lens"])
def test_an_out_that_overlaps_is_refused_hit_or_miss(name: str, watch: Watch) -> None:
    base = call(out=torch.empty(8, 1, 4, 16, 128, dtype=torch.bfloat16))
    nsa_sel.selection_attention(**base)
    assert watch.served(**base)
    pool = torch.zeros(2**20, dtype=torch.bfloat16)
    bad = dict(base)
    for given, place in ((name, 0), ("out", 0)):
        size = bad[given].numel() * bad[given].element_size() // 2
        bad[given] = pool[place : place + size].view(bad[given].dtype).view(bad[given].shape)
    launches = len(watch.launches)
    for _ in range(2):
        with pytest.raises(nsa_sel.ArgumentError, match=f"out: expected memory of its own, got some that is {name}'s"):
            nsa_sel.selection_attention(**bad)
    assert len(watch.launches) == launches


def test_errors_are_the_same_and_never_kept(watch: Watch) -> None:
    bad = call(seq_lens=torch.zeros(3, dtype=torch.int32))
    texts = []
    for _ in range(2):
        with pytest.raises(nsa_sel.ArgumentError) as caught:
            nsa_sel.selection_attention(**bad)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert _core.num_launches() == 0


@pytest.mark.parametrize("value", [1, "yes", None])
def test_a_flag_that_is_no_bool_is_an_error_after_one_that_is(value: object, watch: Watch) -> None:
    base = call(causal=True)
    nsa_sel.selection_attention(**base)
    with pytest.raises(nsa_sel.ArgumentTypeError, match="causal: expected a bool"):
        nsa_sel.selection_attention(**base | {"causal": value})


def test_new_rules_and_refusals_empty_it(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    base = call()
    nsa_sel.selection_attention(**base)
    assert watch.served(**base)
    monkeypatch.setenv("NSA_SEL_CUDA", "0")
    nsa_sel.refresh_routing()
    assert not watch.served(**base)
    assert not watch.served(**base)
    assert nsa_sel.stats()["sdpa"] == {"NSA_SEL_CUDA=0": 2}
    monkeypatch.delenv("NSA_SEL_CUDA")
    nsa_sel.refresh_routing()
    nsa_sel.selection_attention(**base)
    assert watch.served(**base)
    with pytest.warns(RuntimeWarning, match="was refused"):
        execute._remember_refusal(execute.check(**base), nsa_sel.KernelLaunchError("no"))
    assert not watch.served(**base)
    assert [reason for reason in nsa_sel.stats()["sdpa"] if "was refused at launch" in reason]


def test_debug_switches_keep_every_call_on_the_long_way(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_SEL_DEBUG", "timing")
    nsa_sel.refresh_routing()
    monkeypatch.setattr("nsa_sel.debug._capturing", lambda call: False)
    assert not watch.served(**call())
    assert not watch.served(**call())


def test_a_launch_that_fails_goes_the_long_way(watch: Watch) -> None:
    base = call()
    nsa_sel.selection_attention(**base)
    watch.code = 1
    assert not watch.served(**base)
    assert sum(nsa_sel.stats()["cuda"].values()) == 2


def test_it_is_bounded(watch: Watch) -> None:
    base = call()
    for i in range(1100):
        nsa_sel.selection_attention(**base, softmax_scale=1 + i / 2048)
    assert 0 < _core.num_launches() <= 1024


def test_threads_get_their_own_results(watch: Watch) -> None:
    calls = [call(max_selected=i) for i in range(4)]
    wrong = list[str]()

    def work(given: dict[str, Any]) -> None:
        for _ in range(200):
            out = nsa_sel.selection_attention(**given)
            if out.shape != given["q"].shape:  # type: ignore[union-attr]
                wrong.append(str(out))

    threads = [threading.Thread(target=work, args=(given,)) for given in calls]
    for thread in threads:
        thread.start()
    for _ in range(50):
        _core.forget_launches()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(nsa_sel.stats()["cuda"].values()) == 800


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_a_tensor_whose_memory_holds_its_negative_goes_to_pytorch(name: str, watch: Watch) -> None:
    base = call(out=torch.empty(8, 1, 4, 16, 128, dtype=torch.bfloat16))
    nsa_sel.selection_attention(**base)
    assert watch.served(**base)
    negated = base | {name: torch._neg_view(base[name])}
    decision = nsa_sel.explain(**negated)
    assert (decision.backend, decision.reason.partition(":")[0]) == ("sdpa", name)
    assert not watch.served(**negated)
    assert not watch.served(**negated)
    assert nsa_sel.stats() == {"cuda": {"not measured here": 2}, "sdpa": {decision.reason: 2}}
    with pytest.raises(nsa_sel.BackendError, match=f"{name}: its memory holds its negative"):
        nsa_sel.selection_attention(**negated, backend="cuda")


def test_memory_that_was_freed_is_never_read(watch: Watch) -> None:
    base = call()
    nsa_sel.selection_attention(**base)
    base["k"].untyped_storage().resize_(0)  # as FSDP does between steps
    assert nsa_sel.explain(**base).backend == "sdpa"
    assert not watch.served(**base)


def test_a_process_ends_in_order_after_a_call_that_nobody_waited_for() -> None:
    script = (
        "from benchmarks.call_cost import arguments, pretended\n"
        "from nsa_sel import _core, check, execute\n"
        "with pretended():\n"
        "    execute.run(check.check(**arguments(4096)))\n"
        "    print(_core.num_launches())\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout) == (0, "0\n"), ended.stderr
