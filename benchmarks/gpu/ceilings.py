"""What nothing can be faster than, in this run: writes ceilings.csv, whose times stay empty without a GPU.

A streaming read by byte count, an empty kernel as a node of a CUDA graph, the host's time for PyTorch's smallest call.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import nsa_sel
from benchmarks.gpu.runner import arguments, finish
from nsa_sel.measure.files import csv_text, write_atomically
from nsa_sel.measure.run import clock
from nsa_sel.measure.run.ceiling import fastest_reader
from nsa_sel.measure.run.inputs import MAX_VARIANTS
from nsa_sel.measure.schema import TIMES

MB = 10**6
COLUMNS = ("what", "mode", "bytes", "nodes", *TIMES, "gbps", "how", "device")
SIZES = (MB, 2_621_440, 16 * MB, 64 * MB, 256 * MB, 512 * MB, 1024 * MB)  # 2,621,440: the NSA paper's step at B = 1
NODES = tuple(range(2, MAX_VARIANTS + 1, 2))  # as many as a benchmark's graph may hold calls: what is subtracted from
Rows = list[dict[str, Any]]
ITERS, WARMUP = 50, 5
HOST_CALLS = 200


def reads(device: torch.device, sizes: tuple[int, ...], modes: tuple[str, ...], iters: int) -> Rows:
    """Return rows of a streaming read of each size in each mode, over buffers that take turns."""
    rows = []
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    for size in sizes:
        count = min(max(2, -(-2 * l2 // size)), MAX_VARIANTS)
        for mode in modes:
            memory = torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else 1 << 28
            name, read, calls = fastest_reader(size, count, mode, device, memory)
            samples = clock.samples(calls, mode, device, iters, WARMUP)
            row = {"what": "streaming read", "mode": mode, "bytes": read, "nodes": count} | clock.columns(samples)
            rows.append(row | {"gbps": clock.figure(read / clock.quantiles(samples)[0] / 1e6), "how": name})
    return rows


def empty_nodes(device: torch.device) -> Rows:
    """Return rows of graphs of so many kernels that do nothing, the time for one of them."""
    rows = []
    for count in NODES:
        samples = clock.samples([lambda: torch.cuda._sleep(0)] * count, "graph", device, ITERS, WARMUP)
        rows.append({"what": "empty kernel", "mode": "graph", "bytes": 0, "nodes": count} | clock.columns(samples))
    return rows


def host_time(call: Callable[[], Any], device: torch.device, rounds: int, calls: int) -> list[float]:
    """Return samples of the host's own milliseconds for a call that the GPU is not waited for."""
    samples = []
    for _ in range(rounds):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) * 1e3 / calls)
    torch.cuda.synchronize(device)
    return samples


def host_overheads(device: torch.device) -> Rows:
    """Return rows of what an eager call costs the host: PyTorch's smallest one beside this package's."""
    q = torch.randn(1, 1, 4, 16, 192, dtype=torch.bfloat16, device=device)
    k = torch.randn(1, 4, 512, 192, dtype=torch.bfloat16, device=device)
    v = torch.randn(1, 4, 512, 128, dtype=torch.bfloat16, device=device)
    blocks = torch.zeros(1, 1, 4, 1, dtype=torch.int32, device=device)
    small = torch.zeros(1, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "eager call of torch.neg": lambda: torch.neg(small),
        "eager call of selection_attention": lambda: nsa_sel.selection_attention(
            q, k, v, block_indices=blocks, block_size=64, backend="cuda"
        ),
    }
    rows = []
    for what, call in calls.items():
        host_time(call, device, WARMUP, HOST_CALLS)
        samples = host_time(call, device, ITERS, HOST_CALLS)
        rows.append({"what": what, "mode": "host", "bytes": 0, "nodes": HOST_CALLS} | clock.columns(samples))
    return rows


def planned(sizes: tuple[int, ...]) -> Rows:
    """Return the rows that a GPU would fill."""
    rows = [{"what": "streaming read", "mode": mode, "bytes": size} for size in sizes for mode in ("eager", "graph")]
    rows += [{"what": "empty kernel", "mode": "graph", "bytes": 0, "nodes": count} for count in NODES]
    calls = ("eager call of torch.neg", "eager call of selection_attention")
    return rows + [{"what": what, "mode": "host", "bytes": 0, "nodes": HOST_CALLS} for what in calls]


def main() -> None:
    """Measure all and write ceilings.csv."""
    options = arguments(__doc__)
    dry = options.dry or not torch.cuda.is_available()
    sizes = SIZES[:3] if options.small else SIZES
    if dry:
        reads(torch.device("cpu"), sizes[:1], ("eager",), 1)  # the reader itself works; its time on a CPU is nobody's
        rows, name = planned(sizes), "no GPU"
    else:
        device = torch.device("cuda", 0)
        name = torch.cuda.get_device_name(device)
        rows = reads(device, sizes, ("eager", "graph"), ITERS) + empty_nodes(device) + host_overheads(device)
    text = csv_text(COLUMNS, (dict.fromkeys(COLUMNS, "") | row | {"device": name} for row in rows))
    write_atomically(options.out / "ceilings.csv", text)
    finish(False, dry, f"{len(rows)} rows")


if __name__ == "__main__":
    main()
