"""Each row of the routing table, in its order, without a GPU: routing is a pure function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import nsa_sel
from nsa_sel import _build, devices, execute, switches
from nsa_sel._build import BuildInfo, Instance
from nsa_sel.backends import cuda
from nsa_sel.call import Call
from nsa_sel.check import check
from nsa_sel.devices import DeviceInfo
from nsa_sel.policy import Policy, Rule
from nsa_sel.routing import Decision, decide
from nsa_sel.switches import Switches

H200 = DeviceInfo("NVIDIA H200", (9, 0), 132)
ADA = DeviceInfo("NVIDIA L4", (8, 9), 58)
TURING = DeviceInfo("Tesla T4", (7, 5), 40)
INSTANCES = tuple(Instance(f"bf16_128x128_h{tile}", "bfloat16", 128, 128, tile) for tile in (8, 16, 32))
BUILD = BuildInfo(True, None, INSTANCES, (80, 86, 89, 90))
NO_KERNELS = BuildInfo(False, "no CUDA compiler was found")
ON = Policy({"NVIDIA H200": {"cuda": Rule(True, 256)}, "NVIDIA L4": {"cuda": Rule(True)}})
OFF = Policy({"NVIDIA H200": {"cuda": Rule(False)}, "NVIDIA L4": {"cuda": Rule(False)}})
REFUSED = "kernel bf16_128x128_h16 was refused at launch on this device before"


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def kernel_call(**changes: Any) -> Call:
    """A call that the kernels of BUILD take, as if its tensors lay on a GPU; some of what it says changed."""
    call = check(
        meta(4, 1, 2, 16, 128), meta(4, 2, 4096, 128), meta(4, 2, 4096, 128), meta(4, 1, 2, 8, 2, dtype=torch.int32),
        max_selected=512,
    )  # fmt: skip
    return replace(call, **({"device_type": "cuda"} | changes))


def choose(
    call: Call | None = None,
    device: DeviceInfo | None = H200,
    policy: Policy | None = None,
    environ: dict[str, str] | None = None,
    refused: str | None = None,
    backend: str = "auto",
    limits: dict[str, str] | None = None,
) -> Decision:
    """Decide; `limits` are the backends' own words on what they cannot take."""
    switched = switches.parse(environ or {})
    return decide(call or kernel_call(), device, policy, switched, (limits or {}).get, refused, backend)


FORCED = {"NSA_SEL_CUDA": "1"}


@pytest.mark.parametrize("environ", [{}, FORCED], ids=["unset", "NSA_SEL_CUDA=1"])
@pytest.mark.parametrize(
    ("changes", "reason"), [({"limits": {"cuda": "too many pages"}}, "too many pages"), ({"refused": REFUSED}, REFUSED)]
)
def test_where_the_kernel_cannot_run_sdpa_does(changes: dict[str, Any], reason: str, environ: dict[str, str]) -> None:
    assert choose(**changes, environ=environ, policy=ON) == ("sdpa", reason)


@pytest.mark.parametrize(
    ("changes", "device", "build", "reason"),
    [
        ({}, H200, BUILD, None),
        ({"device_type": "cpu"}, None, BUILD, "tensors on cpu"),
        ({"device_type": "meta"}, None, BUILD, "tensors on meta"),
        ({"dtype": "float32"}, H200, BUILD, "no kernel takes float32"),
        ({"dtype": "float64"}, H200, BUILD, "no kernel takes float64"),
        ({"requires_grad": True}, H200, BUILD, "gradients required"),
        ({"Dk": 80}, H200, BUILD, "no kernel compiled for bfloat16 Dk=80 Dv=128 h=16"),
        ({"dtype": "float16"}, H200, BUILD, "no kernel compiled for float16 Dk=128 Dv=128 h=16"),
        ({"h": 33}, H200, BUILD, "no kernel compiled for bfloat16 Dk=128 Dv=128 h=33"),
        ({}, TURING, BUILD, "no kernel compiled for compute capability 7.5"),
        ({}, H200, NO_KERNELS, "this build has no kernels: no CUDA compiler was found"),
        ({"k": meta(4, 2, 4096, 132)[..., :128]}, H200, BUILD, "k: expected strides of multiples of 16 bytes"),
        ({"S_kv": 2**31}, H200, BUILD, "S_kv is 2147483648, the kernel takes up to 2147483584"),
        ({"n": 2**31 - 63}, H200, BUILD, "n is 2147483585, the kernel takes up to 2147483584"),
        ({"num_pages": 2**40}, H200, BUILD, "num_pages is 1099511627776, the kernel takes"),
        ({"num_tables": 2**40}, H200, BUILD, "num_tables is 1099511627776, the kernel takes"),
    ],
)
def test_the_kernel_says_what_it_cannot_take(
    changes: dict[str, Any], device: DeviceInfo | None, build: BuildInfo, reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(_build, "routing_build", lambda: build)
    found = cuda.limits(kernel_call(**changes), device)
    assert found == reason or (reason is not None and found is not None and found.startswith(reason))


@pytest.mark.parametrize("policy", [None, ON, OFF])
@pytest.mark.parametrize("device", [H200, ADA])
def test_cuda_switch_off(policy: Policy | None, device: DeviceInfo) -> None:
    assert choose(policy=policy, device=device, environ={"NSA_SEL_CUDA": "0"}) == ("sdpa", "NSA_SEL_CUDA=0")


def test_switch_off_stands_before_a_refused_launch() -> None:
    assert choose(refused=REFUSED, environ={"NSA_SEL_CUDA": "0"}).reason == "NSA_SEL_CUDA=0"


@pytest.mark.parametrize("policy", [None, ON, OFF])
@pytest.mark.parametrize("device", [H200, ADA])
def test_cuda_switch_on_wins_over_policy_and_compute_capability(policy: Policy | None, device: DeviceInfo) -> None:
    assert choose(policy=policy, device=device, environ=FORCED) == ("cuda", "NSA_SEL_CUDA=1")


@pytest.mark.parametrize(
    ("refused", "runs"),
    [({(1, "bf16_128x128_h16")}, "cuda"), ({(0, "bf16_128x128_h8")}, "cuda"), ({(0, "bf16_128x128_h16")}, "sdpa")],
)
def test_a_refusal_concerns_one_device_and_one_instance(
    refused: set[tuple[int, str]], runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_build, "routing_build", lambda: BUILD)
    monkeypatch.setattr(devices, "info", lambda index: H200)
    monkeypatch.setattr(execute, "_refused", frozenset(refused))
    assert execute.route(kernel_call()).backend == runs


@pytest.mark.parametrize(
    ("policy", "bound", "expected"),
    [
        (OFF, 512, Decision("sdpa", "policy: cuda is off on NVIDIA H200")),
        (ON, 255, Decision("sdpa", "policy: L bound below min_l=256 on NVIDIA H200")),
        (ON, 256, Decision("cuda", "policy: cuda is on for NVIDIA H200")),
        (ON, None, Decision("cuda", "policy: cuda is on for NVIDIA H200")),  # unknown is not below
        (Policy({"NVIDIA L4": {"cuda": Rule(False)}}), 512, Decision("cuda", "not measured here")),
        (Policy({"NVIDIA H200": {"triton": Rule(False)}}), 512, Decision("cuda", "not measured here")),
        (None, 512, Decision("cuda", "not measured here")),
    ],
)
def test_policy(policy: Policy | None, bound: int | None, expected: Decision) -> None:
    assert choose(kernel_call(max_selected=bound), policy=policy) == expected


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (None, Decision("sdpa", "compute capability 8.9 with no policy that turns it on")),
        (Policy(), Decision("sdpa", "compute capability 8.9 with no policy that turns it on")),
        (OFF, Decision("sdpa", "policy: cuda is off on NVIDIA L4")),
        (ON, Decision("cuda", "policy: cuda is on for NVIDIA L4")),
    ],
)
def test_ada_is_off_until_measured(policy: Policy | None, expected: Decision) -> None:
    assert choose(device=ADA, policy=policy) == expected


TRITON_ON = {"NSA_SEL_TRITON": "1"}
BARRED = {"cuda": "dims"}
FREE: dict[str, str] = {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"environ": TRITON_ON}, "triton"),
        ({"environ": {}}, "sdpa"),
        ({"environ": {"NSA_SEL_TRITON": "0"}}, "sdpa"),
        ({"environ": TRITON_ON, "limits": FREE}, "cuda"),  # only where cuda cannot run
        ({"environ": TRITON_ON, "limits": FREE, "policy": OFF}, "sdpa"),
        ({"environ": TRITON_ON | {"NSA_SEL_CUDA": "0"}, "limits": FREE}, "triton"),
        ({"environ": TRITON_ON, "bound": 4095}, "sdpa"),
        ({"environ": TRITON_ON, "bound": None}, "sdpa"),
        ({"environ": TRITON_ON | {"NSA_SEL_TRITON_MIN_L": "100"}, "bound": 100}, "triton"),
        ({"environ": TRITON_ON | {"NSA_SEL_TRITON_MIN_L": "4097"}}, "sdpa"),
        ({"environ": TRITON_ON, "device": ADA}, "sdpa"),
        ({"environ": TRITON_ON | {"NSA_SEL_TRITON_FORCE": "1"}, "device": ADA}, "triton"),
        ({"environ": TRITON_ON | {"NSA_SEL_TRITON_FORCE": "0"}, "device": ADA}, "sdpa"),
        ({"environ": {"NSA_SEL_TRITON_FORCE": "1"}, "device": ADA}, "sdpa"),
        ({"environ": TRITON_ON, "policy": Policy({"NVIDIA H200": {"triton": Rule(False)}})}, "sdpa"),
        ({"environ": TRITON_ON, "policy": Policy({"NVIDIA H200": {"triton": Rule(True, 5000)}})}, "sdpa"),
        ({"environ": TRITON_ON, "device": None}, "sdpa"),
        ({"environ": TRITON_ON, "limits": BARRED | {"triton": "dims too"}}, "sdpa"),
    ],
)
def test_triton_only_when_asked_for(changes: dict[str, Any], expected: str) -> None:
    given = {"limits": BARRED, "bound": 4096} | changes
    assert choose(kernel_call(max_selected=given.pop("bound")), **given).backend == expected


@pytest.mark.parametrize(
    ("backend", "changes", "text"),
    [
        ("cuda", {"environ": {"NSA_SEL_CUDA": "0"}}, "NSA_SEL_CUDA=0 forbids it"),
        ("cuda", {"limits": {"cuda": "v: expected strides of"}}, "v: expected strides of"),
        ("triton", {"environ": {"NSA_SEL_TRITON": "0"}}, "NSA_SEL_TRITON=0 forbids it"),
        ("triton", {"limits": {"triton": "paged caches"}}, "paged caches"),
    ],
)
def test_a_forced_backend_that_cannot_run_says_why(backend: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(nsa_sel.BackendError, match=f"backend='{backend}'.*{text}"):
        choose(backend=backend, **changes)


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("cuda", {"device": ADA}),
        ("cuda", {"policy": OFF}),
        ("cuda", {"refused": REFUSED}),
        ("triton", {"limits": BARRED}),
        ("sdpa", {"environ": FORCED}),
    ],
)
def test_a_forced_backend_runs_against_policy(backend: str, changes: dict[str, Any]) -> None:
    assert choose(backend=backend, **changes) == (backend, f"backend='{backend}'")


@pytest.mark.parametrize(("heads", "tile"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32)])
def test_the_instance_is_the_smallest_that_holds_the_heads(heads: int, tile: int) -> None:
    instance = BUILD.instance_for("bfloat16", 128, 128, heads)
    assert instance is not None
    assert instance.head_tile == tile


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((7, 5), False), ((8, 0), True), ((8, 7), True), ((8, 9), True), ((9, 0), True), ((10, 0), True), ((12, 0), True)],
)
def test_architectures(capability: tuple[int, int], runs: bool) -> None:
    assert BUILD.runs_on(capability) is runs
    assert not replace(BUILD, architectures=(90,)).runs_on((8, 0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NSA_SEL_CUDA", "yes"),
        ("NSA_SEL_CUDA", "2"),
        ("NSA_SEL_CUDA", " 1"),
        ("NSA_SEL_TRITON", "true"),
        ("NSA_SEL_TRITON_FORCE", "on"),
        ("NSA_SEL_TRITON_MIN_L", "-1"),
        ("NSA_SEL_TRITON_MIN_L", "4k"),
        ("NSA_SEL_TRITON_MIN_L", "²"),
        ("NSA_SEL_DEBUG", "1"),
        ("NSA_SEL_DEBUG", "compare,"),
    ],
)
def test_an_unknown_value_of_a_switch_is_an_error(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(nsa_sel.SwitchError, match=f"{name}: expected .*got {value!r}"):
        switches.parse({name: value})
    monkeypatch.setenv(name, value)
    with pytest.raises(nsa_sel.SwitchError, match=name):
        nsa_sel.refresh_routing()
    with pytest.raises(nsa_sel.SwitchError, match=name):  # and so says the next call, instead of using older ones
        nsa_sel.explain(**small_call())


@pytest.mark.parametrize("name", ["NSA_SEL_CUDA", "NSA_SEL_TRITON", "NSA_SEL_TRITON_MIN_L", "NSA_SEL_TRITON_FORCE",
                                  "NSA_SEL_POLICY", "NSA_SEL_DEBUG"])  # fmt: skip
def test_unset_and_empty_mean_the_same(name: str) -> None:
    assert switches.parse({name: ""}) == switches.parse({}) == Switches()


def test_switches_parse() -> None:
    environ = {"NSA_SEL_CUDA": "0", "NSA_SEL_TRITON": "1", "NSA_SEL_TRITON_MIN_L": "17", "NSA_SEL_TRITON_FORCE": "1",
               "NSA_SEL_POLICY": "/a/b", "NSA_SEL_DEBUG": "timing,compare"}  # fmt: skip
    assert switches.parse(environ) == Switches(False, True, 17, True, "/a/b", frozenset({"timing", "compare"}))


def small_call() -> dict[str, Any]:
    q, k = torch.zeros(1, 1, 1, 4, 128, dtype=torch.bfloat16), torch.zeros(1, 1, 8, 128, dtype=torch.bfloat16)
    return {"q": q, "k": k, "v": k, "ranges": torch.tensor([[[[[0, 8]]]]])}
