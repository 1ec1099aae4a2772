"""Primitive parity: each device primitive against the emulator's on the same bits.

Exact ones must agree bit for bit; `mma` on random values and `exp2` within their bounds. Without a GPU two schedules of
the emulator are compared.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.backends_under_test import backend
from tests.host_run import build
from tests.host_run.emulator import Emulator

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "cuda"
WORDS = 1024  # of each buffer, 32 bits each
EXP2_BOUND = 2.0**-21  # relative; ex2.approx promises 2^-22, the host rounds once more
MMA_BOUND = 2.0**-20  # of the sum of magnitudes: tensor cores may truncate what they align
NO_EMULATOR = backend("host-run-sm80").missing()
emulated = pytest.mark.skipif(NO_EMULATOR is not None, reason=f"emulator: {NO_EMULATOR}")
Run = Callable[["Probe", np.ndarray, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class Probe:
    """One comparison: an entry of probes.cu, what it takes, and how far its results may lie apart."""

    name: str
    entry: str
    make: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
    words: int  # of out
    mode: int = 0
    bound: float = 0.0  # 0: bit for bit
    scale: Callable[[np.ndarray, np.ndarray, bool], np.ndarray] | None = None  # what the bound is relative to
    capability: int = 80

    def inputs(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a and b, filled up to WORDS."""
        made = self.make(np.random.default_rng(seed))
        return tuple(np.concatenate([x, np.zeros(WORDS - len(x), np.uint32)]) for x in made)  # type: ignore[return-value]


def _bits(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.integers(0, 2**32, WORDS, dtype=np.uint32), (rng.random(WORDS) < 0.7).astype(np.uint32)


def _half(values: np.ndarray, bf16: bool) -> np.ndarray:
    """Return values as 16-bit pairs in words; what is no bf16 number is cut, which is as random as before."""
    as_bits = (values.view(np.uint32) >> 16).astype(np.uint16) if bf16 else values.astype(np.float16).view(np.uint16)
    return as_bits.view(np.uint32)


def _widen(words: np.ndarray, bf16: bool) -> np.ndarray:
    halves = words.view(np.uint16)
    return (halves.astype(np.uint32) << 16).view(np.float32) if bf16 else halves.view(np.float16).astype(np.float32)


def _mma(bf16: bool, exact: bool) -> Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]:
    def make(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        def values(count: int) -> np.ndarray:
            drawn = rng.integers(-8, 9, count) if exact else rng.standard_normal(count)
            return drawn.astype(np.float32)

        return _half(values(256), bf16), np.concatenate([_half(values(128), bf16), values(128).view(np.uint32)])

    return make


def _mma_scale(a: np.ndarray, b: np.ndarray, bf16: bool) -> np.ndarray:
    """Return |C| + sum |A| |B| in the layout of the results: lane 4 r + c has rows r, r + 8, columns 2 c, 2 c + 1."""
    halves = np.abs(_widen(a[:128], bf16)).reshape(8, 4, 4, 2)  # row, c, register, pair
    rows = np.zeros((16, 16), np.float32)
    columns = np.zeros((16, 8), np.float32)
    b_halves = np.abs(_widen(b[:64], bf16)).reshape(8, 4, 2, 2)  # column, c, register, pair
    for register in range(4):
        for c in range(4):
            for pair in range(2):
                k = 2 * c + pair + 8 * (register // 2)
                rows[np.arange(8) + 8 * (register % 2), k] = halves[:, c, register, pair]
                if register < 2:
                    columns[2 * c + pair + 8 * register] = b_halves[:, c, register, pair]
    total = rows @ columns
    found = np.abs(b[64:192].view(np.float32)).reshape(8, 4, 4).copy()
    for c in range(4):
        for i in range(4):
            found[:, c, i] += total[np.arange(8) + 8 * (i // 2), 2 * c + i % 2]
    return found.reshape(-1)


def _exp2_inputs(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    edges = np.array([0, -0.0, 1, -1, -126, -127, -149, -200, 127, 128, -np.inf, 0.5, -0.5], np.float32)
    drawn = (rng.random(256 - len(edges)) * -40).astype(np.float32)
    return np.concatenate([edges, drawn]).view(np.uint32), np.zeros(1, np.uint32)


def _exp2_scale(a: np.ndarray, b: np.ndarray, bf16: bool) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp2(a[:256].view(np.float32).astype(np.float64))


def _floats(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    # Half-way cases of both formats among them: a rounding that is not to even shows there.
    ties = np.array([1 + 2.0**-9, 1 + 3 * 2.0**-9, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519, 65520, 1e-8, 0.0], np.float32)
    low = np.concatenate([ties, rng.standard_normal(120).astype(np.float32)])
    return low.view(np.uint32), rng.standard_normal(128).astype(np.float32).view(np.uint32)


PROBES = (
    Probe("ldmatrix", "ldmatrix", _bits, 128),
    Probe("ldmatrix.trans", "ldmatrix", _bits, 128, mode=1),
    Probe("mma.fp16 exact", "mma", _mma(False, True), 128),
    Probe("mma.bf16 exact", "mma", _mma(True, True), 128, mode=1),
    Probe("mma.fp16 random", "mma", _mma(False, False), 128, bound=MMA_BOUND, scale=_mma_scale),
    Probe("mma.bf16 random", "mma", _mma(True, False), 128, mode=1, bound=MMA_BOUND, scale=_mma_scale),
    Probe("movmatrix", "movmatrix", _bits, 32),
    Probe("exp2", "exp2", _exp2_inputs, 256, bound=EXP2_BOUND, scale=_exp2_scale),
    Probe("pack2.fp16", "pack", _floats, 128),
    Probe("pack2.bf16", "pack", _floats, 128, mode=1),
    Probe("cp.async", "cp_async", _bits, 128),
    Probe("mbarrier", "mbarrier", _bits, 1024),
    Probe("bar.sync", "named_barrier", _bits, 128),
    Probe("bulk copy", "bulk_copy", _bits, 128, capability=90),
    Probe("cluster", "cluster", _bits, 128, capability=90),
    Probe("griddepcontrol", "grid_pair", _bits, 128, capability=90),
)


def host_run(schedule: int) -> Run:
    """Return a runner on the emulator; what it finds wrong raises."""
    emulator = Emulator(build.library("hook", [HERE / "probes.cu"], [CUDA]))

    def run(probe: Probe, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        emulator.unregister_all()
        for label, array in (("a", a), ("b", b), ("out", out)):
            emulator.register(label, array, writable=label == "out", tracked=False)
        emulator.reset(schedule)
        pointers = [ctypes.c_void_p(x.ctypes.data) for x in (a, b, out)]
        code = getattr(emulator.lib, f"probe_{probe.entry}")(*pointers, probe.mode, None)
        if code != 0 or emulator.findings():
            raise RuntimeError(f"{probe.name} on the host: code {code}, {'; '.join(emulator.findings())}")

    return run


def device_library(folder: Path) -> ctypes.CDLL:
    """Build probes.cu for this machine's GPU into `folder` and load it.

    Raises:
        RuntimeError: no nvcc, or a source that it does not take.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("expected nvcc on PATH to build the probes, got none")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "libprobes.so"
    command = [nvcc, "-std=c++17", "-O2", "-shared", "-Xcompiler", "-fPIC", "-arch=native", f"-I{CUDA}"]
    done = subprocess.run(
        [*command, "-o", str(target), str(HERE / "probes.cu")], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"nvcc ended with {done.returncode}: {done.stderr[-2000:]}")
    return ctypes.CDLL(str(target))


def device_run(folder: Path) -> Run:
    """Return a runner on the GPU."""
    library = device_library(folder)

    def run(probe: Probe, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        tensors = [torch.from_numpy(x.view(np.int32).copy()).cuda() for x in (a, b, out)]
        torch.cuda.synchronize()
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        code = getattr(library, f"probe_{probe.entry}")(*pointers, probe.mode, None)
        if code != 0:
            raise RuntimeError(f"{probe.name} on the GPU: launch error {code}")
        torch.cuda.synchronize()
        out[:] = tensors[2].cpu().numpy().view(np.uint32)

    return run


def compare(probe: Probe, left: Run, right: Run, seed: int) -> tuple[int, float]:
    """Return how many words differ by more than the bound, and the largest error beside the bound's scale."""
    a, b = probe.inputs(seed)
    results = []
    for run in (left, right):
        out = np.zeros(WORDS, np.uint32)
        run(probe, a, b, out)
        results.append(out[: probe.words])
    if probe.scale is None:
        return int((results[0] != results[1]).sum()), 0.0
    x, y = (result.view(np.float32).astype(np.float64) for result in results)
    same = (results[0] == results[1]) | (x == y)
    scale = probe.scale(a, b, bool(probe.mode))
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(same, 0.0, np.abs(x - y) / np.maximum(scale, np.finfo(np.float32).tiny))
    return int((~(error <= probe.bound)).sum()), float(error.max())


@functools.cache
def runners(folder: Path) -> tuple[Run, Run, int]:
    """Return what is compared, and the compute capability to compare for: all of them on the emulator."""
    if not torch.cuda.is_available():
        return host_run(0), host_run(1), 90
    return host_run(0), device_run(folder), int("{}{}".format(*torch.cuda.get_device_capability()))


@emulated
@pytest.mark.parametrize("one", PROBES, ids=lambda one: one.name)
def test_primitive_agrees_with_the_emulator(one: Probe, tmp_path_factory: pytest.TempPathFactory) -> None:
    left, right, capability = runners(tmp_path_factory.getbasetemp() / "probes")
    if capability < one.capability:
        pytest.skip(f"needs compute capability {one.capability / 10}")
    for seed in range(4):
        assert compare(one, left, right, seed)[0] == 0, f"seed {seed}"


def probe(name: str) -> Probe:
    return next(one for one in PROBES if one.name == name)


def writes(values: np.ndarray) -> Run:
    def run(_: Probe, a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
        out[: len(values)] = values

    return run


def test_one_wrong_bit_of_an_exact_primitive_shows() -> None:
    right = np.arange(32, dtype=np.uint32)
    wrong = right ^ (np.arange(32) == 7).astype(np.uint32)
    assert compare(probe("movmatrix"), writes(right), writes(right), 0) == (0, 0.0)
    assert compare(probe("movmatrix"), writes(right), writes(wrong), 0)[0] == 1


def test_bounded_primitives_are_held_to_their_bound_and_nan_is_no_match() -> None:
    exp2 = probe("exp2")
    a, _ = exp2.inputs(0)
    with np.errstate(over="ignore"):
        right = np.exp2(a[:256].view(np.float32)).astype(np.float32)
    right[np.abs(right) < np.finfo(np.float32).tiny] = 0
    near, far, lost = right.copy(), right.copy(), right.copy()
    near[20] = np.nextafter(near[20], np.float32(2))
    far[20] *= 1 + 2.0**-18
    lost[21] = np.nan
    results = [compare(exp2, writes(right.view(np.uint32)), writes(x.view(np.uint32)), 0)[0]
               for x in (right, near, far, lost)]  # fmt: skip
    assert results == [0, 0, 1, 1]


@emulated
def test_the_scale_of_mma_is_the_sum_of_magnitudes() -> None:
    """By magnitudes alone: |A| |B| + |C| must be what the primitive itself gives on them."""
    one = probe("mma.bf16 exact")
    a, b = one.inputs(3)
    magnitudes = (a & 0x7FFF7FFF, np.concatenate([b[:64] & 0x7FFF7FFF, b[64:] & 0x7FFFFFFF]))
    out = np.zeros(WORDS, np.uint32)
    host_run(0)(one, *magnitudes, out)
    np.testing.assert_array_equal(out[:128].view(np.float32), _mma_scale(a, b, True))
