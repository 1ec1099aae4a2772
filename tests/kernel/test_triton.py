"""The Triton backend beyond the common suite: what it refuses, how it is launched, and its machine code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nsa_sel
from nsa_sel.backends import triton as backend
from nsa_sel.call import Call
from nsa_sel.check import check
from nsa_sel.devices import DeviceInfo
from nsa_sel.errors import BackendError, KernelLaunchError
from nsa_sel.measure.run import tune
from nsa_sel.testing import Inputs, assert_matches_reference, make_inputs
from tests.backends_under_test import backend as under_test
from tests.backends_under_test import no_triton_interpreter
from tests.cases import Case, case, fixed, spans

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
interpreted = pytest.mark.skipif(no_triton_interpreter() is not None, reason=f"triton: {no_triton_interpreter()}")
GOOD = check(**case("one-token").inputs().arguments())


def run(inputs: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the interpreted kernel; the backend under test proves that it ran."""
    return under_test("triton-interpreted").run(inputs, **options)


def call_of(name: str) -> Call:
    return check(**case(name).inputs().arguments(return_lse=True))


def launch(call: Call, config: backend.Config | None = None) -> tuple[Any, dict[str, Any]]:
    out = torch.empty((*call.q.shape[:4], call.Dv), dtype=call.q.dtype)
    return backend.launch(call, out, None, config or backend.Config())


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled, not interpreted")
def test_triton_is_interpreted_where_it_is_installed() -> None:
    """Else the common suite would leave it out and still be green."""
    assert no_triton_interpreter() is None


@interpreted
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"page_size": 3, "num_pages": 9, "block_size": 4, "S": 3, "h": 64, "Dk": 192}, None),
        ({"device_type": "cuda"}, "under TRITON_INTERPRET=1 triton takes CPU tensors, not tensors on cuda"),
        ({"dtype": "float32"}, "triton takes float16 and bfloat16, not float32"),
        ({"requires_grad": True}, "gradients required"),
        ({"h": 65}, "triton takes h up to 64, not 65"),
        ({"Dk": 257}, "triton takes Dk up to 256, not 257"),
        ({"Dv": 512}, "triton takes Dv up to 256, not 512"),
        ({"S_kv": 2**26}, "triton takes S_kv up to 67108863, not 67108864"),
        ({"B": 2**30}, "triton takes rows below 2147483616, not 2147483648"),
        ({"n": 2**31}, "triton takes n below 2147483616, not 2147483648"),
    ],
)
def test_what_it_cannot_run(changes: dict[str, Any], message: str | None) -> None:
    assert backend.limits(replace(GOOD, **changes), None) == message


def test_compiled_kernels_take_cuda_tensors_of_new_enough_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_load", lambda: (SimpleNamespace(INTERPRETED=False), None))
    message = "triton takes CUDA tensors, or CPU tensors under TRITON_INTERPRET=1, not tensors on cpu"
    assert backend.limits(GOOD, None) == message
    with pytest.raises(BackendError, match=re.escape(message)):
        nsa_sel.explain(**case("one-token").inputs().arguments(backend="triton"))
    for capability, expected in (((7, 5), "triton takes compute capability 8.0 or newer, not 7.5"), ((8, 0), None)):
        device = DeviceInfo("a GPU", capability)
        assert backend.limits(replace(GOOD, device_type="cuda"), device) == expected


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend, "_load", backend._load.__wrapped__)
    assert backend.limits(GOOD, None) == "triton is not installed"
    monkeypatch.undo()

    def broken(name: str) -> None:
        raise ImportError("no libtriton")

    monkeypatch.setattr(backend.importlib, "import_module", broken)
    monkeypatch.setattr(backend, "_load", backend._load.__wrapped__)
    assert backend.limits(GOOD, None) == "triton cannot be used: no libtriton"


@interpreted
def test_an_interpreter_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getitem__(self, grid: object) -> Any:
            raise TypeError("only 0-dimensional arrays can be converted")

    monkeypatch.setattr(backend, "launch", lambda *arguments: (Broken(), {}))
    why = backend.interpreter_fault.__wrapped__()
    assert re.fullmatch(r"Triton's interpreter fails with triton \S+, numpy \S+: only 0-dimensional .*", why)


@interpreted
def test_one_span_is_dense_and_more_are_packed() -> None:
    names = {name: launch(call_of(name))[0].__name__ for name in ("one-token", "int64", "blocks-64", "no-slots")}
    assert names == {"one-token": "dense", "int64": "varlen", "blocks-64": "varlen", "no-slots": "varlen"}


@interpreted
@pytest.mark.parametrize("name", ["tokens-first", "packed", "pages-packed-192x128"])
def test_caches_go_in_as_they_are(name: str) -> None:
    call = call_of(name)
    arguments = launch(call)[1]
    for letter in "qkv":
        tensor = getattr(call, letter)
        assert arguments[letter].data_ptr() == tensor.data_ptr()
        assert arguments[f"{letter}_strides"] == tensor.stride()[:-1]


# the corners of the tuning grid, and steps that do not divide Dk
CONFIGS = [backend.Config(t, d, 4, 2) for t in (16, 64, 256) for d in (16, 32, 128)]


@interpreted
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.block_tokens}x{c.block_dims}")
def test_every_configuration_gives_the_same_result(config: backend.Config) -> None:
    inputs = Case("", spans(90), Dk=192, Dv=128, G=1, h=5, seed=70).inputs()
    out, lse = backend.run(check(**inputs.arguments(return_lse=True)), config=config)
    assert_matches_reference(out, lse, inputs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((48, 64, 4, 2), "block_tokens: expected a power of two >= 16, got 48"),
        ((64, 8, 4, 2), "block_dims: expected a power of two >= 16, got 8"),
        ((64, 64, 3, 2), "num_warps: expected a power of two >= 1, got 3"),
        ((64, 64, 4, 0), "num_stages: expected an int >= 1, got 0"),
    ],
)
def test_impossible_configurations_are_named(values: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        backend.Config(*values)


@interpreted
def test_configurations_reach_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = backend.launch
    monkeypatch.setattr(backend, "launch", lambda *arguments: seen.append(arguments[-1]) or real(*arguments))
    call, mine = call_of("one-token"), backend.Config(128, 32, 8, 3)
    with backend.using(tune.Config(256, 128, 2, 1)):
        backend.run(call)
        backend.run(call, config=mine)
    backend.run(call)
    assert seen == [backend.Config(256, 128, 2, 1), mine, backend.Config()]
    arguments = launch(call, mine)[1]
    assert [arguments[name] for name in ("N", "D", "num_warps", "num_stages")] == [128, 32, 8, 3]


@interpreted
def test_bits_of_a_row_depend_on_the_row_alone() -> None:
    """Neither on other rows, nor on unused slots beside its spans, nor on which of the kernels runs."""
    rows = [[[9, 200]], [[0, 3]], [[40, 41]], [[77, 250]]]
    dense = Case("", fixed(rows), B=2, seed=71).inputs()
    out, lse = run(dense)
    assert dense.ranges is not None
    for slots in (2, 40):
        ranges = torch.cat([dense.ranges, torch.zeros((2, 1, 2, slots - 1, 2), dtype=torch.int32)], dim=3)
        padded = Inputs(dense.q, dense.k, dense.v, ranges)
        assert all(map(torch.equal, run(padded), (out, lse)))
    alone = Inputs(dense.q[1:], dense.k[1:], dense.v[1:], dense.ranges[1:])
    assert all(map(torch.equal, run(alone), (out[1:], lse[1:])))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_nan_and_inf_of_selected_values_reach_the_result(dtype: torch.dtype) -> None:
    ranges = torch.tensor([[[[[2, 30]]]]], dtype=torch.int32)
    inputs = make_inputs(ranges=ranges, h=3, S_kv=40, dtype=dtype, seed=72)
    inputs.v[0, 0, 7, 5], inputs.v[0, 0, 8, 6], inputs.v[0, 0, 9, 7] = torch.nan, torch.inf, -torch.inf
    out, lse = run(inputs)
    assert_matches_reference(out, lse, inputs)
    assert out[..., 5:8].isfinite().sum() == 0


@interpreted
def test_out_is_the_same_without_lse() -> None:
    inputs = case("draft-seq-lens").inputs()
    nsa_sel.reset_stats()
    alone = nsa_sel.selection_attention(**inputs.arguments(backend="triton"))
    assert nsa_sel.stats() == {"triton": {"backend='triton'": 1}}
    assert torch.equal(alone, run(inputs)[0])


class Failing:
    """A kernel whose launch fails."""

    __name__ = "dense"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(**arguments: Any) -> None:
            raise self.error

        return start


def test_refused_launches_are_told_from_lost_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    call = call_of("one-token")
    refused = (
        OutOfResources(300_000, 232_448, "shared memory"),
        RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
    )
    for error in refused:
        monkeypatch.setattr(backend, "launch", lambda *_, error=error: (Failing(error), {}))
        with pytest.raises(KernelLaunchError, match=r"triton kernel dense on the CPU: .*resource"):
            backend.run(call)
    lost = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    monkeypatch.setattr(backend, "launch", lambda *_: (Failing(lost), {}))
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        backend.run(call)
    assert caught.value is lost


def compile_child(architecture: int, *wanted: str, folder: Path) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder)}  # what an earlier run compiled proves nothing
    command = [sys.executable, "-W", "error", "-m", "tests.kernel.triton_child", str(architecture), *wanted]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


COMPILED = ("nsa-paper-short", "one-token", "pages-blocks", "dims-64x128-fp16", "h64-192x128")


@pytest.mark.parametrize("architecture", [80, 90])
def test_machine_code(architecture: int, tmp_path: Path) -> None:
    """No GPU is needed: tiles are copied asynchronously, multiplied by tensor cores, and stay in registers."""
    found = compile_child(architecture, *(f"{name}:2" for name in COMPILED), folder=tmp_path)
    assert [entry["case"] for entry in found] == list(COMPILED)
    assert {entry["kernel"] for entry in found} == {"dense", "varlen"}
    for entry in found:
        assert entry["target"].startswith(f"sm_{architecture}"), entry
        assert entry["products"] > 0, entry
        assert entry["copies"] > 0, entry
        assert entry["spills"] <= 8, entry  # a scalar or two; a tile would be hundreds
        assert entry["shared"] <= 163 * 1024, entry  # what a block may have on sm_80


def test_stages_are_what_keeps_tiles_in_flight(tmp_path: Path) -> None:
    one, two, three = compile_child(90, "int64:1", "int64:2", "int64:3", folder=tmp_path)
    assert one["copies"] == 0
    assert two["copies"] > 0
    assert one["shared"] < two["shared"] < three["shared"]
