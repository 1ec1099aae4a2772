"""What the emulator computes and counts, against numpy and against figures known beforehand; and how it is built."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest

from tests.host_run import build
from tests.host_run.emulator import Counter, Emulator
from tests.host_run.faults.launcher import library

SCHEDULES = (0, 1, 2)


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    """The kernels of fragments.cu, every plain access checked."""
    return Emulator(library("hook"))


# ---- Layouts and built-ins, against numpy ---------------------------------------------------------------------------


def _launch(
    emulator: Emulator, name: str, a: np.ndarray, b: np.ndarray, out: np.ndarray, mode: int = 0, schedule: int = 0
) -> None:
    emulator.unregister_all()
    for label, array, writable in (("a", a, False), ("b", b, False), ("out", out, True)):
        emulator.register(label, array, writable=writable, tracked=False)
    emulator.reset(schedule)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (a, b, out)]
    getattr(emulator.lib, f"run_{name}")(*pointers, mode)
    assert emulator.findings() == []


def _random_16bit(rng: np.random.Generator, shape: tuple[int, ...], bfloat16: bool) -> tuple[np.ndarray, np.ndarray]:
    """Small integers, exact in every 16-bit format and in FP32 sums: as bits and as values."""
    values = rng.integers(-8, 9, shape).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16) if bfloat16 else values.astype(np.float16).view(np.uint16)
    return bits, values


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_layout(emulator: Emulator, transposed: bool, schedule: int) -> None:
    rows = np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8)  # matrix, row (given by lane 8 m + row), column
    out = np.zeros((32, 4, 2), np.uint16)
    _launch(emulator, "ldmatrix", rows, rows, out, int(transposed), schedule)
    for lane in range(32):  # PTX ISA: thread 4 r + c holds row r, columns 2 c and 2 c + 1
        row, column = divmod(lane, 4)
        matrices = rows.transpose(0, 2, 1) if transposed else rows
        np.testing.assert_array_equal(out[lane], matrices[:, row, 2 * column : 2 * column + 2])


@pytest.mark.parametrize("bfloat16", [False, True])
def test_mma_layout(emulator: Emulator, bfloat16: bool) -> None:
    rng = np.random.default_rng(0)
    a_bits, a = _random_16bit(rng, (16, 16), bfloat16)
    b_bits, b = _random_16bit(rng, (16, 8), bfloat16)
    c = rng.integers(-50, 50, (16, 8)).astype(np.float32)
    a_regs, b_regs = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
    c_regs = np.zeros((32, 4), np.float32)
    place = {}
    for lane in range(32):
        group, t = divmod(lane, 4)
        for i in range(8):  # PTX ISA, "Matrix Fragments for mma.m16n8k16"
            row = group if i in (0, 1, 4, 5) else group + 8
            a_regs[lane, i] = a_bits[row, t * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            b_regs[lane, i] = b_bits[t * 2 + (i & 1) + (8 if i >= 2 else 0), group]
            place[lane, i] = (group + (8 if i >= 2 else 0), t * 2 + (i & 1))
            c_regs[lane, i] = c[place[lane, i]]
    _launch(emulator, "mma", a_regs, b_regs, c_regs, int(bfloat16))
    expected = c + a @ b
    for (lane, i), at in place.items():
        assert c_regs[lane, i] == expected[at]
    assert emulator.counters()["MMA"].requests == 1


def test_movmatrix_layout(emulator: Emulator) -> None:
    matrix = np.arange(64, dtype=np.uint16).reshape(8, 8)
    words, out = matrix.reshape(32, 2).copy(), np.zeros((32, 2), np.uint16)
    _launch(emulator, "movmatrix", words, words, out)
    np.testing.assert_array_equal(out.reshape(8, 8), matrix.T)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shuffles_and_votes(emulator: Emulator, schedule: int) -> None:
    v = np.random.default_rng(1).integers(0, 1000, 32).astype(np.int32)
    out = np.zeros((11, 32), np.int32)
    _launch(emulator, "shuffles", v, v, out, schedule=schedule)
    lane = np.arange(32)
    up = np.where(lane >= 4, lane - 4, lane)
    down = np.where((lane % 16) + 4 < 16, lane + 4, lane)
    votes = int(sum(int(x & 1) << i for i, x in enumerate(v)))
    expected = [np.full(32, v[5]), v[lane // 8 * 8 + (lane + 3) % 8], v[lane ^ 9], v[up], v[down]]
    expected += [v[lane ^ 16], v[lane ^ 1]]
    expected += [np.full(32, np.uint32(votes).astype(np.int32)), np.ones(32), np.zeros(32)]
    np.testing.assert_array_equal(out[:10], expected)
    np.testing.assert_array_equal(out[10, :16], v[15 - lane[:16]])


def test_arithmetic_built_ins(emulator: Emulator) -> None:
    rng = np.random.default_rng(2)
    v, w = (rng.integers(0, 2**32, 32, dtype=np.uint32) >> rng.integers(0, 32, 32).astype(np.uint32) for _ in range(2))
    v[0] = 0
    out = np.zeros((7, 32), np.uint32)
    _launch(emulator, "arithmetic", v, w, out)
    wide = [int(x) for x in v]
    np.testing.assert_array_equal(out[0], [x.bit_count() for x in wide])
    np.testing.assert_array_equal(out[1], [(x & -x).bit_length() for x in wide])
    np.testing.assert_array_equal(out[2], [32 - x.bit_length() for x in wide])
    np.testing.assert_array_equal(out[3], [x * int(y) >> 32 for x, y in zip(wide, w, strict=True)])
    np.testing.assert_array_equal(out[4], np.minimum(v, w))
    np.testing.assert_array_equal(out[5].view(np.int32), np.maximum(v.view(np.int32), w.view(np.int32)))
    powers = np.exp2(-5.0 * np.arange(32)).astype(np.float32)
    np.testing.assert_array_equal(out[6].view(np.float32), np.where(powers < np.finfo(np.float32).tiny, 0, powers))


# ---- Counters -------------------------------------------------------------------------------------------------------

# mode -> (operation, requests, bytes, sectors, wavefronts, conflicts)
PATTERNS = {
    0: ("STS", 1, 128, 0, 1, 0),
    1: ("STS", 1, 128, 0, 2, 1),
    2: ("STS", 1, 128, 0, 32, 31),
    3: ("STS", 1, 512, 0, 4, 0),
    4: ("STS", 1, 512, 0, 32, 28),
    5: ("STS", 1, 256, 0, 2, 0),
    6: ("STS", 1, 16, 0, 4, 3),
    7: ("LDG", 1, 128, 4, 0, 0),
    8: ("LDG", 1, 128, 32, 0, 0),
    9: ("LDG", 1, 512, 16, 0, 0),
    10: ("LDG", 1, 128, 1, 0, 0),
    11: ("LDGSTS_ST", 1, 512, 0, 4, 0),
    12: ("LDGSTS_ST", 1, 512, 0, 32, 28),
    13: ("STS", 31, 496 * 4, 0, 31, 0),
}


@pytest.mark.parametrize("mode", PATTERNS)
def test_wavefronts_sectors_and_conflicts_are_exact(emulator: Emulator, mode: int) -> None:
    op, requests, nbytes, sectors, wavefronts, conflicts = PATTERNS[mode]
    data, out = np.zeros(1024, np.float32), np.zeros(32, np.float32)
    _launch(emulator, "patterns", data, data, out, mode)
    counted = emulator.counters()[op]
    expected = Counter(requests, nbytes, sectors, wavefronts, conflicts, counted.lanes)
    assert counted == expected
    if mode == 12:  # lanes without a valid source write zeros but read nothing
        assert emulator.counters()["LDGSTS"].bytes == 8 * 16
        assert emulator.buffers()["a"].read_widths == {16: 8}
    if mode == 8:
        traffic = emulator.buffers()["a"]
        assert (traffic.bytes_read, traffic.sectors_read, traffic.distinct_sectors_read) == (128, 32, 32)
        assert traffic.read_widths == {4: 32}
    assert emulator.buffers()["out"].bytes_written == 128


def test_counters_do_not_depend_on_the_schedule(emulator: Emulator) -> None:
    data, out = np.zeros(1024, np.float32), np.zeros(128, np.float32)
    seen = []
    for schedule, seed in ((0, 1), (1, 1), (2, 1), (2, 2), (2, 3)):
        emulator.unregister_all()
        emulator.register("a", data)
        emulator.register("out", out, writable=True)
        emulator.reset(schedule, seed=seed)
        emulator.lib.run_drifting(ctypes.c_void_p(data.ctypes.data), None, ctypes.c_void_p(out.ctypes.data), 0)
        assert emulator.findings() == []
        seen.append([emulator.counters(), emulator.sites(), emulator.buffers(), emulator.sync_sites()])
    assert seen[0][0]["LDG"].requests == 4 + 7 + 10 + 13
    assert all(other == seen[0] for other in seen[1:])


# ---- Builds ----------------------------------------------------------------------------------------------------------


def test_a_built_library_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    path = library("hook")
    monkeypatch.setattr(build, "_run", lambda command: pytest.fail(f"compiled again: {command}"))
    assert library("hook") == path


def test_a_changed_source_is_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: list[list[str]] = []

    def pretend(command: list[str]) -> None:
        commands.append(command)
        Path(command[-1]).write_bytes(b"")

    monkeypatch.setattr(build, "_run", pretend)
    monkeypatch.setenv("NSA_SEL_HOST_RUN_DIR", str(tmp_path / "cache"))
    source, header = tmp_path / "kernel.cu", tmp_path / "kernel.h"
    source.write_text("// one")
    header.write_text("// one")
    first = build.library("fast", [source])
    compiled = len(commands)
    source.write_text("// two")
    second = build.library("fast", [source])
    header.write_text("// two")
    third = build.library("fast", [source])
    assert len({first, second, third}) == 3
    assert len(commands) == compiled + 4  # the source and a link, twice; the emulator's objects stay
    assert first.parent == tmp_path / "cache"


def test_what_nobody_asked_for_in_a_week_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "old.o", tmp_path / "new.so"
    for path in (old, new):
        path.write_bytes(b"")
    a_week_ago = old.stat().st_mtime - 8 * 86_400
    os.utime(old, (a_week_ago, a_week_ago))
    build._prune(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind: expected one of"):
        build.library("tsan", [])
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.compiler.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="needs g\\+\\+, but 'no-such-compiler'"):
            build.compiler()
    finally:
        build.compiler.cache_clear()
    with pytest.raises(RuntimeError, match="does-not-exist"):
        build._run(["sh", "-c", "echo does-not-exist >&2; exit 3"])
