"""The machine, a C++ library: built on first use, programs decoded once, launches run. See machine/machine.h."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

from tests.host_run import build
from tests.machine_code.listing import Kernel

HERE = Path(__file__).resolve().parent / "machine"
ROOT = HERE.parents[2]
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra")


class MachineCodeError(RuntimeError):
    """What the machine found wrong: an unknown opcode, a stray or unwritten byte, a hazard, a deadlock."""


@dataclass(frozen=True)
class Model:
    """What the clock assumes, in clocks and bytes: guesses but for the latencies, see machine/latencies.h.

    Args:
        l2, dram: from asking to arrival of a load or copy.
        remote_shared: of a load from another block's shared memory.
        cluster_barrier: from the last arrival to the first instruction behind it.
        branch: that a taken branch costs beside its stall count.
        hmma_every: between two HMMAs of one scheduler.
        bytes_per_clock: that one SM gets from L2.
        contention: warps share schedulers, the shared-memory port and tensor cores.
        cold: what takes `dram`: 0 nothing, 1 the first touch of a 128-byte line of K and V, 2 of everything, 3 every
            touch of K and V.
    """

    l2: float = 280
    dram: float = 1000
    remote_shared: float = 200
    cluster_barrier: float = 200
    branch: float = 8
    hmma_every: float = 8
    bytes_per_clock: float = 20
    contention: bool = True
    cold: int = 0


class _Model(ctypes.Structure):
    _fields_ = [
        (f.name, ctypes.c_int64 if f.name in ("contention", "cold") else ctypes.c_double) for f in fields(Model)
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("parameters", ctypes.c_void_p),
        *(
            (n, ctypes.c_int64)
            for n in ("bytes", "grid", "cluster", "warps", "shared_bytes", "stages", "limit", "clusters")
        ),
    ]


@dataclass
class Stage:
    """Clocks of a stage, over all warps: issuing, of which stalled; asleep at barriers; instructions; times entered."""

    busy: float = 0
    stalled: float = 0
    slept: float = 0
    issued: int = 0
    entered: int = 0


@dataclass
class Result:
    """What one grid did. `counts` are warp instructions that ran for at least one lane, by opcode."""

    end: float = 0
    instructions: int = 0
    copied: int = 0  # 16-byte pieces that were copied asynchronously, zeros among them
    barriers: int = 0  # meetings of warps at BAR.SYNC
    visited: list[bool] = field(default_factory=list)  # which instructions ran
    counts: dict[str, int] = field(default_factory=dict)
    marks: dict[str, float] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)


@functools.cache
def library() -> ctypes.CDLL:
    """Build (first call) and load the machine together with the package's planner."""
    sources = [
        *sorted(HERE.glob("*.cpp")),
        *(ROOT / "cpp" / name for name in ("dispatch.cpp", "plan.cpp", "launch.cpp")),
    ]
    headers = [*sorted(HERE.glob("*.h")), *sorted((ROOT / "cpp").glob("*.h"))]
    folder = ROOT / "build" / "machine_code"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"libmachine-{build.digest(_FLAGS, [*sources, *headers])}.so"
    with build.locked(folder):
        if not target.exists():
            objects = [folder / f"{s.stem}-{build.digest(_FLAGS, [s, *headers])}.o" for s in sources]
            jobs = [(o, s) for o, s in zip(objects, sources, strict=True) if not o.exists()]
            with ThreadPoolExecutor(2) as pool:
                for _ in pool.map(lambda job: build.into(job[0], [build.compiler(), *_FLAGS, "-c", str(job[1])]), jobs):
                    pass
            build.into(target, [build.compiler(), "-shared", *map(str, objects)])
    lib = ctypes.CDLL(str(target))
    for name in ("machine_unknown", "machine_launch"):
        getattr(lib, name).restype = ctypes.c_char_p
    for name in ("machine_program", "machine_memory"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.machine_program.argtypes = [ctypes.c_char_p, ctypes.c_int]
    lib.machine_bank.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int64]
    lib.machine_add.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
    lib.machine_launch.argtypes = [ctypes.c_void_p] * 4
    for name in ("machine_free_program", "machine_free_memory", "machine_unknown"):
        getattr(lib, name).argtypes = [ctypes.c_void_p]
    lib.machine_free_program.restype = lib.machine_free_memory.restype = None
    lib.machine_plan.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_char_p, ctypes.c_int]
    lib.machine_grids.argtypes = [ctypes.c_void_p]
    lib.machine_grid.argtypes = [ctypes.c_int, ctypes.c_void_p]
    lib.machine_grid.restype = None
    lib.machine_request_bytes.restype = ctypes.c_int64
    return lib


class Program:
    """A kernel's decoded instructions; `stages` are the source functions whose clocks are added up."""

    def __init__(self, kernel: Kernel, arch: str) -> None:
        self.kernel, self.arch = kernel, arch
        number: dict[str, int] = {}
        rows = [
            f"{x.address:x}\t{x.high:x}\t{number.setdefault(x.stage, len(number)) if x.stage else -1}\t{x.text}"
            for x in kernel.lines
        ]
        self.stages = list(number)
        self.handle = library().machine_program("\n".join(rows).encode(), int(arch.removeprefix("sm_")))
        for bank, data in kernel.banks.items():
            library().machine_bank(self.handle, bank, data, len(data))

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            library().machine_free_program(self.handle)

    def unknown(self) -> list[str]:
        """Return the instructions that the machine does not know: address, text and why."""
        return library().machine_unknown(self.handle).decode().splitlines()


class Memory:
    """The buffers of a launch; every other address is out of bounds."""

    def __init__(self) -> None:
        self.handle = library().machine_memory()

    def __del__(self) -> None:
        library().machine_free_memory(self.handle)

    def add(self, name: str, start: int, nbytes: int, writable: bool) -> None:
        """Make memory of this process visible; a writable buffer counts as unwritten until the kernel writes it."""
        library().machine_add(self.handle, name.encode(), start, nbytes, int(writable))


def launch(
    program: Program,
    memory: Memory,
    parameters: bytes,
    *,
    grid: int,
    cluster: int = 1,
    threads: int,
    shared_bytes: int = 0,
    model: Model | None = None,
    limit: int = 10**10,
    clusters: int = 0,
) -> Result:
    """Run every block of a grid, or its first clusters; more than `limit` instructions are a fault.

    Raises:
        MachineCodeError: whatever is wrong, with block, warp, address and instruction.
    """
    model = model or Model()
    native_model = _Model(*(getattr(model, f.name) for f in fields(Model)))
    buffer = ctypes.create_string_buffer(parameters, len(parameters))
    request = _Launch(
        ctypes.addressof(buffer),
        len(parameters),
        grid,
        cluster,
        threads // 32,
        shared_bytes,
        len(program.stages),
        limit,
        clusters,
    )
    text = (
        library()
        .machine_launch(program.handle, memory.handle, ctypes.byref(native_model), ctypes.byref(request))
        .decode()
    )
    result = Result()
    for line in text.splitlines():
        kind, name, *numbers = line.split("\t")
        if kind == "fault":
            raise MachineCodeError(name)
        if kind == "count":
            result.counts[name] = int(numbers[0])
        elif kind == "mark":
            result.marks[name] = float(numbers[0])
        elif kind == "stage":
            busy, stalled, slept, issued, entered = numbers
            result.stages[program.stages[int(name)]] = Stage(
                float(busy), float(stalled), float(slept), int(issued), int(entered)
            )
        elif kind == "visited":
            result.visited = [bit == "1" for bit in numbers[0]]
        else:
            setattr(result, kind, float(numbers[0]) if kind == "end" else int(numbers[0]))
    return result
