"""The public function around routing, with a pretended GPU: refused launches, warnings, switches, the policy file."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nsa_sel
from nsa_sel import _build, api, backends, devices, execute
from nsa_sel._build import BuildInfo
from nsa_sel.backends import sdpa
from nsa_sel.call import Call
from nsa_sel.devices import DeviceInfo
from nsa_sel.errors import KernelLaunchError, PlanError
from nsa_sel.policy import save
from tests.contract.test_routing import BUILD, H200, NO_KERNELS, OFF, small_call


class FakeKernels:
    """A kernel backend that refuses its first launches and otherwise lets packed SDPA compute."""

    def __init__(self, refusals: int = 0, error: type[Exception] = KernelLaunchError, name: str = "cuda") -> None:
        self.refusals, self.error, self.name, self.launches = refusals, error, name, 0

    def limits(self, call: Call, device: DeviceInfo | None) -> str | None:
        build = _build.routing_build()
        return None if build.kernels or self.name != "cuda" else f"this build has no kernels: {build.reason}"

    def run(self, call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.launches += 1
        if self.launches <= self.refusals:
            raise self.error("too many resources requested for launch")
        return sdpa.forward(call)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make this machine look as if the CPU tensors of a call lay on an H200."""

    def install(kernels: FakeKernels, build: BuildInfo = BUILD, device: DeviceInfo = H200) -> None:
        real_get, real_check = backends.get, execute.check
        monkeypatch.setattr(backends, "get", lambda name: kernels if name == "cuda" else real_get(name))
        monkeypatch.setattr(_build, "routing_build", lambda: build)
        monkeypatch.setattr(devices, "info", lambda index: device)

        def check_on_gpu(*arguments: Any, **keywords: Any) -> Call:
            return replace(real_check(*arguments, **keywords), device_type="cuda")

        monkeypatch.setattr(execute, "check", check_on_gpu)
        monkeypatch.setattr(api, "check", check_on_gpu)

    return install


def test_a_call_is_counted_after_it_ran(pretend: Any) -> None:
    kernels = FakeKernels()
    pretend(kernels)
    assert nsa_sel.explain(**small_call()) == ("cuda", "not measured here")
    assert (kernels.launches, nsa_sel.stats()) == (0, {})
    nsa_sel.selection_attention(**small_call())
    assert (kernels.launches, nsa_sel.stats()) == (1, {"cuda": {"not measured here": 1}})


def test_a_call_that_no_launch_fits_falls_back_and_bars_nothing(pretend: Any) -> None:
    kernels = FakeKernels(refusals=1, error=PlanError)
    pretend(kernels)
    nsa_sel.selection_attention(**small_call())
    reason = "no launch of the kernel fits: too many resources requested for launch"
    assert nsa_sel.stats() == {"sdpa": {reason: 1}}
    nsa_sel.selection_attention(**small_call())
    assert nsa_sel.stats()["cuda"] == {"not measured here": 1}
    pretend(FakeKernels(refusals=1, error=PlanError))
    with pytest.raises(PlanError):
        nsa_sel.selection_attention(**small_call(), backend="cuda")


def test_a_refused_launch_falls_back_once_warned_and_remembered(pretend: Any) -> None:
    kernels = FakeKernels(refusals=9)
    pretend(kernels)
    reason = "kernel bf16_128x128_h8 was refused at launch on this device before"
    with pytest.warns(RuntimeWarning, match="bf16_128x128_h8 was refused.*too many resources"):
        out = nsa_sel.selection_attention(**small_call())
    assert isinstance(out, torch.Tensor)
    assert nsa_sel.stats() == {"sdpa": {reason: 1}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nsa_sel.selection_attention(**small_call())
    assert kernels.launches == 1, "the refused kernel was tried again"
    assert nsa_sel.explain(**small_call()) == ("sdpa", reason)
    assert nsa_sel.stats() == {"sdpa": {reason: 2}}


def test_a_refused_launch_raises_where_the_kernel_was_forced(pretend: Any) -> None:
    pretend(FakeKernels(refusals=1))
    with pytest.raises(nsa_sel.KernelLaunchError, match="too many resources"):
        nsa_sel.selection_attention(**small_call(), backend="cuda")
    assert nsa_sel.stats() == {}
    assert nsa_sel.explain(**small_call()).backend == "cuda", "a forced call decided for later ones"


def test_a_sticky_error_is_never_swallowed(pretend: Any) -> None:
    pretend(FakeKernels(refusals=1, error=RuntimeError))
    with pytest.raises(RuntimeError, match="too many resources"):
        nsa_sel.selection_attention(**small_call())
    assert nsa_sel.stats() == {}


def test_no_kernels_on_a_gpu_warns_once(pretend: Any) -> None:
    pretend(FakeKernels(), build=NO_KERNELS)
    with pytest.warns(RuntimeWarning, match="this build has no kernels: no CUDA compiler was found"):
        nsa_sel.selection_attention(**small_call())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nsa_sel.selection_attention(**small_call())
    assert nsa_sel.stats() == {"sdpa": {"this build has no kernels: no CUDA compiler was found": 2}}


def test_variables_are_read_once_and_again_on_request(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(FakeKernels())
    assert nsa_sel.explain(**small_call()).backend == "cuda"
    monkeypatch.setenv("NSA_SEL_CUDA", "0")
    assert nsa_sel.explain(**small_call()).backend == "cuda"
    nsa_sel.refresh_routing()
    assert nsa_sel.explain(**small_call()) == ("sdpa", "NSA_SEL_CUDA=0")
    with pytest.raises(nsa_sel.BackendError, match="NSA_SEL_CUDA=0"):
        nsa_sel.selection_attention(**small_call(), backend="cuda")


def test_the_policy_file_decides(pretend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(FakeKernels())
    save(OFF, tmp_path / "policy.json")
    monkeypatch.setenv("NSA_SEL_POLICY", str(tmp_path / "policy.json"))
    nsa_sel.refresh_routing()
    assert nsa_sel.explain(**small_call()) == ("sdpa", "policy: cuda is off on NVIDIA H200")
    monkeypatch.setenv("NSA_SEL_POLICY", str(tmp_path / "missing.json"))
    with pytest.raises(nsa_sel.PolicyError, match=r"missing\.json"):
        nsa_sel.refresh_routing()
    with pytest.raises(nsa_sel.PolicyError, match=r"missing\.json"):
        nsa_sel.explain(**small_call())


def test_the_users_own_policy_is_found(pretend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(FakeKernels())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    save(OFF, tmp_path / "nsa_sel" / "policy.json")
    nsa_sel.refresh_routing()
    assert nsa_sel.explain(**small_call()).reason == "policy: cuda is off on NVIDIA H200"


def test_a_refused_triton_launch_falls_back_too(pretend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_SEL_TRITON", "1")
    monkeypatch.setenv("NSA_SEL_TRITON_MIN_L", "1")
    nsa_sel.refresh_routing()
    refusing = FakeKernels(refusals=9, name="triton")
    pretend(FakeKernels(), build=NO_KERNELS)
    known = backends.get
    monkeypatch.setattr(backends, "get", lambda name: refusing if name == "triton" else known(name))
    with pytest.warns(RuntimeWarning, match="no kernels"):
        nsa_sel.selection_attention(**small_call(), max_selected=64)
    assert refusing.launches == 1
    assert nsa_sel.stats() == {"sdpa": {"triton was refused at launch: too many resources requested for launch": 1}}
