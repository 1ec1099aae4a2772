"""The backends that the common suite runs, each behind the same lines and each proving that it was the one that ran."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import nsa_sel
from nsa_sel.backends import triton
from nsa_sel.testing import Inputs
from tests import host_run
from tests.cases import HALF, KERNEL_DIMS, Case
from tests.host_run import mutation

Result = tuple[torch.Tensor, Any]  # out [B, S, G, h, Dv], lse [B, S, G, h] (None: not asked for)


@dataclass(frozen=True)
class BackendUnderTest:
    """How to run a case on one backend."""

    name: str
    missing: Callable[[], str | None]  # why this machine does not have it
    cannot: Callable[[Case], str | None]  # why it does not take a case, by contract
    run: Callable[..., Result]  # (inputs, **keywords of the call, with lse by default); asserts that this backend ran
    device: str = "cpu"


def counted(stats: dict[str, dict[str, int]]) -> dict[tuple[str, str], int]:
    """Flatten `nsa_sel.stats()`."""
    return {(backend, reason): count for backend, reasons in stats.items() for reason, count in reasons.items()}


def run_public(inputs: Inputs, device: str, backend: str, expected: nsa_sel.Decision, **options: Any) -> Result:
    """Call the public function on a device, and require that explain() and stats() name the expected backend."""
    arguments = inputs.to(device).arguments(**{"return_lse": True, "backend": backend, **options})
    assert nsa_sel.explain(**arguments) == expected
    before = counted(nsa_sel.stats())
    result = nsa_sel.selection_attention(**arguments)
    out, lse = result if isinstance(result, tuple) else (result, None)
    after = counted(nsa_sel.stats())
    ran = {key: count - before.get(key, 0) for key, count in after.items() if count != before.get(key, 0)}
    assert ran == {(expected.backend, expected.reason): 1}, f"expected {expected} to run once, got {ran}"
    return out, lse


def _public(name: str, device: str, backend: str, reason: str) -> Callable[..., Result]:
    expected = nsa_sel.Decision(name, reason)

    def run(inputs: Inputs, **options: Any) -> Result:
        return run_public(inputs, device, backend, expected, **options)

    return run


def no_gpu() -> str | None:
    """Say that there is no GPU here, or None."""
    return None if torch.cuda.is_available() else "no CUDA device on this machine"


def no_kernels() -> str | None:
    """Say why the compiled kernels cannot run here, or None."""
    build = nsa_sel.build_info()
    return no_gpu() or (None if build["kernels"] else f"this build has no kernels: {build['reason']}")


def kernel_cannot(case: Case) -> str | None:
    """Say why the kernel does not take a case by contract, or None."""
    if case.dtype not in HALF:
        return f"the kernel takes fp16 and bf16, not {case.dtype}"
    if (case.Dk, case.Dv) not in KERNEL_DIMS:
        return f"no kernel for Dk={case.Dk}, Dv={case.Dv}"
    return None


def _takes_all(case: Case) -> str | None:
    return None


def no_triton() -> str | None:
    """Say why Triton's kernels cannot run on a GPU here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return no_gpu() or ("TRITON_INTERPRET=1 is set" if _interpreting() else None)


def no_triton_interpreter() -> str | None:
    """Say why Triton's kernels cannot be interpreted here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not _interpreting():
        return "TRITON_INTERPRET=1 is not set"
    return triton.interpreter_fault()


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _interpreted(inputs: Inputs, **options: Any) -> Result:
    """Interpret a kernel; long caches by large tiles, because the interpreter takes as long for a small one."""
    with triton.using(triton.Config(block_tokens=256 if inputs.k.shape[2] > 2048 else 64)):
        return run_public(inputs, "cpu", "triton", nsa_sel.Decision("triton", "backend='triton'"), **options)


def triton_cannot(case: Case) -> str | None:
    """Say why the Triton backend does not take a case by contract, or None: it takes all dims."""
    return None if case.dtype in HALF else f"the kernel takes fp16 and bf16, not {case.dtype}"


def _host_run(schedule: int, device: host_run.Device) -> Callable[..., Result]:
    """The kernel's own source on the CPU: a HostRun can come from nowhere else, and it must be without findings."""

    def run(inputs: Inputs, **options: Any) -> Result:
        arguments = inputs.to("cpu").arguments(**{"return_lse": True, **options})
        result = host_run.selection_attention(**arguments, schedule=schedule, options=host_run.Options(device=device))
        assert isinstance(result, host_run.HostRun)
        assert result.findings == []
        if result.out.numel():
            assert result.counters["ops"]["STG"].requests > 0, "nothing was stored by the kernel"
        assert (result.lse is not None) == arguments["return_lse"]
        return result.out, result.lse

    return run


def _no_host_run() -> str | None:
    return None if shutil.which("g++") else "no g++ to compile the kernel for the CPU"


BACKENDS: tuple[BackendUnderTest, ...] = (
    BackendUnderTest("sdpa", lambda: None, _takes_all, _public("sdpa", "cpu", "sdpa", "backend='sdpa'")),
    BackendUnderTest("auto-on-cpu", lambda: None, _takes_all, _public("sdpa", "cpu", "auto", "tensors on cpu")),
    BackendUnderTest(
        "sdpa-on-gpu", no_gpu, _takes_all, _public("sdpa", "cuda", "sdpa", "backend='sdpa'"), device="cuda"
    ),
    BackendUnderTest("host-run-sm80", _no_host_run, kernel_cannot, _host_run(0, host_run.Device())),
    BackendUnderTest("host-run-sm90", _no_host_run, kernel_cannot, _host_run(1, mutation.H200)),
    BackendUnderTest(
        "cuda", no_kernels, kernel_cannot, _public("cuda", "cuda", "cuda", "backend='cuda'"), device="cuda"
    ),
    BackendUnderTest("triton-interpreted", no_triton_interpreter, triton_cannot, _interpreted),
    BackendUnderTest(
        "triton", no_triton, triton_cannot, _public("triton", "cuda", "triton", "backend='triton'"), device="cuda"
    ),
)


def backend(name: str) -> BackendUnderTest:
    """Return a backend by its name."""
    return next(b for b in BACKENDS if b.name == name)
