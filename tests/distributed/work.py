"""What the ranks of a test do. Each function runs on every rank; what it returns goes back to the test."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers the backend

import nsa_sel
from nsa_sel import distributed
from nsa_sel.testing import make_inputs
from tests.cases import CASES, case
from tests.distributed.ranks import part_of, room

Result = tuple[torch.Tensor, torch.Tensor]

SHARDED = ("many-rows", "h4", "pages-minimax-m3", "dims-192x128-fp32")  # h divides by 4, and G is 1 or 2
LOST_TIMEOUT = 3.0  # seconds that a collective waits for a rank that is lost


def spread(name: str, rank: int, world: int, interleave: int | None, **more: Any) -> Any:
    """Run a case with its cache spread over the ranks."""
    chosen = case(name)
    arguments = part_of(chosen.inputs(), room(chosen.S_kv, rank, world, interleave, chosen.page_size))
    return distributed.selection_attention(**arguments | chosen.options, return_lse=True, interleave=interleave, **more)


def every_case(rank: int, world: int) -> dict[tuple[str, int | None], Result]:
    """Run every case that is not heavy, spread in one run per rank and in runs of 8 or 3 tokens; twice."""
    results = {}
    for interleave in (None, 8 if world == 2 else 3):
        for chosen in CASES:
            if not chosen.heavy:
                first, again = (spread(chosen.name, rank, world, interleave) for _ in range(2))
                assert all(map(torch.equal, first, again)), chosen.name
                results[chosen.name, interleave] = first
    assert set(nsa_sel.stats()) == {"sdpa"}
    return results


def shares_of_heads(rank: int, world: int) -> dict[str, tuple[Result, Result]]:
    """Return, for each case, all heads and this rank's share of them."""
    return {
        name: (spread(name, rank, world, None), spread(name, rank, world, None, shard_heads=True)) for name in SHARDED
    }


def groups_sharded(rank: int, world: int) -> Result:
    """Run this rank's groups of a cache that is spread by groups, with every collective forbidden."""
    inputs = case("many-rows").inputs()
    mine = slice(rank * inputs.k.shape[1] // world, (rank + 1) * inputs.k.shape[1] // world)
    assert inputs.ranges is not None
    arguments = inputs.arguments() | dict(
        q=inputs.q[:, :, mine], k=inputs.k[:, mine], v=inputs.v[:, mine], ranges=inputs.ranges[:, :, mine]
    )
    with mock.patch.object(dist, "all_to_all_single", None), mock.patch.object(distributed, "_all_gather", None):
        return nsa_sel.selection_attention(**arguments, return_lse=True)


def two_by_two(rank: int, world: int) -> Result:
    """Shard two groups over two halves of the ranks, and the tokens of each over the two ranks of a half."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    inputs = case("many-rows").inputs()
    g = rank // 2
    assert inputs.ranges is not None
    half = replace(
        inputs, q=inputs.q[:, :, g : g + 1], k=inputs.k[:, g : g + 1], v=inputs.v[:, g : g + 1],
        ranges=inputs.ranges[:, :, g : g + 1],
    )  # fmt: skip
    arguments = part_of(half, room(256, rank % 2, 2, None))
    assert "that this process" in refusal(**arguments, group=halves[1 - g])
    return distributed.selection_attention(**arguments, return_lse=True, group=halves[g])


def messages(rank: int, world: int) -> dict[str, list[int]]:
    """Return the bytes that each collective was given, for all heads and for shares of them."""
    sent: dict[str, list[int]] = {"all_gather": [], "all_to_all": []}

    def spy(name: str, real: Any) -> Any:
        def collective(received: torch.Tensor, message: torch.Tensor, **more: Any) -> None:
            sent[name].append(message.numel() * message.element_size())
            real(received, message, **more)

        return collective

    with (
        mock.patch.object(distributed, "_all_gather", spy("all_gather", distributed._all_gather)),
        mock.patch.object(dist, "all_to_all_single", spy("all_to_all", dist.all_to_all_single)),
    ):
        spread("many-rows", rank, world, None)
        spread("many-rows", rank, world, None, shard_heads=True)
    return sent


def refusals(rank: int, world: int) -> dict[str, str]:
    """Return the message of each call that must be refused: all but the two last before anything is sent."""
    arguments = part_of(case("h4").inputs(), room(256, rank, world, None))
    longer = arguments | {name: torch.zeros(1, 2, 128 + 64 * rank, 64, dtype=torch.bfloat16) for name in ("k", "v")}
    odd_heads = {name: arguments[name][:, :, :1] for name in ("q", "ranges")}
    odd_heads = odd_heads | {name: arguments[name][:, :1] for name in ("k", "v")}
    odd_heads["q"] = odd_heads["q"][..., :3, :]
    calls: dict[str, dict[str, Any]] = {
        "zero interleave": arguments | dict(interleave=0),
        "no divisor": arguments | dict(interleave=48),
        "no integer": arguments | dict(interleave=2.0),
        "gradients": arguments | dict(q=arguments["q"].clone().requires_grad_()),
        "heads": arguments | odd_heads | dict(shard_heads=True),
        "dtype": arguments | dict(k=arguments["k"].float()),
        "other runs": arguments | dict(interleave=16 + 16 * rank),
        "other caches": longer,
    }
    return {name: refusal(**call) for name, call in calls.items()}


def refusal(**call: Any) -> str:
    """Return the type and the message of the error that a call raises."""
    try:
        distributed.selection_attention(**call)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def compiled(rank: int, world: int) -> list[tuple[Result, Result]]:
    """Return what eager calls give and what one graph without breaks gives, for all heads and for shares of them."""
    results = []
    for share in (False, True):
        arguments = part_of(case("many-rows").inputs(), room(256, rank, world, 8))

        def call(**tensors: Any) -> Result:
            return distributed.selection_attention(**tensors, return_lse=True, interleave=8, shard_heads=share)  # noqa: B023

        traced = torch.compile(call, fullgraph=True, backend="aot_eager")
        results.append((call(**arguments), traced(**arguments)))
    return results


def unseen(rank: int, world: int) -> list[torch.Size]:
    """Call with fake CUDA tensors and collectives that send nothing: whatever read a value back would raise."""
    group = dist.new_group(backend="fake")
    arguments = part_of(case("pages-blocks").inputs(), room(256, rank, world, 8, 64))
    with FakeTensorMode():
        fake = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
            if isinstance(value, torch.Tensor)
            else value
            for name, value in arguments.items()
        }
        calls = [fake | dict(interleave=8, group=group, shard_heads=share) for share in (False, True)]
        results = [distributed.selection_attention(**call) for call in calls]
    assert {result.device.type for result in results} == {"cuda"}
    return [result.shape for result in results]


def together(rank: int, world: int) -> dict[str, Any]:
    """Do all that two or four ranks can do one after another, since starting them takes longer than that."""
    works = [
        every_case,
        shares_of_heads,
        messages,
        *([refusals, groups_sharded, compiled, unseen] if world == 2 else [two_by_two]),
    ]
    return {work.__name__: work(rank, world) for work in works}


def one_rank_is_lost(rank: int, world: int) -> dict[str, tuple[str, float]]:
    """Lose rank 1, which first does not come to a collective and then is killed in the middle of one.

    Return for each what this rank got instead of a result, and after how many seconds.
    """
    arguments = part_of(make_inputs(ranges=torch.tensor([[[[[0, 256]]]]])), room(256, rank, world, None))
    groups = {how: dist.new_group(timeout=timedelta(seconds=LOST_TIMEOUT)) for how in ("absent", "killed")}
    for group in groups.values():
        distributed.selection_attention(**arguments, group=group)
    told = {}
    for how, group in groups.items():
        begin = time.monotonic()
        if how == "killed":
            if rank == 1:
                # the last rank lets the others wait, so that this one dies while it waits with them
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
            elif rank == world - 1:
                time.sleep(1.0)
        if rank != 1 or how == "killed":
            call = time.monotonic()
            error = refusal(**arguments, group=group)
            told[how] = (error, time.monotonic() - call)
        # stay alive as a server would: the others' errors may not depend on this process going too
        time.sleep(max(0.0, begin + 2 * LOST_TIMEOUT - time.monotonic()))
    return told
