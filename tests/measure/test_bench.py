"""The microbenchmark's parts: proof of what ran, contestants that fail, oracle, clock and ceiling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import nsa_sel
from nsa_sel.measure import schema
from nsa_sel.measure.run import clock
from nsa_sel.measure.run.bench import Results, run_bench
from nsa_sel.measure.run.ceiling import measure_ceiling
from nsa_sel.measure.run.contestants import Contestant, Gathered, Own
from nsa_sel.measure.run.inputs import Inputs, variants_of
from nsa_sel.measure.run.peers import PEERS, load_peers, peers_folder
from nsa_sel.measure.run.timed import Settings, errors
from nsa_sel.measure.run.workload import Workload, from_options, load_suite

CPU = torch.device("cpu")
WORKLOADS = from_options({"rows": [4], "h": [2], "Dk": [64], "L": [32], "dist": ["few", "mixed"], "G": 2, "S_kv": 256})


class Fake(Own):
    """A contestant under a name of this package which does what a test tells it to."""

    def __init__(self, name: str, does: Callable[[Inputs], torch.Tensor], refusal: str | None = None) -> None:
        super().__init__(name)
        self.does, self.refusal = does, refusal

    def refuses(self, inputs: Inputs) -> str | None:
        return self.refusal

    def prepare(self, inputs: Inputs) -> Callable[[], torch.Tensor]:
        return lambda: self.does(inputs)


def _sdpa(inputs: Inputs) -> torch.Tensor:
    return Own("sdpa").prepare(inputs)()


def _run(contestants: list[Contestant], workloads: list[Workload] = WORKLOADS, mode: str = "eager") -> Results:
    results = Results()
    settings = Settings(CPU, (mode,), seed=1, iters=2, warmup=1)
    done = list(run_bench(workloads, contestants, settings, results))
    assert done == [workload.name for workload in workloads]
    return results


def test_a_fallback_under_the_kernels_name_says_so_and_is_not_compared() -> None:
    """What once decided on invalid data: the benchmark timed the fallback against itself."""
    results = _run([Fake("cuda", _sdpa), Own("sdpa")])
    for row in results.rows:
        if row["backend"] == "cuda":
            assert (row["ran"], row["speedup"]) == ("sdpa", "")
        else:
            assert (row["ran"], row["speedup"]) == ("sdpa", "1")
    assert [one["reason"] for one in results.not_measured] == ["ran sdpa"] * len(WORKLOADS)


def test_a_baseline_that_did_not_run_compares_nothing() -> None:
    results = _run([Fake("sdpa", lambda inputs: torch.zeros(inputs.workload.B, 1, 2, 2, 64)), Gathered()])
    assert {row["speedup"] for row in results.rows} == {""}
    assert {row["ran"] for row in results.rows if row["backend"] == "sdpa"} == {""}


def test_a_contestant_that_raises_has_a_row_without_figures() -> None:
    def fails(inputs: Inputs) -> torch.Tensor:
        raise RuntimeError("no memory left")

    results = _run([Fake("cuda", fails), Own("sdpa")])
    rows = [row for row in results.rows if row["backend"] == "cuda"]
    assert len(rows) == len(WORKLOADS)
    assert all(row["ran"] == row["ms_median"] == row["mae"] == "" for row in rows)
    assert {one["reason"] for one in results.not_measured} == {"RuntimeError: no memory left"}


def test_an_unforeseen_error_is_not_swallowed() -> None:
    def broken(inputs: Inputs) -> torch.Tensor:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        _run([Fake("cuda", broken)])


def test_a_result_that_is_not_a_number_is_no_parity() -> None:
    def nan(inputs: Inputs) -> torch.Tensor:
        return torch.full_like(_sdpa(inputs), float("nan"))

    results = _run([Fake("sdpa", nan)])
    assert {row["mae"] for row in results.rows} == {"nan"}
    assert len(results.parity_failures) == len(WORKLOADS)


def test_a_peer_that_refuses_has_no_row_and_a_reason() -> None:
    class Peer(Fake):
        pass

    results = _run([Peer("flashinfer", _sdpa, refusal="takes blocks alone"), Own("sdpa")])
    assert {row["backend"] for row in results.rows} == {"sdpa"}
    assert {(one["backend"], one["reason"]) for one in results.not_measured} == {("flashinfer", "takes blocks alone")}


def test_a_peer_that_calls_this_package_is_no_peer() -> None:
    results = _run([Fake("flashinfer", _sdpa), Own("sdpa")])
    assert {row["backend"] for row in results.rows} == {"sdpa"}
    assert {one["reason"] for one in results.not_measured} == {"ran sdpa"}


def test_a_peer_that_computes_something_else_is_not_compared() -> None:
    def zeros(inputs: Inputs) -> torch.Tensor:
        w = inputs.workload
        return torch.zeros(w.B, w.S, w.G, w.h, w.Dv)

    results = _run([Fake("fla", zeros), Own("sdpa")])
    assert {row["backend"] for row in results.rows} == {"sdpa"}
    assert all("computed something else" in one["reason"] for one in results.not_measured)
    assert results.parity_failures == []  # of this package


def test_own_backend_is_forced() -> None:
    inputs = variants_of(WORKLOADS[0], 0, CPU, 0, 1 << 30)[0]
    reason = Own("cuda").refuses(inputs)
    assert reason is not None
    assert "cuda" in reason
    with pytest.raises(RuntimeError):
        Own("cuda").prepare(inputs)()
    assert Own("sdpa").refuses(inputs) is None
    assert "interpreter" in (Own("triton").refuses(inputs) or "")  # also where it would take them


def test_gathered_bound_computes_the_same() -> None:
    for workload in load_suite("ci"):
        inputs = variants_of(workload, 0, CPU, 0, 1 << 30)[0]
        bound, packed = Gathered().prepare(inputs)(), _sdpa(inputs)
        assert bound.shape == packed.shape
        assert (bound.float() - packed.float()).abs().max() < 0.02
    nsa_sel.reset_stats()
    Gathered().prepare(inputs)()
    assert nsa_sel.stats() == {}


def test_errors_are_those_of_the_sampled_rows() -> None:
    out = torch.zeros(3, 1, 2, 4, 8)
    out[2, 0, 1] = 0.5
    assert errors(out, torch.zeros(2, 4, 8, dtype=torch.float64), [(0, 0, 0), (2, 0, 1)]) == (0.25, 0.5)
    out[0, 0, 0, 0, 0] = float("nan")
    assert np.isnan(errors(out, torch.zeros(1, 4, 8, dtype=torch.float64), [(0, 0, 0)])).all()


def test_workloads_that_do_not_fit_are_skipped_for_everyone() -> None:
    (huge,) = from_options({"rows": [4096], "L": [4096], "dist": ["few"], "G": 2, "S_kv": 16384})
    results = _run([Own("sdpa")], [huge])
    assert results.rows == []
    assert "are free" in results.skipped[huge.name]


@pytest.mark.parametrize("mode", ["graph", "streams2"])
def test_gpu_modes_are_refused_on_a_cpu(mode: str) -> None:
    with pytest.raises(clock.ModeError, match="needs a CUDA device"):
        clock.samples([lambda: None], mode, CPU, 1, 0)
    results = _run([Own("sdpa")], mode=mode)
    assert {(row["ran"], row["ms_median"], row["ceiling_gbps"]) for row in results.rows} == {("", "", "")}


def test_samples_are_milliseconds_per_call() -> None:
    import time

    found = clock.samples([lambda: time.sleep(0.004), lambda: time.sleep(0.008)], "eager", CPU, iters=5, warmup=1)
    assert len(found) == 5
    assert 6 <= clock.quantiles(found)[0] < 12


def test_quantiles_and_interval() -> None:
    values = list(np.random.default_rng(0).permutation(100).astype(float))
    assert clock.quantiles(values) == pytest.approx((49.5, 19.8, 79.2))
    assert clock.median_interval(values) == (39, 60)
    assert clock.median_interval([3.0]) == (3.0, 3.0)
    # Of many samples, about 95 % of the intervals must hold the true median.
    draws = np.random.default_rng(1).exponential(size=(400, 50))
    held = [low <= np.log(2) <= high for low, high in map(clock.median_interval, draws.tolist())]
    assert 0.92 <= np.mean(held) <= 0.995


def test_ceiling_reads_as_many_bytes() -> None:
    ceiling = measure_ceiling(1_000_000, 2, "eager", CPU, iters=3, warmup=1, memory=1 << 30)
    assert ceiling.read_bytes == 1_003_520  # rounded up to 4 KiB
    assert ceiling.reader == "torch.sum"
    assert ceiling.gbps == pytest.approx(ceiling.read_bytes / clock.quantiles(ceiling.samples)[0] / 1e6)
    assert measure_ceiling(1, 2, "eager", CPU, iters=1, warmup=0, memory=1).read_bytes == 4096


def test_peers_are_loaded_from_a_checkout_and_named_when_absent(tmp_path: Path) -> None:
    found, absent = load_peers(list(PEERS), None)
    assert found == []
    assert set(absent) == set(PEERS)
    (tmp_path / "fla.py").write_text(
        "class A:\n    name = 'fla'\n    def available(self): return None\ndef adapter(): return A()\n"
    )
    (tmp_path / "vllm.py").write_text(
        "class A:\n    name = 'vllm'\n    def available(self): return 'not installed'\ndef adapter(): return A()\n"
    )
    found, absent = load_peers(["fla", "vllm", "flex"], peers_folder(tmp_path))
    assert [peer.name for peer in found] == ["fla"]
    assert absent["vllm"] == "not installed"
    assert "no adapter" in absent["flex"]
    with pytest.raises(ValueError, match="peer: expected one of"):
        load_peers(["cutlass"], tmp_path)


def test_schema_is_as_documented() -> None:
    assert len(schema.BENCH_COLUMNS) == len(set(schema.BENCH_COLUMNS)) == 30
    assert len(schema.DECODE_COLUMNS) == 12
