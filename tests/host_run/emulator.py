"""The emulator from Python: registered buffers, schedules, findings, counters, traces and dropped synchronisations."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Counter:
    """What one class of operations, or one place in the source, cost; `conflicts` are wavefronts above the ideal."""

    requests: int = 0
    bytes: int = 0
    sectors: int = 0
    wavefronts: int = 0
    conflicts: int = 0
    lanes: int = 0


@dataclass(frozen=True)
class BufferTraffic:
    """Traffic of one registered buffer in bytes and 32-byte sectors; `read_widths` maps bytes per lane to lanes."""

    bytes_read: int
    sectors_read: int
    bytes_written: int
    sectors_written: int
    distinct_sectors_read: int
    distinct_sectors_written: int
    read_widths: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SyncSite:
    """One synchronisation in the source, as it was executed (counted by thread)."""

    kind: str
    file: str
    line: int
    executions: int


@dataclass(frozen=True)
class Event:
    """One request of a warp, in the order of execution; `offset` is in bytes, from the start of `buffer`."""

    block: int
    warp: int
    op: str
    file: str
    line: int
    buffer: str
    offset: int


def _place(text: str) -> tuple[str, int]:
    file, _, line = text.rpartition(":")
    digits = line.split(" ")[0]
    return file, int(digits) if digits.isdigit() else 0


class Emulator:
    """A library made by `build.library`, loaded.

    Buffers that the kernel may touch have to be registered: every other address is out of bounds. One process, one
    thread: the emulator's state belongs to the library.
    """

    def __init__(self, path: Path | str) -> None:
        self.lib = lib = ctypes.CDLL(str(path))
        for name in ("finding", "counters", "sites", "sync_sites", "buffers", "trace"):
            getattr(lib, f"emu_{name}").restype = ctypes.c_char_p
        lib.emu_register.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3]
        lib.emu_reset.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
        lib.emu_drop.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
        lib.emu_run_streams.argtypes = lib.emu_set_step_limit.argtypes = [ctypes.c_uint64]
        lib.emu_steps.restype = ctypes.c_uint64
        self._kept: dict[str, Any] = {}

    def register(
        self,
        name: str,
        data: Any,
        nbytes: int | None = None,
        *,
        writable: bool = False,
        tracked: bool | None = None,
        dependent: bool = False,
    ) -> None:
        """Makes memory visible to kernels under a name; the same name again replaces it.

        Args:
            data: a numpy array, a CPU tensor (its whole storage from `data_ptr()` on), or an address.
            nbytes: required with an address; otherwise the size of the array or tensor.
            writable: kernels may write. Until written, a tracked byte counts as never initialised.
            tracked: keep who read and wrote each byte last. Default: writable buffers are.
            dependent: the previous grid of the stream wrote it, so a programmatic launch must wait before it reads.
        """
        if isinstance(data, int):
            if nbytes is None:
                raise ValueError("nbytes: expected a size with an address, got None")
            pointer, size = data, nbytes
        elif hasattr(data, "data_ptr"):
            pointer = data.data_ptr()
            size = nbytes if nbytes is not None else data.numel() * data.element_size()
        else:
            pointer, size = data.ctypes.data, data.nbytes if nbytes is None else nbytes
        self._kept[name] = data  # the kernel's pointers stay valid
        track = writable if tracked is None else tracked
        self.lib.emu_register(name.encode(), pointer, size, int(writable), int(track), int(dependent))

    def unregister_all(self) -> None:
        """Forgets all buffers."""
        self.lib.emu_unregister_all()
        self._kept.clear()

    def reset(self, schedule: int = 0, check: bool = True, seed: int = 1, trace: bool = False) -> None:
        """Starts anew: nothing found, counted or dropped, tracked buffers never written.

        Args:
            schedule: 0 ascending, asynchronous copies land as late as possible; 1 descending, copies land at once;
                2 random by `seed`.
            check: False leaves races and uninitialised data unchecked, for speed.
            trace: keep the order of events for `trace()`.
        """
        self.lib.emu_reset(schedule, int(check), seed, int(trace))

    def set_step_limit(self, steps: int) -> None:
        """Ends a grid with a finding after so many calls; kept over resets."""
        self.lib.emu_set_step_limit(steps)

    def findings(self) -> list[str]:
        """`kind: file:line: what`, each kind once a place.

        Order: race, async-hazard (a copy not waited for), global-race (blocks of one grid), stream-race, griddep (the
        previous grid), dsmem (another block's shared memory), proxy (a fence before bulk copies). Addresses: smem-oob,
        global-oob, readonly, misaligned, smem-overlap, smem-size, uninit. Barriers: mbarrier, barrier-divergence,
        barrier-count, cluster, mask, divergent-collective, deadlock, exit-in-flight. Also launch, trap, step-limit.
        """
        return [self.lib.emu_finding(i).decode(errors="replace") for i in range(self.lib.emu_finding_count())]

    def finding_kinds(self) -> set[str]:
        """The kinds alone: race, uninit, deadlock, ..."""
        return {text.partition(":")[0] for text in self.findings()}

    def _rows(self, table: str) -> list[list[str]]:
        return [line.split("\t") for line in getattr(self.lib, f"emu_{table}")().decode().splitlines()]

    def counters(self) -> dict[str, Counter]:
        """By class of operation."""
        return {row[0]: Counter(*map(int, row[1:])) for row in self._rows("counters")}

    def sites(self) -> dict[tuple[str, str, int], Counter]:
        """By (operation, file, line)."""
        return {(row[0], *_place(row[1])): Counter(*map(int, row[2:])) for row in self._rows("sites")}

    def buffers(self) -> dict[str, BufferTraffic]:
        """By registered name."""
        result = {}
        for name, *amounts, widths in self._rows("buffers"):
            pairs = (pair.split(":") for pair in widths.split(",") if pair)
            by_width = {int(width): int(lanes) for width, lanes in pairs}
            read, sectors, written, sectors_written, distinct, distinct_written = map(int, amounts)
            result[name] = BufferTraffic(read, sectors, written, sectors_written, distinct, distinct_written, by_width)
        return result

    def sync_sites(self) -> list[SyncSite]:
        """Every synchronisation that ran since the last reset, also a dropped one."""
        return [SyncSite(row[0], *_place(row[1]), int(row[2])) for row in self._rows("sync_sites")]

    def drop(self, kind: str, file: str, line: int) -> None:
        """Leaves one synchronisation out until the next reset.

        Raises:
            ValueError: no such kind of operation.
        """
        if not self.lib.emu_drop(kind.encode(), file.encode(), line):
            raise ValueError(f"kind: expected a kind of `sync_sites()`, got {kind!r}")

    def trace(self) -> list[Event]:
        """Events in order; empty without `reset(trace=True)`."""
        return [Event(int(r[0]), int(r[1]), r[2], *_place(r[3]), r[4], int(r[5])) for r in self._rows("trace")]

    def steps(self) -> int:
        """Calls into the emulator since the last reset."""
        return int(self.lib.emu_steps())

    def begin_stream(self, stream: int) -> None:
        """Records the launches that follow into a stream instead of running them."""
        self.lib.emu_begin_stream(stream)

    def run_streams(self, seed: int) -> None:
        """Runs all recorded streams, interleaved block by block; a stream's launches stay in order."""
        self.lib.emu_run_streams(seed)
