"""The microbenchmark's parts: proof of what ran, contestants that fail, oracle, clock and ceiling."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nsa_sel
from nsa_sel.measure import schema
from nsa_sel.measure.run import ceiling, clock, race
from nsa_sel.measure.run.bench import Results, run_bench
from nsa_sel.measure.run.contestants import Contestant, contestants, own
from nsa_sel.measure.run.inputs import Inputs, variants_of
from nsa_sel.measure.run.peers import PEERS, Peer, load_peers, peers_folder
from nsa_sel.measure.run.race import Settings, errors
from nsa_sel.measure.run.workload import Workload, from_options, load_suite

CPU = torch.device("cpu")
WORKLOADS = from_options({"rows": [4], "h": [2], "Dk": [64], "L": [32], "dist": ["few", "mixed"], "G": 2, "S_kv": 256})
SDPA = own("sdpa")
(GATHERED,) = contestants(["sdpa_gathered"])


def fake(name: str, does: Callable[[Inputs], Any]) -> Contestant:
    """Return a contestant under a name of this package which does what a test tells it to."""
    return Contestant(name, lambda inputs: lambda: does(inputs))


def raising(error: Exception) -> Callable[[Inputs], Any]:
    def does(inputs: Inputs) -> torch.Tensor:
        raise error

    return does


def sdpa(inputs: Inputs) -> torch.Tensor:
    out: torch.Tensor = SDPA.prepare(inputs)()
    return out


def measured(*who: Contestant, workloads: list[Workload] = WORKLOADS, mode: str = "eager") -> Results:
    results = Results()
    done = list(run_bench(workloads, who, [], Settings(CPU, (mode,), seed=1, iters=2, warmup=1), results))
    assert done == [workload.name for workload in workloads]
    return results


def cells(results: Results, backend: str, *columns: str) -> set[Any]:
    found = [tuple(row[c] for c in columns) for row in results.rows if row["backend"] == backend]
    return {one[0] if len(columns) == 1 else one for one in found}


def test_a_fallback_under_the_kernels_name_says_so_and_is_not_compared() -> None:
    """What once decided on invalid data: the benchmark timed the fallback against itself."""
    results = measured(fake("cuda", sdpa), SDPA)
    assert cells(results, "cuda", "ran", "speedup") == {("sdpa", "")}
    assert cells(results, "sdpa", "ran", "speedup") == {("sdpa", "1")}
    assert [one["reason"] for one in results.not_measured] == ["ran sdpa"] * len(WORKLOADS)


def test_a_baseline_that_did_not_run_compares_nothing() -> None:
    results = measured(fake("sdpa", lambda inputs: torch.zeros(inputs.workload.B, 1, 2, 2, 64)), GATHERED)
    assert {row["speedup"] for row in results.rows} == {""}
    assert cells(results, "sdpa", "ran") == {""}


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        (raising(RuntimeError("no memory left")), "RuntimeError: no memory left"),
        (raising(KeyError("a bug")), "KeyError: 'a bug'"),
        # Triton's errors derive from nothing in particular; one of them once ended the whole run.
        (raising(type("OutOfResources", (Exception,), {})()), "OutOfResources: "),
        (lambda inputs: sdpa(inputs)[..., :8], "expected [B, S, G, 2, 64]"),
    ],
)
def test_whatever_a_contestant_raises_is_its_own_row_without_figures(does: Any, reason: str) -> None:
    results = measured(fake("cuda", does), SDPA)
    assert cells(results, "cuda", "ran", "ms_median", "mae") in ({("", "", "")},)
    assert cells(results, "sdpa", "ran") == {"sdpa"}
    assert len(results.rows) == 2 * len(WORKLOADS)
    assert all(reason in one["reason"] for one in results.not_measured)


def test_contestants_take_turns() -> None:
    """One after another, a clock that rises in between would make the last one fast."""
    order: list[str] = []

    def noted(name: str) -> Contestant:
        return fake(name, lambda inputs: order.append(name) or sdpa(inputs))  # type: ignore[func-returns-value]

    measured(noted("fla"), noted("vllm"), workloads=WORKLOADS[:1])
    assert [name for name, _ in itertools.groupby(order)][-4:] == ["fla", "vllm", "fla", "vllm"]


def test_a_broken_cuda_context_ends_the_run_and_leaves_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "_synchronize", raising(RuntimeError("an illegal memory access was encountered")))
    results = Results()
    who = [SDPA, fake("cuda", raising(RuntimeError("launch failed"))), GATHERED]
    with pytest.raises(race.ContextLostError, match="cuda broke the CUDA context"):
        list(run_bench(WORKLOADS, who, [], Settings(CPU, ("eager",), iters=2, warmup=1), results))
    assert [(row["backend"], row["ran"]) for row in results.rows] == [("sdpa", ""), ("cuda", ""), ("sdpa_gathered", "")]
    reasons = {one["backend"]: one["reason"] for one in results.not_measured}
    assert reasons["cuda"] == "RuntimeError: launch failed"
    assert "cuda broke the CUDA context" in reasons["sdpa"]


def test_clocks_are_read_around_a_case_and_drift_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read = [1980, 1700, 1980, 1980, 1500, 1400, 1500, 1400, 1500, 1400]
    monkeypatch.setattr(race, "clocks", lambda device: {"sm": read.pop(0), "mem": 2619})
    results = measured(SDPA)
    assert [(one["before"]["sm"], one["after"]["sm"]) for one in results.clocks] == [(1980, 1980), (1500, 1400)]
    assert read == []  # the second case was tried three times, and what remains is there for the judge


def test_a_result_that_is_not_a_number_is_no_parity() -> None:
    results = measured(fake("sdpa", lambda inputs: torch.full_like(sdpa(inputs), float("nan"))))
    assert cells(results, "sdpa", "mae") == {"nan"}
    assert len(results.parity_failures) == len(WORKLOADS)


# ---- Peers, each in a process of its own -----------------------------------------------------------------------------

ADAPTER = """
import os, sys, time
from nsa_sel.measure.run.contestants import own, prepared
MODULE = "torch"
def refuses(inputs): return {refuses!r}
def prepare(inputs):
    run, right = own("sdpa").prepare(inputs), prepared(inputs)
    print("a library that talks")
    def call():
        {does}
    return call
"""


def with_peer(
    folder: Path, does: str, refuses: str | None = None, anchor_off: float = 1e9, seconds: float = 240
) -> Results:
    (folder / "fla.py").write_text(ADAPTER.format(does=does, refuses=refuses))
    settings = Settings(CPU, ("eager",), seed=1, iters=2, warmup=1, anchor_off=anchor_off)
    adapters, absent = load_peers(["fla"], folder)
    assert not absent
    peer, results = Peer("fla", folder, settings, seconds), Results()
    try:
        list(run_bench(WORKLOADS[:1], [SDPA], [(adapters[0], peer)], settings, results))
    finally:
        peer.close()
    assert cells(results, "sdpa", "ran") == {"sdpa"}  # nothing took it along
    return results


def test_a_peer_is_timed_in_its_own_process_beside_an_anchor(tmp_path: Path) -> None:
    results = with_peer(tmp_path, "return right()")
    (mine,) = [row for row in results.rows if row["backend"] == "fla"]
    assert mine["ran"] == "fla"
    assert 0 < float(mine["mae"]) < 1e-3
    assert float(mine["speedup"]) > 0 < float(mine["ceiling_gbps"])
    (anchor,) = results.anchors
    assert anchor["backend"] == "fla"
    assert anchor["anchor_ms"] > 0 < anchor["sdpa_ms"]
    assert results.not_measured == []


@pytest.mark.parametrize(
    ("does", "reason", "more"),
    [
        ("os.abort()", r"its process ended \(exit status -6\)", {}),
        ("print('illegal address', file=sys.stderr, flush=True); os._exit(7)", "status 7.*illegal address", {}),
        ("raise KeyError('BLOCK')", "KeyError: 'BLOCK'", {}),
        ("return right()[0]", r"expected \[B, S, G, 2, 64\]", {}),
        ("return right() * 0", "computed something else: MAE", {}),
        ("return run()", "ran sdpa", {}),  # a peer that calls this package is no peer
        ("time.sleep(60)", r"did not answer within 0\.5 s", {"seconds": 0.5}),
        ("return right()", "its process times sdpa .* from this one", {"anchor_off": 1e-9}),
    ],
)
def test_a_peers_failure_is_a_row_and_takes_nothing_along(
    tmp_path: Path, does: str, reason: str, more: dict[str, float]
) -> None:
    results = with_peer(tmp_path, does, **more)
    assert [(row["ran"] == "fla", row["speedup"]) for row in results.rows if row["backend"] == "fla"] == [(False, "")]
    (absence,) = results.not_measured
    assert absence["backend"] == "fla"
    assert re.search(reason, absence["reason"], re.DOTALL), absence
    assert results.parity_failures == []  # of this package


def test_a_peer_that_refuses_has_no_row_and_a_reason(tmp_path: Path) -> None:
    results = with_peer(tmp_path, "return right()", refuses="takes blocks alone")
    assert {row["backend"] for row in results.rows} == {"sdpa"}
    assert {(one["backend"], one["reason"]) for one in results.not_measured} == {("fla", "takes blocks alone")}


def test_peers_are_loaded_and_named_when_absent(tmp_path: Path) -> None:
    assert load_peers(list(PEERS), None)[0] == []
    assert set(load_peers(list(PEERS), None)[1]) == set(PEERS)
    more = {
        "fla": "",
        "vllm": "available = lambda: 'too old'",
        "flashinfer": "raise OSError('x')",
        "xunhaolai": "MODULE = 'x1'",
    }
    for name, text in more.items():
        (tmp_path / f"{name}.py").write_text(f"MODULE = 'torch'\nprepare = refuses = print\n{text}\n")
    found, absent = load_peers([*more, "flex"], peers_folder(tmp_path))
    assert [peer.name for peer in found] == ["fla"]
    assert absent == {"vllm": "too old", "flashinfer": "OSError: x", "xunhaolai": "x1 is not installed"} | {
        "flex": f"no adapter {tmp_path / 'flex.py'}"
    }
    with pytest.raises(ValueError, match="peer: expected one of"):
        load_peers(["cutlass"], tmp_path)


def test_no_adapter_is_imported_from_the_current_folder_or_above_site_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter is code: it may come from --peers or from the checkout whose sources the package is, and no other."""
    for root in (tmp_path, tmp_path / "venv"):
        (root / "benchmarks" / "peers").mkdir(parents=True)
        (root / "benchmarks" / "peers" / "flashinfer.py").write_text("raise SystemExit('foreign code')")
        (root / "pyproject.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    assert peers_folder() == Path(__file__).parents[2] / "benchmarks" / "peers"
    for place in ("venv/lib/python3.12/site-packages/nsa_sel", "venv/nsa_sel"):
        package = tmp_path / place
        package.mkdir(parents=True)
        monkeypatch.setattr(nsa_sel, "__file__", str(package / "__init__.py"))
        assert peers_folder() is None


# ---- Contestants, errors, clock, ceiling -----------------------------------------------------------------------------


def test_own_backend_is_forced() -> None:
    inputs = variants_of(WORKLOADS[0], 0, CPU, 0, 1 << 30)[0]
    assert "cuda" in (own("cuda").refuses(inputs) or "")
    with pytest.raises(RuntimeError):
        own("cuda").prepare(inputs)()
    assert SDPA.refuses(inputs) is None
    assert "interpreter" in (own("triton").refuses(inputs) or "")  # also where it would take them


@pytest.mark.parametrize("name", ["sdpa_gathered", "sdpa_prepared"])
def test_what_is_compared_with_computes_the_same_without_this_package(name: str) -> None:
    for workload in load_suite("ci"):
        inputs = variants_of(workload, 0, CPU, 0, 1 << 30)[0]
        packed = sdpa(inputs)
        nsa_sel.reset_stats()
        found = contestants([name])[0].prepare(inputs)()
        assert nsa_sel.stats() == {}
        assert found.shape == packed.shape
        assert (found.float() - packed.float()).abs().max() < 0.02


def test_errors_are_those_of_the_sampled_rows() -> None:
    out = torch.zeros(3, 1, 2, 4, 8)
    out[2, 0, 1] = 0.5
    assert errors(out, torch.zeros(2, 4, 8, dtype=torch.float64), [(0, 0, 0), (2, 0, 1)]) == (0.25, 0.5)
    out[0, 0, 0, 0, 0] = float("nan")
    assert np.isnan(errors(out, torch.zeros(1, 4, 8, dtype=torch.float64), [(0, 0, 0)])).all()


def test_workloads_that_do_not_fit_are_skipped_for_everyone() -> None:
    (huge,) = from_options({"rows": [4096], "L": [4096], "dist": ["few"], "G": 2, "S_kv": 16384})
    results = measured(SDPA, workloads=[huge])
    assert results.rows == []
    assert "are free" in results.skipped[huge.name]


@pytest.mark.parametrize("mode", ["graph", "streams2"])
def test_gpu_modes_are_refused_on_a_cpu(mode: str) -> None:
    with pytest.raises(clock.ModeError, match="needs a CUDA device"):
        clock.samples([lambda: None], mode, CPU, 1, 0)
    assert cells(measured(SDPA, mode=mode), "sdpa", "ran", "ms_median", "ceiling_gbps") == {("", "", "")}


def test_samples_are_milliseconds_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def takes(seconds: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal now
            now += seconds

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    found = clock.samples([takes(0.004), takes(0.008)], "eager", CPU, iters=5, warmup=1)
    assert found == pytest.approx([6.0] * 5)


def test_quantiles_and_interval() -> None:
    values = list(np.random.default_rng(0).permutation(100).astype(float))
    assert clock.quantiles(values) == pytest.approx((49.5, 19.8, 79.2))
    assert clock.median_interval(values) == (39, 60)
    assert clock.median_interval([3.0]) == (3.0, 3.0)
    # Of many samples, about 95 % of the intervals must hold the true median.
    draws = np.random.default_rng(1).exponential(size=(400, 50))
    held = [low <= np.log(2) <= high for low, high in map(clock.median_interval, draws.tolist())]
    assert 0.92 <= np.mean(held) <= 0.995


def test_ceiling_reads_as_many_bytes_by_the_fastest_of_several_block_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    name, read_bytes, calls = ceiling.fastest_reader(1_000_000, 2, "eager", CPU, memory=1 << 30)
    assert (name, read_bytes, len(calls)) == ("torch.sum", 1_003_520, 2)  # rounded up to 4 KiB
    assert ceiling.fastest_reader(1, 2, "eager", CPU, memory=1)[1] == 4096
    # 64 blocks of 16 KB leave half of a large GPU idle at 1 MB: a sweep holds blocks of 1 KB to 64 KB
    monkeypatch.setattr(ceiling, "_triton_kernel", lambda: object())
    readers = [name for name in ceiling._readers(torch.device("cuda")) if name.startswith("triton")]
    assert readers == [f"triton, blocks of {block}" for block in (256, 512, 1024, 2048, 4096, 8192, 16384)]
    slow = {"slow": lambda _: lambda: None, "fast": lambda _: lambda: None, "broken": lambda buffer: {}["x"]}
    times = iter(([3.0, 2.0], [4.0, 1.0]))
    monkeypatch.setattr(ceiling, "_readers", lambda device: slow)
    monkeypatch.setattr(clock, "samples", lambda *_, **__: next(times))
    assert ceiling.fastest_reader(1, 2, "eager", CPU, memory=1)[0] == "fast"


def test_schema_is_as_documented() -> None:
    assert len(schema.BENCH_COLUMNS) == len(set(schema.BENCH_COLUMNS)) == 30
    assert len(schema.DECODE_COLUMNS) == 12
