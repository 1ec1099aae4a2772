"""What `out` may share with whom, what may be huge, and what a fork leaves behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nsa_sel
from nsa_sel import _overlap, execute
from nsa_sel.backends import sdpa


def arguments(**changes: Any) -> dict[str, Any]:
    q, k, v = torch.randn(1, 1, 2, 4, 8), torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    return {"q": q, "k": k, "v": v, "ranges": torch.tensor([[0, 9]]).expand(1, 1, 2, 1, 2)} | changes


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=4),
)
def test_an_overlap_is_found_where_two_elements_meet(dims: list[tuple[int, int]]) -> None:
    shape, strides = zip(*dims, strict=True)
    tensor = torch.empty(400).as_strided(shape, strides)
    places = torch.zeros(1, dtype=torch.int64)
    for extent, stride in dims:
        places = (places[:, None] + stride * torch.arange(extent)).view(-1)
    assert _overlap.overlaps_itself(tensor) is (len(places.unique()) < len(places))


@pytest.mark.parametrize("strides", [(64, 64, 4, 8, 1), (64, 64, 32, 0, 1), (0, 0, 30, 8, 1)])
def test_an_out_that_overlaps_itself_is_refused(strides: tuple[int, ...]) -> None:
    out = torch.zeros(200).as_strided((1, 1, 2, 4, 8), strides)
    with pytest.raises(nsa_sel.ArgumentError, match="out: expected memory of its own for each element, got strides"):
        nsa_sel.selection_attention(**arguments(out=out))
    assert not out.any()


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_an_out_that_is_an_input_is_refused(name: str) -> None:
    pool = torch.randn(512)
    shapes = {"q": (1, 1, 2, 4, 8), "k": (1, 2, 16, 8), "v": (1, 2, 16, 8)}
    given = arguments()
    size = given[name].numel()
    given[name] = pool[:size].view(shapes[name])
    out = pool[size - 1 : size + 63].view(1, 1, 2, 4, 8)
    with pytest.raises(nsa_sel.ArgumentError, match=f"out: expected memory of its own, got some that is {name}'s too"):
        nsa_sel.selection_attention(**given, out=out)
    free = pool[size : size + 64].view(1, 1, 2, 4, 8)
    assert nsa_sel.selection_attention(**given, out=free) is free


def test_an_out_between_the_columns_of_an_input_is_taken() -> None:
    """Packed buffers interleave: addresses that enclose each other are no overlap."""
    both = torch.randn(1, 1, 2, 4, 16)
    q, out = both[..., :8], both[..., 8:]
    expected = nsa_sel.selection_attention(**(given := arguments(q=q)))
    assert nsa_sel.selection_attention(**given, out=out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_a_scale_beyond_every_float_is_an_argument_error(value: int) -> None:
    with pytest.raises(nsa_sel.ArgumentError, match="softmax_scale: expected a finite float"):
        nsa_sel.selection_attention(**arguments(softmax_scale=value))


def test_blocks_of_any_size_become_ranges() -> None:
    found = nsa_sel.blocks_to_ranges(torch.tensor([0, 1, -1]), 2**70)
    assert found.tolist() == [[0, 2**63 - 1], [2**63 - 1, 2**63 - 1], [0, 0]]


def test_a_block_far_behind_a_huge_cache_is_behind_it() -> None:
    """Block 2^33 of 2^31 tokens begins at token 2^64, which 64 bits take for token 0."""
    pages, page_size = 2**20, 2**40
    k = torch.ones(1, 1, 1, 8).expand(1, 1, page_size, 8)
    table = torch.zeros(1, pages, dtype=torch.int32)
    out, lse = nsa_sel.selection_attention(
        torch.ones(1, 1, 1, 1, 8), k, k, block_indices=torch.tensor([[[[2**33]]]]), block_size=2**31,
        block_table=table, seq_lens=torch.tensor([10], dtype=torch.int32), return_lse=True, backend="sdpa",
    )  # fmt: skip
    assert not out.any()
    assert lse.item() == float("-inf")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork:RuntimeWarning")  # of JAX, where another test has imported it
@pytest.mark.parametrize(
    "lock", [sys.modules["nsa_sel.stats"]._lock, execute._lock, sdpa._lock], ids=["stats", "execute", "sdpa"]
)
def test_a_child_of_a_fork_can_call_whatever_another_thread_was_doing(lock: threading.Lock) -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            release.wait(0.5)  # longer than a fork that does not wait takes

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    assert _in_child(lambda: lock.acquire(timeout=5)) == 0
    thread.join()


def _in_child(work: Callable[[], bool]) -> int:
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if work() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
