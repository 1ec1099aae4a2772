"""What a call costs before its kernel runs: microseconds of checking, routing, planning and allocating on the host.

python -m benchmarks.call_cost [--json]

CPU tensors stand for those of a GPU and the launch is a no-op, so that no GPU is needed: the device guard, the stream
and the CUDA allocator are NOT MEASURED. Beside each time stands its ratio to `torch.empty_like` of the output, timed in
the same run and in turns with it, since a machine's speed drifts. "same" repeats one call; "new" changes softmax_scale
in each call; "growing" adds a page to S_kv in each call. "cuda" reads tensors through torch's DLPack exchange interface
(torch 2.11 and later), "cuda, attributes" one attribute after another, as it must where torch has none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import nsa_sel
from nsa_sel import _build, _core, backends, devices, entry
from nsa_sel._build import BuildInfo, Instance
from nsa_sel.backends import cuda
from nsa_sel.call import Call
from nsa_sel.devices import DeviceInfo, StandIn

ROUTES = ("cuda", "cuda, attributes", "triton", "sdpa")
HAS_EXCHANGE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
ROUNDS, CALLS = 15, 400
H200 = StandIn(DeviceInfo("NVIDIA H200", (9, 0), 132))
LIMITS = _core.DeviceLimits(sm_count=132, capability=90, smem_per_block=232_448, smem_per_sm=233_472)


def arguments(S_kv: int) -> dict[str, Any]:
    """A decode step of MiniMax-M3's shape, paged: eight requests of S_kv tokens."""
    B, G, h, D, page, n = 8, 4, 16, 128, 128, 16
    pool = torch.zeros(4, G, page, D, dtype=torch.bfloat16)
    pages = -(-S_kv // page)
    return {
        "q": torch.zeros(B, 1, G, h, D, dtype=torch.bfloat16),
        "k": pool,
        "v": pool,
        "block_indices": torch.zeros(B, 1, G, n, dtype=torch.int32),
        "block_size": page,
        "seq_lens": torch.full((B,), S_kv, dtype=torch.int32),
        "block_table": torch.zeros(B, pages, dtype=torch.int32),
    }


def allocated(call: Call) -> tuple[torch.Tensor, None]:
    """What the backends that PyTorch and Triton launch do, but for the launch: allocate the result."""
    return call.v.new_empty((call.B, call.S, call.G, call.h, call.Dv)), None


@contextlib.contextmanager
def pretended(exchange: bool = True) -> Iterator[None]:
    """Let CPU tensors be routed as those of a GPU, and replace what would compute."""
    build = BuildInfo(
        True,
        None,
        tuple(Instance(*(i[n] for n in Instance._fields)) for i in _core.instances() if i["loads"] != "bulk"),
    )
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (devices, "stand_in", lambda: H200),
            (_build, "routing_build", lambda: build),
            (cuda, "device_limits", lambda index: LIMITS),
            (cuda, "_driver_bar", lambda call: None),
            (backends.get("sdpa"), "run", allocated),
            (backends.get("triton"), "run", allocated),
            (backends.get("triton"), "limits", lambda call, device: None),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        entry.set_up(exchange)
        _core.replace_launches(1)
        try:
            yield
        finally:
            _core.replace_launches(0)
            entry.set_up()
            nsa_sel.refresh_routing()


def timed(call: Callable[[int], Any]) -> float:
    """Return microseconds of one call."""
    start = time.perf_counter()
    for i in range(CALLS):
        call(i)
    return (time.perf_counter() - start) / CALLS * 1e6


def measure(route: str) -> dict[str, dict[str, float]]:
    """Return {what: {us, ratio}} of one route: medians over rounds, in turns with `torch.empty_like`."""
    given = arguments(4096)
    q, k, v, seq_lens, block_table = (given[name] for name in ("q", "k", "v", "seq_lens", "block_table"))
    blocks, backend = given["block_indices"], route.partition(",")[0]
    out = torch.empty_like(q)
    tables = [torch.zeros(8, pages, dtype=torch.int32) for pages in range(32, 32 + CALLS)]

    def step(softmax_scale: float | None, block_table: torch.Tensor) -> Any:
        # as an engine writes it: keywords that came from a dictionary would be timed as well
        return nsa_sel.selection_attention(
            q, k, v, block_indices=blocks, block_size=128, seq_lens=seq_lens, block_table=block_table,
            softmax_scale=softmax_scale, backend=backend,
        )  # fmt: skip

    calls: dict[str, Callable[[int], Any]] = {
        "same": lambda i: step(None, block_table),
        "new": lambda i: step(0.1 + i * 1e-6, block_table),
        "growing": lambda i: step(None, tables[i]),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    with pretended(exchange="attributes" not in route):
        before = sum(nsa_sel.stats().get(backend, {}).values())
        for _ in range(ROUNDS):
            for name, call in calls.items():
                _core.forget_launches()  # else the calls of one round would be hits in the next
                call(0)
                anchor = timed(lambda i: torch.empty_like(out))
                times[name].append(timed(call))
                ratios[name].append(times[name][-1] / anchor)
        ran = sum(nsa_sel.stats()[backend].values()) - before
    if ran != ROUNDS * (CALLS + 1) * len(calls):
        raise RuntimeError(f"{route}: expected {ROUNDS * (CALLS + 1) * len(calls)} calls to have run there, got {ran}")
    return {
        name: {"us": round(min(times[name]), 2), "ratio": round(statistics.median(ratios[name]), 2)} for name in calls
    }


def main() -> None:
    """Print the table, and with --json a last line of the kernel's route."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON: the kernel's route")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {route: measure(route) for route in ROUTES if HAS_EXCHANGE or route != "cuda"}
    kernel = found["cuda" if HAS_EXCHANGE else "cuda, attributes"]
    print(f"torch {torch.__version__}; launch replaced by a no-op; device guard, stream, CUDA allocator: NOT MEASURED")
    print(f"{'route':18}{'call':10}{'us (least)':>12}{'x empty_like':>14}")
    for route, rows in found.items():
        for name, row in rows.items():
            print(f"{route:18}{name:10}{row['us']:12.2f}{row['ratio']:14.2f}")
    if options.json:
        print(json.dumps({"hit": kernel["same"], "miss": kernel["new"]}))


if __name__ == "__main__":
    main()
