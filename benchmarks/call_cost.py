"""What a call costs before its kernel runs: microseconds of checking, routing, planning and allocating on the host.

python -m benchmarks.call_cost [--json]

CPU tensors stand in for CUDA tensors and the launch is a no-op, so that no GPU is needed: the device guard, the stream
and the CUDA allocator are NOT MEASURED. Beside each time stands its ratio to `torch.empty_like` of the output, timed in
the same run and in turns with it, since a machine's speed drifts. "same" repeats one call; "new" changes softmax_scale
in each call; "growing" adds a page to S_kv in each call.
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
from nsa_sel import _build, _core, backends, devices, execute
from nsa_sel._build import BuildInfo, Instance
from nsa_sel.backends import cuda
from nsa_sel.call import Call
from nsa_sel.devices import DeviceInfo

ROUTES = ("cuda", "triton", "sdpa")
ROUNDS, CALLS = 15, 400
H200 = DeviceInfo("NVIDIA H200", (9, 0), 132)
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


def planned(call: Call) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the kernel's backend does for a call, but for the launch and what only a GPU has."""
    shape = (call.B, call.S, call.G, call.h)
    out = call.out if call.out is not None else call.v.new_empty((*shape, call.Dv))
    lse = call.q.new_empty(shape, dtype=torch.float32) if call.return_lse else None
    launch = cuda.plan(call, out, lse, LIMITS)
    if launch.workspace_floats > 0:
        torch.empty(launch.workspace_floats, dtype=torch.float32)
    cuda.offer(call, launch)
    return out, lse


def allocated(call: Call) -> tuple[torch.Tensor, None]:
    """The same for the other backends: they allocate the result."""
    return call.v.new_empty((call.B, call.S, call.G, call.h, call.Dv)), None


@contextlib.contextmanager
def pretended(route: str) -> Iterator[None]:
    """Let CPU tensors be routed as those of a GPU, and replace what would compute."""
    build = BuildInfo(
        True,
        None,
        tuple(Instance(*(i[n] for n in Instance._fields)) for i in _core.instances() if i["loads"] != "bulk"),
    )
    real_check = execute.check

    def check(*given: Any, **keywords: Any) -> Call:
        call = real_check(*given, **keywords)
        if route != "sdpa":
            call.device_type = "cuda"
        return call

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (execute, "check", check),
            (_build, "routing_build", lambda: build),
            (devices, "info", lambda index: H200),
            (cuda, "run", planned),
            (cuda, "_driver_bar", lambda call: None),
            (backends.get("sdpa"), "run", allocated),
            (backends.get("triton"), "run", allocated),
            (backends.get("triton"), "limits", lambda call, device: None),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        _core.replace_launches(1)
        try:
            yield
        finally:
            _core.replace_launches(0)
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
    out = nsa_sel.selection_attention(**given)
    tables = [torch.zeros(8, pages, dtype=torch.int32) for pages in range(32, 32 + CALLS)]
    calls: dict[str, Callable[[int], Any]] = {
        "same": lambda i: nsa_sel.selection_attention(**given, backend=route),
        "new": lambda i: nsa_sel.selection_attention(**given, backend=route, softmax_scale=0.1 + i * 1e-6),
        "growing": lambda i: nsa_sel.selection_attention(**(given | {"block_table": tables[i]}), backend=route),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    with pretended(route):
        before = sum(nsa_sel.stats().get(route, {}).values())
        for _ in range(ROUNDS):
            for name, call in calls.items():
                _core.forget_launches()  # else the calls of one round would be hits in the next
                call(0)
                anchor = timed(lambda i: torch.empty_like(out))
                times[name].append(timed(call))
                ratios[name].append(times[name][-1] / anchor)
        ran = sum(nsa_sel.stats()[route].values()) - before
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
    found = {route: measure(route) for route in ROUTES}
    print("launch replaced by a no-op; device guard, stream and CUDA allocator: NOT MEASURED")
    print(f"{'route':8}{'call':10}{'us (least)':>12}{'x empty_like':>14}")
    for route, rows in found.items():
        for name, row in rows.items():
            print(f"{route:8}{name:10}{row['us']:12.2f}{row['ratio']:14.2f}")
    if options.json:
        print(json.dumps({"hit": found["cuda"]["same"], "miss": found["cuda"]["new"]}))


if __name__ == "__main__":
    main()
