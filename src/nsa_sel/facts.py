"""The table of facts about the compiled kernels: what the binary holds, what the planner gives each GPU, a small model.

Registers and stack come from the built module through `cuobjdump`; shared memory, ring and blocks from the compiled
planner. Nothing here is a measurement of speed. The model, per SM and per kernel:

    expected share = min(1, in flight / (bandwidth per SM x 0.8 us)) x min(1, 128 / shared-memory bytes per clock)

The second factor counts what crosses shared memory for each byte that arrives from global memory:

    K: 1 (the copy's store) + head_warps (every group of heads reads the tile) + Q, reread for each tile
       (4 warps x sub tiles x units x 8 x Dk x 2 bytes per rows_k x Dk x 2; nothing at head tile 16, Q is in registers)
    V: 1 + head_warps + P (4 warps x units x 8 x 2 x rows_v bytes per rows_v x Dv x 2)

weighted by Dk and Dv, times bandwidth per SM over the clock.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_sel import _build
from nsa_sel.backends import _request
from nsa_sel.errors import BackendError

NOT_MEASURED = "NOT MEASURED"
SMEM_BYTES_PER_CLOCK = 128
DEFAULT_DIMS = ((192, 128), (128, 128))  # the NSA paper and MiniMax-M3
_MANY_ROWS = 4096  # requests: whole rows fill every SM
_SYMBOL = re.compile(r"^nsa_sel_decode_(float16|bfloat16)_(\d+)x(\d+)_h(\d+)(_bulk)?(_float8)?$")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that the table is made for; sizes in bytes, bandwidth in bytes and clock in cycles a second."""

    name: str
    sm_count: int
    capability: int  # 10 * major + minor
    smem_per_block: int
    smem_per_sm: int
    bandwidth: float
    clock: float
    source: str  # where bandwidth and clock come from


GPUS = (
    Gpu("H200", 132, 90, 232_448, 233_472, 4.3e12, 1.755e9, "copy figure, datasheet clock"),
    Gpu("A100", 108, 80, 166_912, 167_936, 1.94e12, 1.41e9, "datasheet, 80 GB PCIe"),
    Gpu("RTX 4090", 128, 89, 101_376, 102_400, 1.008e12, 2.52e9, "datasheet"),
    Gpu("A10", 72, 86, 101_376, 102_400, 0.6e12, 1.695e9, "datasheet"),
)


@dataclass(frozen=True, slots=True)
class Key:
    """What tells one compiled decode kernel from another."""

    dtype: str
    Dk: int
    Dv: int
    head_tile: int
    loads: str = "cp.async"
    cache: str = "same"


@dataclass(frozen=True, slots=True)
class Resources:
    """What the binary says of one kernel; bytes, and registers a thread."""

    registers: int
    stack: int
    local: int
    static_shared: int


@dataclass(frozen=True, slots=True)
class Fact:
    """One kernel on one GPU, h = head tile, many rows. Registers and stack are None where the binary was not read."""

    kernel: str
    dtype: str
    Dk: int
    Dv: int
    h: int
    loads: str
    gpu: str
    architecture: str  # whose machine code the GPU runs
    registers: int | None
    stack: int | None
    why: str | None  # no registers and no stack
    smem_bytes: int  # of one block
    slots: int
    slot_bytes: int
    blocks_per_sm: int
    in_flight: int  # bytes an SM, (slots - 1) x slot bytes x blocks
    needed: int
    smem_busy: float  # model: share of shared memory's bandwidth when global memory is saturated


def kernel_of_symbol(symbol: str) -> Key | None:
    """Return which decode kernel a function of the machine code is, None for another one.

    Raises:
        BackendError: a decode kernel whose name has another form.

    >>> kernel_of_symbol("nsa_sel_decode_float16_64x128_h16").Dv
    128
    """
    match = _SYMBOL.search(symbol)
    if match is None:
        if "decode" in symbol:
            raise BackendError(f"symbol: expected nsa_sel_decode_<dtype>_<Dk>x<Dv>_h<heads>, got {symbol}")
        return None
    dtype, Dk, Dv, head_tile, bulk, float8 = match.groups()
    loads, cache = "bulk" if bulk else "cp.async", "float8_e4m3fn" if float8 else "same"
    return Key(dtype, int(Dk), int(Dv), int(head_tile), loads, cache)


def find_cuobjdump() -> Path | None:
    """Return NVIDIA's disassembler: from the wheel nvidia-cuda-cuobjdump, else from PATH, else None."""
    wheels = sorted(found for folder in sys.path for found in Path(folder).glob("nvidia/*/bin/cuobjdump"))
    found = str(wheels[-1]) if wheels else shutil.which("cuobjdump")
    return Path(found) if found else None


def parse_resources(report: str) -> dict[tuple[str, Key], Resources]:
    """Read `cuobjdump --dump-resource-usage`: (architecture, kernel) -> what it uses, decode kernels only."""
    found: dict[tuple[str, Key], Resources] = {}
    architecture, key = "", None
    for line in report.splitlines():
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            key = kernel_of_symbol(match[1])
        elif key is not None and "REG:" in line:
            used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
            found[architecture, key] = Resources(used["REG"], used["STACK"], used["LOCAL"], used["SHARED"])
    return found


@functools.cache
def resources() -> tuple[dict[tuple[str, Key], Resources], str | None]:
    """Return what the built module's kernels use and None, or nothing and the reason why it could not be read."""
    tool = find_cuobjdump()
    if tool is None:
        return {}, "no cuobjdump (package nvidia-cuda-cuobjdump, or a CUDA toolkit on PATH)"
    command = [str(tool), "--dump-resource-usage", str(_build.machine_code())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        return {}, f"cuobjdump failed: {(result.stderr or result.stdout).strip()[:200]}"
    return parse_resources(result.stdout), None


def _core() -> Any:
    if _build.core is None:
        raise BackendError(f"kernels: expected the compiled module, got none: {_build.build_info()['reason']}")
    return _build.core


def plan(key: Key, gpu: Gpu, *, B: int, G: int = 4, L: int = 1024, h: int | None = None) -> dict[str, Any]:
    """Return the compiled planner's answer for a contiguous decode call.

    Args:
        B, G: requests and KV groups, S = 1.
        L: the bound on selected tokens of a row.
        h: query heads per group; the head tile if None.

    Raises:
        ValueError: no configuration fits the GPU.
    """
    h = key.head_tile if h is None else h
    S_kv, n = 65536, 16
    limits = _core().DeviceLimits(
        sm_count=gpu.sm_count, capability=gpu.capability, smem_per_block=gpu.smem_per_block, smem_per_sm=gpu.smem_per_sm
    )  # fmt: skip
    request = _request.pack_fields(
        dtype=_request.DTYPES.index(key.dtype), loads=_request.LOADS.index(key.loads),
        cache=_request.CACHES.index(key.cache), v_factor=1.0,
        B=B, S=1, G=G, h=h, Dk=key.Dk, Dv=key.Dv, S_kv=S_kv, n=n,
        q_strides=(G * h * key.Dk, G * h * key.Dk, h * key.Dk, key.Dk),
        k_strides=(G * S_kv * key.Dk, S_kv * key.Dk, key.Dk), v_strides=(G * S_kv * key.Dv, S_kv * key.Dv, key.Dv),
        out_strides=(G * h * key.Dv, G * h * key.Dv, h * key.Dv, key.Dv), sel_strides=(G * n, G * n, n, 1),
        block_size=64, index_is_64=1, causal=1, scale=1.0, max_selected=L,
    )  # fmt: skip
    launch = _core().DecodeLaunch(request, limits)
    return dict(launch.plan)


def bytes_in_flight(slots: int, slot_bytes: int, blocks_per_sm: int) -> int:
    """Return the bytes that an SM keeps requested: one slot of every ring is being read.

    >>> bytes_in_flight(3, 24_576, 2)
    98304
    """
    return (slots - 1) * slot_bytes * blocks_per_sm


def smem_traffic(tile: dict[str, int]) -> float:
    """Return how many bytes cross shared memory for each byte of K and V (the model above).

    >>> smem_traffic(dict(Dk=192, Dv=128, head_tile=16, head_warps=1, token_warps=4, units=2, rows_k=64,
    ...     cache_bytes=2))
    2.2
    """
    Dk, Dv = tile["Dk"], tile["Dv"]
    heads = tile["units"] * 8  # of one warp
    warps = tile["head_warps"] * tile["token_warps"]
    sub_tiles = tile["rows_k"] // (16 * tile["token_warps"])
    wide = 2 / tile["cache_bytes"]  # elements of Q and P, by those of K and V
    q = 0.0 if tile["head_tile"] == 16 else wide * warps * sub_tiles * heads / tile["rows_k"]
    p = wide * warps * heads / Dv
    k_bytes, v_bytes = 1 + tile["head_warps"] + q, 1 + tile["head_warps"] + p
    return (k_bytes * Dk + v_bytes * Dv) / (Dk + Dv)


def model(tile: dict[str, int], gpu: Gpu) -> float:
    """Return the share of shared memory's bandwidth in use where K and V arrive at full speed, a model."""
    return smem_traffic(tile) * gpu.bandwidth / gpu.sm_count / gpu.clock / SMEM_BYTES_PER_CLOCK


def collect(*, everything: bool = False) -> list[Fact]:
    """Return the facts of this build's kernels on each of `GPUS`.

    Args:
        everything: all instances; otherwise bfloat16 at the dims of the NSA paper and of MiniMax-M3.

    Raises:
        BackendError: this build has no kernels.
    """
    build = _build.build_info()
    if not build["kernels"]:
        raise BackendError(f"kernels: expected a build that has them, got none: {build['reason']}")
    used, why = resources()
    facts = []
    for one in build["instances"]:
        key = Key(one["dtype"], one["Dk"], one["Dv"], one["head_tile"], one.get("loads", "cp.async"), one["cache"])
        if not everything and (key.dtype != "bfloat16" or (key.Dk, key.Dv) not in DEFAULT_DIMS):
            continue
        facts += [
            _fact(one["name"], key, gpu, used, why) for gpu in GPUS if key.loads != "bulk" or gpu.capability >= 90
        ]
    order = {dims: place for place, dims in enumerate(DEFAULT_DIMS)}
    return sorted(facts, key=lambda f: (f.dtype, order.get((f.Dk, f.Dv), len(order)), f.Dk, f.Dv))


def _fact(name: str, key: Key, gpu: Gpu, used: dict[tuple[str, Key], Resources], why: str | None) -> Fact:
    tile = _core().tile_shape(key.Dk, key.Dv, key.head_tile, key.loads, key.cache)
    planned = plan(key, gpu, B=_MANY_ROWS)
    slots, blocks = planned["num_slots"], planned["blocks_per_sm"]
    in_flight = bytes_in_flight(slots, tile["slot_bytes"], blocks)
    busy = model(tile, gpu)
    kernel = used.get((str(gpu.capability), key))
    if kernel is None and why is None:
        why = f"no machine code for sm_{gpu.capability} in this build"
    return Fact(
        kernel=name, dtype=key.dtype, Dk=key.Dk, Dv=key.Dv, h=key.head_tile, loads=key.loads, gpu=gpu.name,
        architecture=f"sm_{gpu.capability}", registers=kernel.registers if kernel else None,
        stack=kernel.stack if kernel else None, why=None if kernel else why, smem_bytes=planned["smem_bytes"],
        slots=slots, slot_bytes=tile["slot_bytes"], blocks_per_sm=blocks, in_flight=in_flight,
        needed=_core().bytes_in_flight_needed(gpu.capability), smem_busy=busy,
    )  # fmt: skip


COLUMNS = (
    "kernel", "GPU", "registers", "stack", "smem / block", "slots x bytes", "blocks / SM", "in flight / SM", "needed",
    "smem busy (model)",
)  # fmt: skip


def cells(fact: Fact) -> tuple[str, ...]:
    """Return the texts of one row, in the order of `COLUMNS`; sizes in bytes."""
    binary = [NOT_MEASURED if value is None else str(value) for value in (fact.registers, fact.stack)]
    return (
        fact.kernel, f"{fact.gpu}, {fact.architecture}", *binary, f"{fact.smem_bytes:,}",
        f"{fact.slots} x {fact.slot_bytes:,}", str(fact.blocks_per_sm), f"{fact.in_flight:,}", f"{fact.needed:,}",
        f"{fact.smem_busy:.0%}",
    )  # fmt: skip


def notes(facts: Iterable[Fact]) -> list[str]:
    """Return what has to stand below the table: why cells are empty, and what the GPUs' figures are."""
    lines = [f"registers, stack: {NOT_MEASURED}: {why}" for why in sorted({f.why for f in facts if f.why})]
    figures = "; ".join(
        f"{gpu.name} {gpu.bandwidth / 1e12:.3g} TB/s, {gpu.clock / 1e9:.4g} GHz ({gpu.source})" for gpu in GPUS
    )
    return [*lines, f"model: from {figures}. No speed in this table was measured."]


def markdown(facts: list[Fact]) -> str:
    """Return the table as docs/kernels.md shows it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(fact)) + " |" for fact in facts]
    return "\n".join([*lines, "", *notes(facts)]) + "\n"
