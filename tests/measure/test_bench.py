"""The microbenchmark's parts: proof of what ran, contestants that fail, oracle, clock and ceiling."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import nsa_sel
from nsa_sel.measure import schema
from nsa_sel.measure.run import ceiling, clock, race
from nsa_sel.measure.run.bench import Results, run_bench
from nsa_sel.measure.run.contestants import Contestant, Gathered, Own
from nsa_sel.measure.run.inputs import Inputs, variants_of
from nsa_sel.measure.run.peers import PEERS, Peer, load_peers, peers_folder
from nsa_sel.measure.run.race import Settings, errors
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
    done = list(run_bench(workloads, contestants, [], settings, results))
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


@pytest.mark.parametrize(
    "error", [KeyError("a bug"), AttributeError("gone"), type("OutOfResources", (Exception,), {})()]
)
def test_whatever_a_contestant_raises_is_its_own(error: Exception) -> None:
    """Triton's errors derive from nothing in particular; one of them once ended the whole run."""

    def fails(inputs: Inputs) -> torch.Tensor:
        raise error

    results = _run([Fake("triton", fails), Own("sdpa")])
    assert {row["ran"] for row in results.rows if row["backend"] == "triton"} == {""}
    assert {row["ran"] for row in results.rows if row["backend"] == "sdpa"} == {"sdpa"}
    assert {one["reason"].split(":")[0] for one in results.not_measured} == {type(error).__name__}


def test_a_result_of_another_shape_is_a_reason_and_no_comparison() -> None:
    results = _run([Fake("cuda", lambda inputs: _sdpa(inputs)[..., :8]), Own("sdpa")])
    assert {row["ran"] for row in results.rows if row["backend"] == "cuda"} == {""}
    assert all("expected [B, S, G, 2, 64]" in one["reason"] for one in results.not_measured)


def test_contestants_take_turns() -> None:
    """One after another, a clock that rises in between would make the last one fast."""
    order: list[str] = []

    def noted(name: str) -> Fake:
        return Fake(name, lambda inputs: order.append(name) or _sdpa(inputs))  # type: ignore[func-returns-value]

    _run([noted("fla"), noted("vllm")], WORKLOADS[:1])
    taken = [name for name, _ in itertools.groupby(order)]
    assert taken[-4:] == ["fla", "vllm", "fla", "vllm"]


def test_a_broken_cuda_context_ends_the_run_and_leaves_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def fails(inputs: Inputs) -> torch.Tensor:
        raise RuntimeError("launch failed")

    monkeypatch.setattr(race, "_synchronize", lost)
    results = Results()
    settings = Settings(CPU, ("eager",), iters=2, warmup=1)
    contestants = [Own("sdpa"), Fake("cuda", fails), Gathered()]
    with pytest.raises(race.ContextLostError, match="cuda broke the CUDA context"):
        list(run_bench(WORKLOADS, contestants, [], settings, results))
    assert [(row["backend"], row["ran"]) for row in results.rows] == [("sdpa", ""), ("cuda", ""), ("sdpa_gathered", "")]
    reasons = {one["backend"]: one["reason"] for one in results.not_measured}
    assert reasons["cuda"] == "RuntimeError: launch failed"
    assert "cuda broke the CUDA context" in reasons["sdpa"]


def test_clocks_are_read_around_a_case_and_drift_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read = [1980, 1700, 1980, 1980, 1500, 1400, 1500, 1400, 1500, 1400]
    monkeypatch.setattr(race, "clocks", lambda device: {"sm": read.pop(0), "mem": 2619})
    results = _run([Own("sdpa")])
    assert [(one["before"]["sm"], one["after"]["sm"]) for one in results.clocks] == [(1980, 1980), (1500, 1400)]
    assert read == []  # the second case was tried three times, and what remains is there for the judge


def test_a_result_that_is_not_a_number_is_no_parity() -> None:
    def nan(inputs: Inputs) -> torch.Tensor:
        return torch.full_like(_sdpa(inputs), float("nan"))

    results = _run([Fake("sdpa", nan)])
    assert {row["mae"] for row in results.rows} == {"nan"}
    assert len(results.parity_failures) == len(WORKLOADS)


# ---- Peers, each in a process of its own -----------------------------------------------------------------------------

ADAPTER = """
import os, sys, torch
from nsa_sel.measure.run.contestants import Own
class Adapter:
    name = {name!r}
    def available(self): return None
    def refuses(self, inputs): return {refuses!r}
    def prepare(self, inputs):
        run = Own("sdpa").prepare(inputs)
        from torch.nn.functional import scaled_dot_product_attention
        from nsa_sel.measure.run.contestants import Prepared
        right = Prepared().prepare(inputs)
        print("a library that talks")
        def call():
            {does}
        return call
def adapter(): return Adapter()
"""


def _with_peer(folder: Path, does: str, refuses: str | None = None, anchor_off: float = 1e9) -> Results:
    (folder / "fla.py").write_text(ADAPTER.format(name="fla", does=does, refuses=refuses))
    settings = Settings(CPU, ("eager",), seed=1, iters=2, warmup=1, anchor_off=anchor_off)
    adapters, absent = load_peers(["fla"], folder)
    assert not absent
    peer, results = Peer("fla", folder, settings), Results()
    try:
        list(run_bench(WORKLOADS[:1], [Own("sdpa")], [(adapters[0], peer)], settings, results))
    finally:
        peer.close()
    assert {row["ran"] for row in results.rows if row["backend"] == "sdpa"} == {"sdpa"}  # nothing took it along
    return results


def test_a_peer_is_timed_in_its_own_process_beside_an_anchor(tmp_path: Path) -> None:
    results = _with_peer(tmp_path, "return right()")
    mine = [row for row in results.rows if row["backend"] == "fla"]
    assert {row["ran"] for row in mine} == {"fla"}
    assert all(0 < float(row["mae"]) < 1e-3 and float(row["speedup"]) > 0 and row["ceiling_gbps"] for row in mine)
    assert [one["backend"] for one in results.anchors] == ["fla"]
    assert all(one["anchor_ms"] > 0 and one["sdpa_ms"] > 0 for one in results.anchors)
    assert results.not_measured == []


@pytest.mark.parametrize(
    ("does", "reason"),
    [
        ("os.abort()", r"its process ended \(exit status -6\)"),
        (
            "sys.stderr.write('CUDA error: illegal address'); sys.stderr.flush(); os._exit(7)",
            "status 7.*illegal address",
        ),
        ("raise KeyError('BLOCK')", "KeyError: 'BLOCK'"),
        ("return right()[0]", r"expected \[B, S, G, 2, 64\]"),
        ("return right() * 0", "computed something else: MAE"),
        ("return run()", "ran sdpa"),  # a peer that calls this package is no peer
    ],
)
def test_a_peers_failure_is_a_row_and_takes_nothing_along(tmp_path: Path, does: str, reason: str) -> None:
    results = _with_peer(tmp_path, does)
    mine = [row for row in results.rows if row["backend"] == "fla"]
    assert [(row["ran"] == "fla", row["speedup"]) for row in mine] == [(False, "")]
    assert [one["backend"] for one in results.not_measured] == ["fla"]
    assert all(re.search(reason, one["reason"], re.DOTALL) for one in results.not_measured), results.not_measured
    assert results.parity_failures == []  # of this package


def test_anchors_apart_are_a_fault_of_the_row(tmp_path: Path) -> None:
    results = _with_peer(tmp_path, "return right()", anchor_off=1e-9)
    assert {row["ran"] for row in results.rows if row["backend"] == "fla"} == {""}
    assert all("its process times sdpa" in one["reason"] for one in results.not_measured)


def test_a_peer_that_refuses_has_no_row_and_a_reason(tmp_path: Path) -> None:
    results = _with_peer(tmp_path, "return right()", refuses="takes blocks alone")
    assert {row["backend"] for row in results.rows} == {"sdpa"}
    assert {(one["backend"], one["reason"]) for one in results.not_measured} == {("fla", "takes blocks alone")}


def test_a_peer_that_does_not_answer_is_ended(tmp_path: Path) -> None:
    (tmp_path / "fla.py").write_text(ADAPTER.format(name="fla", does="import time; time.sleep(60)", refuses=None))
    peer = Peer("fla", tmp_path, Settings(CPU, ("eager",), iters=1, warmup=0), seconds=0.5)
    timed, _ = peer.measure(WORKLOADS[0], "eager")
    assert "did not answer within 0.5 s" in timed.reason


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


def test_ceiling_reads_as_many_bytes_by_the_fastest_of_several_block_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    name, read_bytes, calls = ceiling.fastest_reader(1_000_000, 2, "eager", CPU, memory=1 << 30)
    assert (name, read_bytes, len(calls)) == ("torch.sum", 1_003_520, 2)  # rounded up to 4 KiB
    assert ceiling.fastest_reader(1, 2, "eager", CPU, memory=1)[1] == 4096
    # 64 blocks of 16 KB leave half of a large GPU idle at 1 MB: a sweep holds blocks of 1 KB to 64 KB
    monkeypatch.setattr(ceiling, "_triton_kernel", lambda: object())
    readers = ceiling._readers(torch.device("cuda"))
    assert [name for name in readers if name.startswith("triton")] == [
        f"triton, blocks of {block}" for block in (256, 512, 1024, 2048, 4096, 8192, 16384)
    ]
    slow = {
        "slow": lambda buffer: lambda: time.sleep(0.002),
        "fast": lambda buffer: lambda: None,
        "broken": lambda buffer: {}["x"],
    }
    monkeypatch.setattr(ceiling, "_readers", lambda device: slow)
    assert ceiling.fastest_reader(1, 2, "eager", CPU, memory=1)[0] == "fast"


def test_peers_are_loaded_and_named_when_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, absent = load_peers(list(PEERS), None)
    assert found == []
    assert set(absent) == set(PEERS)
    text = "class A:\n    name = {!r}\n    def available(self): {}\ndef adapter(): return A()\n"
    for name, does in (
        ("fla", "return None"),
        ("vllm", "return 'not installed'"),
        ("flashinfer", "raise OSError('x')"),
    ):
        (tmp_path / f"{name}.py").write_text(text.format(name, does))
    found, absent = load_peers(["fla", "vllm", "flex", "flashinfer"], peers_folder(tmp_path))
    assert [peer.name for peer in found] == ["fla"]
    assert absent["vllm"] == "not installed"
    assert absent["flashinfer"] == "OSError: x"
    assert "no adapter" in absent["flex"]
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


def test_schema_is_as_documented() -> None:
    assert len(schema.BENCH_COLUMNS) == len(set(schema.BENCH_COLUMNS)) == 30
    assert len(schema.DECODE_COLUMNS) == 12
