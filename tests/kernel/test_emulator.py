"""The emulator of the host run: every planted fault is found, every right twin passes, under all schedules."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.host_run import build
from tests.host_run.faults.launcher import HERE, FaultRunner, library

# Fault -> the kinds of finding that tell it; each must show under schedule 0 or 1.
FAULTS = {
    "global_plain_oob": {"global-oob"},
    "global_load_oob": {"global-oob"},
    "global_readonly": {"readonly"},
    "global_uninit": {"uninit"},
    "global_misaligned": {"misaligned"},
    "shared_plain_oob": {"smem-oob"},
    "shared_oversize": {"smem-size"},
    "shared_overlap": {"smem-overlap"},
    "shared_uninit": {"uninit"},
    "ldmatrix_uninit": {"uninit"},
    "shared_misaligned": {"misaligned"},
    "missing_syncthreads": {"race"},
    "missing_syncthreads_before_reuse": {"race"},
    "missing_syncwarp": {"race"},
    "shuffle_is_no_fence": {"race"},
    "divergent_barrier": {"barrier-divergence"},
    "half_warp_barrier": {"deadlock"},
    "divergent_shuffle": {"mask", "deadlock"},
    "exited_lanes": {"mask"},
    "lane_outside_mask": {"mask"},
    "divergent_mma": {"divergent-collective"},
    "named_barrier_deadlock": {"deadlock"},
    "named_barrier_too_small": {"race", "barrier-count"},
    "named_barrier_half_warps": {"deadlock"},
    "named_barrier_disagreement": {"barrier-count"},
    "block_races": {"global-race"},
    "reads_other_block": {"global-race", "uninit"},
    "last_block_reduces": {"global-race"},
    "global_race_in_block": {"race"},
    "endless": {"step-limit"},
    "cp_async_without_wait": {"async-hazard"},
    "cp_async_wait_without_barrier": {"async-hazard"},
    "cp_async_at_exit": {"exit-in-flight"},
    "ring_no_full_wait": {"async-hazard"},
    "ring_wrong_parity": {"async-hazard", "uninit"},
    "ring_no_empty_wait": {"async-hazard", "race"},
    "ring_no_syncwarp": {"race"},
    "ring_plain_arrival": {"async-hazard"},
    "ring_count_too_high": {"deadlock"},
    "ring_count_too_low": {"async-hazard"},
    "waits_for_other_copy": {"async-hazard"},
    "waits_for_earlier_phase": {"race"},
    "phase_missed": {"deadlock"},
    "mbarrier_not_initialised": {"mbarrier"},
    "mbarrier_init_not_ordered": {"mbarrier"},
    "mbarrier_initialised_twice": {"mbarrier"},
    "mbarrier_overwritten": {"mbarrier"},
    "bulk_no_wait": {"async-hazard"},
    "bulk_wrong_bytes": {"deadlock"},
    "bulk_no_init_fence": {"proxy"},
    "bulk_no_proxy_fence": {"proxy"},
    "bulk_too_many_arrivals": {"mbarrier"},
    "bulk_lost_at_exit": {"exit-in-flight"},
    "remote_no_first_barrier": {"dsmem", "race"},
    "remote_exited_block": {"dsmem"},
    "remote_uninit": {"uninit"},
    "remote_reuse": {"race"},
    "remote_write_after_arrive": {"race"},
    "cluster_wait_without_arrive": {"cluster"},
    "cluster_deadlock": {"deadlock"},
    "dependent_read": {"griddep"},
    "dependent_read_after_barrier": {"griddep"},
    "dependent_overwrite": {"griddep"},
}
# Faults of local memory and arithmetic: AddressSanitizer and UBSan say so and end the process.
SANITIZED = {
    "signed_overflow": "signed integer overflow",
    "local_array": "stack-buffer-overflow",
    "shared_plain_oob": "use-after-poison",
}
SCHEDULES = (0, 1, 2)


@pytest.fixture(scope="module")
def faults() -> FaultRunner:
    """The planted faults, every plain access checked."""
    runner = FaultRunner(library("hook"))
    runner.emulator.set_step_limit(2_000_000)
    return runner


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found_and_its_twin_is_clean(faults: FaultRunner, name: str) -> None:
    found = {f.partition(":")[0] for schedule in (0, 1) for f in faults.run(name, True, schedule)}
    assert found & FAULTS[name], f"expected one of {FAULTS[name]}, found {found}"
    for schedule in SCHEDULES:
        assert faults.run(name, False, schedule) == []


# Faults that two detectors see, each from its side: both have to speak, so that neither hides the other's failure.
SIDES = {
    "missing_syncthreads_before_reuse": ["not ordered after a read by thread", "not ordered after the write by thread"],
    "remote_reuse": ["not ordered after a read by another block", "by a cluster barrier"],
    "remote_exited_block": ["which has exited", "may have exited"],
    "dependent_overwrite": ["read by the previous grid"],
    "bulk_wrong_bytes": ["128 threads (warp 0 1 2 3) in mbarrier_wait"],
}


@pytest.mark.parametrize("name", SIDES)
def test_both_sides_of_a_conflict_are_seen(faults: FaultRunner, name: str) -> None:
    text = "\n".join(finding for schedule in (0, 1) for finding in faults.run(name, True, schedule))
    for expected in SIDES[name]:
        assert expected in text


@pytest.mark.parametrize("schedule", [0, 1])
def test_a_missed_phase_hangs_whoever_runs_first(faults: FaultRunner, schedule: int) -> None:
    assert "deadlock" in "\n".join(faults.run("phase_missed", True, schedule))


def test_copies_land_late_or_early_by_schedule(faults: FaultRunner) -> None:
    results = []
    for schedule in (0, 1):
        faults.register()
        faults.emulator.reset(schedule, check=False)
        faults.launch("cp_async_without_wait", True)
        results.append(faults.out[:128].copy())
    assert np.isnan(results[0]).all()  # poisoned until somebody waits, and nobody does
    np.testing.assert_array_equal(results[1], np.arange(128))


def test_every_planted_fault_is_expected() -> None:
    source = "".join(path.read_text() for path in HERE.glob("*.cu"))
    planted = set(re.findall(r"NSA_SEL_FAULT\((\w+)", source)) | set(re.findall(r"int fault_(\w+)", source))
    assert planted == set(FAULTS) | set(SANITIZED)


def test_a_finding_names_the_line_of_a_plain_access(faults: FaultRunner) -> None:
    lines = (HERE / "synchronisation.cu").read_text().splitlines()
    write = next(i for i, line in enumerate(lines, 1) if "a[t] = p.in[t];" in line)
    read = next(i for i, line in enumerate(lines, 1) if "a[127 - t]" in line)
    text = "\n".join(faults.run("missing_syncthreads", True, 0))
    assert f"synchronisation.cu:{read}: " in text
    assert f"at synchronisation.cu:{write}" in text


def test_a_deadlock_tells_where_each_warp_waits_and_the_next_launch_runs(faults: FaultRunner) -> None:
    (text,) = faults.run("ring_count_too_high", True, 0)
    assert "warp 0) in mbarrier_wait at copies.cu" in text
    assert "warp 1) in mbarrier_wait at copies.cu" in text
    assert faults.run("ring_count_too_high", False, 0) == []
    assert faults.out[:32].sum() > 0


@pytest.mark.parametrize("name", ["ring_no_full_wait", "missing_syncthreads"])
def test_without_checks_the_results_stay_and_the_races_go_unseen(faults: FaultRunner, name: str) -> None:
    faults.run(name, False, 0)
    expected = faults.out.copy()
    faults.register()
    faults.emulator.reset(0, check=False)
    assert faults.launch(name, False) == []
    np.testing.assert_array_equal(faults.out, expected)
    faults.emulator.reset(1, check=False)
    assert "race" not in {f.partition(":")[0] for f in faults.launch(name, True)}


# ---- Mutation -------------------------------------------------------------------------------------------------------

RING_SYNCS = {"BAR", "MBAR_WAIT", "CP_ASYNC_ARRIVE", "WAIT", "WARPSYNC", "MBAR_ARRIVE"}


@pytest.mark.parametrize("schedule", [0, 1])
def test_every_synchronisation_of_a_ring_is_needed(faults: FaultRunner, schedule: int) -> None:
    faults.run("ring_no_syncwarp", False, schedule)
    sites = faults.emulator.sync_sites()
    assert {site.kind for site in sites} == RING_SYNCS
    for site in sites:
        assert site.file == "copies.cu"
        assert site.executions > 0
        faults.register()
        faults.emulator.reset(schedule)
        faults.emulator.drop(site.kind, site.file, site.line)
        found = faults.launch("ring_no_syncwarp", False)
        # Copies that have landed at once cannot be in flight at the end of their thread.
        assert bool(found) == (schedule == 0 or site.kind != "WAIT"), site
    assert faults.run("ring_no_syncwarp", False, schedule) == []  # a reset takes all drops back


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("remote_reuse", "CLUSTER"),
        ("dependent_read", "GRIDDEP"),
        ("last_block_reduces", "FENCE"),
        ("bulk_no_wait", "FENCE"),
    ],
)
def test_cluster_grid_and_fence_synchronisations_are_needed(faults: FaultRunner, name: str, kind: str) -> None:
    faults.run(name, False, 0)
    sites = [site for site in faults.emulator.sync_sites() if site.kind == kind]
    assert sites
    for site in sites:
        found = set()
        for schedule in (0, 1):
            faults.register()
            faults.counter[:] = 0
            faults.emulator.reset(schedule)
            faults.emulator.drop(site.kind, site.file, site.line)
            found |= set(faults.launch(name, False))
        assert found, site


def test_an_unknown_kind_cannot_be_dropped(faults: FaultRunner) -> None:
    with pytest.raises(ValueError, match="kind: expected a kind"):
        faults.emulator.drop("BARRIER", "copies.cu", 1)


# ---- Schedules, traces, streams -------------------------------------------------------------------------------------


def test_a_trace_keeps_the_order_of_events(faults: FaultRunner) -> None:
    faults.register()
    faults.emulator.reset(0, trace=True)
    assert faults.launch("ring_no_syncwarp", False) == []
    events = faults.emulator.trace()
    copies = [e for e in events if e.op == "LDGSTS"]
    assert [(e.buffer, e.offset, e.warp) for e in copies] == [("in", 512 * i, 0) for i in range(6)]
    loads = [i for i, e in enumerate(events) if e.op == "LDS"]
    assert len(loads) == 12
    # Two slots: the third tile is asked for only after both loads of the first.
    third = events.index(copies[2])
    assert sum(i < third for i in loads) >= 2
    faults.emulator.reset(0)
    assert faults.emulator.trace() == []


def _run_streams(faults: FaultRunner, scratches: list[np.ndarray], seed: int) -> list[np.ndarray]:
    outs = [np.full(128, np.nan, np.float32) for _ in scratches]
    faults.emulator.unregister_all()
    for i, (out, scratch) in enumerate(zip(outs, scratches, strict=True)):
        faults.emulator.register(f"out{i}", out, writable=True)
        faults.emulator.register(f"scratch{i}", scratch, writable=True)
    faults.emulator.reset(seed % 3)
    for i, (out, scratch) in enumerate(zip(outs, scratches, strict=True)):
        faults.emulator.begin_stream(i)
        for _ in range(2):  # the second call of a stream reuses its scratch
            faults.emulator.lib.stream_call(ctypes.c_void_p(out.ctypes.data), ctypes.c_void_p(scratch.ctypes.data))
        assert np.isnan(out).all()  # recorded, not run
    faults.emulator.run_streams(seed)
    return outs


def test_streams_with_their_own_scratch_do_not_disturb_each_other(faults: FaultRunner) -> None:
    for seed in range(3):
        outs = _run_streams(faults, [np.zeros(128, np.float32) for _ in range(3)], seed)
        assert faults.emulator.findings() == []
        for out in outs:
            np.testing.assert_array_equal(out, np.arange(128))


def test_streams_that_share_scratch_are_found(faults: FaultRunner) -> None:
    shared = np.zeros(128, np.float32)
    found = set()
    for seed in range(3):
        _run_streams(faults, [shared, shared], seed)
        found |= faults.emulator.finding_kinds()
    assert "stream-race" in found


# ---- Sanitizers -----------------------------------------------------------------------------------------------------


def _in_child(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LD_PRELOAD": build.sanitizer_preload(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, str(HERE / "run_one.py"), str(library("asan")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizers_find_what_the_emulator_cannot(name: str) -> None:
    result = _in_child("faulty", name)
    assert result.returncode != 0
    assert SANITIZED[name] in result.stderr


def test_sanitizers_pass_the_right_twins() -> None:
    result = _in_child("right", *SANITIZED)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == [f"{name} []" for name in SANITIZED]
