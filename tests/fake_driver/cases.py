"""What the module does with a driver, each case in a process of its own: a function that returns, or raises."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections import Counter
from itertools import groupby

import pytest
import torch

import nsa_sel
from nsa_sel.backends import cuda
from nsa_sel.testing import Inputs, assert_matches_reference, make_inputs
from tests.fake_driver import driver as fake
from tests.fake_driver.driver import A100, H100, FakeDriver, cpu_tensors_on


def inputs(B: int = 1, tokens: int = 512, h: int = 4) -> Inputs:
    """Two KV groups with two spans each, the rest of the cache NaN."""
    half = tokens // 2
    ranges = torch.tensor([[3, 3 + half], [400, 400 + half]], dtype=torch.int32).expand(B, 1, 2, 2, 2).contiguous()
    return make_inputs(ranges=ranges, h=h, S_kv=1024)


def attend(call: Inputs, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the kernel by name and compare with the fp64 reference."""
    before = nsa_sel.stats().get("cuda", {}).get("backend='cuda'", 0)
    out, lse = nsa_sel.selection_attention(**call.arguments(backend="cuda", return_lse=True, **more))
    assert nsa_sel.stats()["cuda"]["backend='cuda'"] == before + 1
    assert_matches_reference(out, lse, call)
    return out, lse


def falls_back(reason: str, capability: int = 90, index: int = 0) -> None:
    """'auto' takes packed SDPA, says why once, and is right; forced, the kernel's path raises the reason."""
    call = inputs(tokens=64)
    with cpu_tensors_on(capability, index):
        decision = nsa_sel.explain(**call.arguments())
        assert decision.backend == "sdpa", decision
        assert reason in decision.reason, decision
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            out, lse = nsa_sel.selection_attention(**call.arguments(return_lse=True))
        assert [decision.reason in str(warning.message) for warning in warned] == [True]
        assert_matches_reference(out, lse, call)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            nsa_sel.selection_attention(**call.arguments())
        assert nsa_sel.stats() == {"sdpa": {decision.reason: 2}}
        with pytest.raises(nsa_sel.BackendError) as forced:
            nsa_sel.selection_attention(**call.arguments(backend="cuda"))
        assert decision.reason in str(forced.value)


# ---- Launches, computed by the kernel's own source ------------------------------------------------------------------


def whole_rows_run_on_a_driver_of_cuda_12_0() -> None:
    driver = FakeDriver(version=12000, **(H100 | {"sm_count": 2}))
    driver.emulate()
    assert driver.record() == []  # nothing was asked of it at import
    with cpu_tensors_on(stream=11):
        attend(inputs(B=8, tokens=64))
    (launch,) = driver.launches()
    assert launch["kernel"] == "nsa_sel_decode_bfloat16_64x64_h16"
    assert (launch["device"], launch["cluster"], launch["stream"]) == ("0", "1", "11")
    assert "image machine code sm_90 ABI 7" in driver.record()


def clusters_merge_their_splits() -> None:
    driver = FakeDriver(**H100)
    driver.emulate()
    with cpu_tensors_on():
        attend(inputs())
    (launch,) = driver.launches()
    assert int(launch["cluster"]) > 1
    assert int(launch["grid"]) == 2 * int(launch["cluster"])


def the_combine_kernel_stands_behind_the_decode_kernel() -> None:
    driver = FakeDriver(**A100)
    driver.emulate()
    with cpu_tensors_on(80):
        attend(inputs())
    decode, combine = driver.launches()
    assert decode["kernel"] == "nsa_sel_decode_bfloat16_64x64_h16"
    assert combine["kernel"] == "nsa_sel_combine_bfloat16"
    assert (decode["cluster"], decode["programmatic"], combine["programmatic"]) == ("1", "0", "0")
    assert "image machine code sm_80 ABI 7" in driver.record()


def batch_invariant_rows_do_not_depend_on_the_batch() -> None:
    driver = FakeDriver(**H100)
    driver.emulate()
    many = inputs(B=3)
    alone = Inputs(**{**many.arguments(), "q": many.q[:1], "k": many.k[:1], "v": many.v[:1], "ranges": many.ranges[:1]})
    with cpu_tensors_on():
        out, lse = attend(many, batch_invariant=True)
        alone_out, alone_lse = attend(alone, batch_invariant=True)
    assert torch.equal(out[:1], alone_out)
    assert torch.equal(lse[:1], alone_lse)
    assert [launch["programmatic"] for launch in driver.launches() if "combine" in launch["kernel"]] == ["1", "1"]


def two_devices_have_modules_of_their_own() -> None:
    driver = FakeDriver(devices=2)
    driver.set(device=0, **H100)
    driver.set(device=1, **A100)
    driver.emulate()
    for index, capability in ((0, 90), (1, 80), (0, 90)):
        with cpu_tensors_on(capability, index):
            attend(inputs())
    assert [device for device, _ in groupby(launch["device"] for launch in driver.launches())] == ["0", "1", "0"]
    record = driver.record()
    assert {"image machine code sm_90 ABI 7", "image machine code sm_80 ABI 7"} <= set(record)
    assert max(Counter(line for line in record if line.startswith("cuModuleGetFunction")).values()) == 1


def threads_load_a_kernel_once() -> None:
    driver = FakeDriver(**H100)
    call, failures = inputs(), []
    gate = threading.Barrier(8)

    def work() -> None:
        gate.wait()
        try:
            nsa_sel.selection_attention(**call.arguments(backend="cuda"))
        except BaseException as error:
            failures.append(error)

    with cpu_tensors_on():
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert len(driver.launches()) == 8
    assert driver.record().count("cuInit") == 1
    assert sum(line.startswith("cuModuleLoadData") for line in driver.record()) == 2  # decode, combine


def newer_gpus_run_what_the_driver_compiles_from_ptx() -> None:
    driver = FakeDriver(version=12090, **(H100 | {"capability": 100}))
    driver.emulate()
    with cpu_tensors_on(100):
        attend(inputs())
    assert "image PTX 8.8" in driver.record()


def minor_versions_run_the_newest_code_that_is_not_newer() -> None:
    driver = FakeDriver(**(A100 | {"capability": 87}))
    driver.emulate()
    with cpu_tensors_on(87):
        attend(inputs())
    assert "image machine code sm_86 ABI 7" in driver.record()


# ---- Captures -------------------------------------------------------------------------------------------------------


def the_very_first_call_may_be_captured() -> None:
    driver = FakeDriver(version=12030, capturing=1, **H100)
    driver.emulate()
    with cpu_tensors_on():
        attend(inputs(), batch_invariant=True)
    record = driver.record()
    assert [line for line in record if "broke the capture" in line] == []
    assert "cuModuleLoadData device 0 relaxed" in record
    assert [launch["programmatic"] for launch in driver.launches()] == ["0", "1"]


def older_drivers_capture_without_the_programmatic_attribute() -> None:
    driver = FakeDriver(version=12020, capturing=1, **H100)
    with cpu_tensors_on():
        nsa_sel.selection_attention(**inputs().arguments(backend="cuda", batch_invariant=True))
        assert [launch["programmatic"] for launch in driver.launches()] == ["0", "0"]
        driver.set(capturing=0)
        nsa_sel.selection_attention(**inputs().arguments(backend="cuda", batch_invariant=True))
    assert [launch["programmatic"] for launch in driver.launches()] == ["0", "0", "0", "1"]


# ---- Forks ----------------------------------------------------------------------------------------------------------


def a_fork_after_first_use_says_so() -> None:
    driver = FakeDriver(**H100)
    with cpu_tensors_on():
        nsa_sel.selection_attention(**inputs().arguments(backend="cuda"))
        child = os.fork()
        if child == 0:
            try:
                nsa_sel.selection_attention(**inputs().arguments())
            except RuntimeError as error:
                os._exit(0 if "before this process was forked" in str(error) and "spawn" in str(error) else 1)
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(driver.launches()) == 1


# ---- Failures -------------------------------------------------------------------------------------------------------


def no_driver() -> None:
    falls_back("no NVIDIA driver: libcuda.so.1")


def a_driver_of_cuda_11_8() -> None:
    FakeDriver(version=11080, **H100)
    falls_back("expected an NVIDIA driver for CUDA 12.0 (525) or newer, got one for CUDA 11.8")


def a_driver_that_does_not_start() -> None:
    FakeDriver(**H100).fail("cuInit", 999)
    falls_back("the NVIDIA driver does not start: driver error 999")


def a_driver_without_a_function() -> None:
    FakeDriver(**H100).miss("cuLaunchKernelEx")
    falls_back("the NVIDIA driver (CUDA 12.0) has no cuLaunchKernelEx")


def ptx_newer_than_the_driver() -> None:
    FakeDriver(version=12000, **(H100 | {"capability": 120}))
    falls_back("CUDA_ERROR_UNSUPPORTED_PTX_VERSION", 120)


def no_image_for_the_gpu() -> None:
    FakeDriver(**(A100 | {"capability": 75}))
    falls_back("no kernel compiled for compute capability 7.5", 75)


def an_image_of_other_code_than_the_driver_takes() -> None:
    FakeDriver(**H100).fail("cuModuleLoadData", fake.NO_BINARY)
    falls_back("nsa_sel_decode_bfloat16_64x64_h16 on device 0 was not loaded: CUDA_ERROR_NO_BINARY_FOR_GPU")


def an_image_that_is_refused() -> None:
    FakeDriver(**H100).fail("cuModuleLoadData", fake.INVALID_IMAGE)
    falls_back("was not loaded: CUDA_ERROR_INVALID_IMAGE")


def a_symbol_that_is_missing() -> None:
    FakeDriver(**H100).fail("cuModuleGetFunction", fake.NOT_FOUND)
    falls_back("nsa_sel_decode_bfloat16_64x64_h16 on device 0 was not found: CUDA_ERROR_NOT_FOUND")


def no_context_for_want_of_memory() -> None:
    FakeDriver(**H100).fail("cuDevicePrimaryCtxRetain", fake.OUT_OF_MEMORY)
    falls_back("device 0: no context: CUDA_ERROR_OUT_OF_MEMORY")


def no_memory_while_loading_is_remembered_until_routing_is_refreshed() -> None:
    driver = FakeDriver(**H100)
    driver.emulate()
    driver.fail("cuModuleLoadData", fake.OUT_OF_MEMORY)
    falls_back("was not loaded: CUDA_ERROR_OUT_OF_MEMORY")
    assert sum(line.startswith("cuModuleLoadData") for line in driver.record()) == 1
    driver.mend("cuModuleLoadData")
    with cpu_tensors_on():
        assert nsa_sel.explain(**inputs().arguments()).backend == "sdpa"
        nsa_sel.refresh_routing()
        assert nsa_sel.explain(**inputs().arguments()) == ("cuda", "not measured here")
        attend(inputs())


def a_combine_kernel_that_is_missing_bars_its_dtype() -> None:
    FakeDriver(**H100).fail("cuModuleLoadData", fake.INVALID_IMAGE, after=1)
    falls_back("nsa_sel_combine_bfloat16 on device 0 was not loaded")


def a_launch_that_is_refused_falls_back_and_is_not_tried_again() -> None:
    driver = FakeDriver(**H100)
    driver.fail("cuLaunchKernelEx", fake.OUT_OF_RESOURCES)
    call = inputs()
    with cpu_tensors_on():
        with pytest.warns(RuntimeWarning, match="refused at launch"):
            out, lse = nsa_sel.selection_attention(**call.arguments(return_lse=True))
        assert_matches_reference(out, lse, call)
        assert "was refused at launch on this device before" in nsa_sel.explain(**call.arguments()).reason


def a_sticky_error_is_raised() -> None:
    FakeDriver(**H100).fail("cuLaunchKernelEx", fake.ILLEGAL_ADDRESS)
    with cpu_tensors_on(), pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS") as raised:
        nsa_sel.selection_attention(**inputs().arguments())
    assert not isinstance(raised.value, nsa_sel.KernelLaunchError)
    assert nsa_sel.stats() == {}


def a_sticky_error_while_loading_is_raised() -> None:
    FakeDriver(**H100).fail("cuModuleLoadData", fake.ILLEGAL_ADDRESS)
    with cpu_tensors_on(), pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        nsa_sel.selection_attention(**inputs().arguments())


def info_shows_the_driver_and_why_it_does_not_serve() -> None:
    from typer.testing import CliRunner

    from nsa_sel.cli.app import app

    FakeDriver(version=11080)
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0, result.output
    assert "expected an NVIDIA driver for CUDA 12.0 (525) or newer" in json.loads(result.output)["driver"]


def the_planner_can_ask_for_the_clusters_that_fit() -> None:
    FakeDriver(clusters=13, **H100)
    shape = {"grid": 8, "block": 192, "smem_bytes": 1024, "cluster": 8}
    assert cuda.core.max_active_clusters(0, 0, **shape) == 13
