"""Counts of calls: what ran, why, and nothing that did not run."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import nsa_sel
from nsa_sel.backends import sdpa


def small_call() -> dict[str, Any]:
    q, k = torch.zeros(1, 1, 1, 2, 8), torch.zeros(1, 1, 4, 8)
    return {"q": q, "k": k, "v": k, "ranges": torch.tensor([[[[[0, 4]]]]])}


def test_calls_are_counted_by_backend_and_reason() -> None:
    assert nsa_sel.stats() == {}
    nsa_sel.selection_attention(**small_call())
    nsa_sel.selection_attention(**small_call())
    nsa_sel.selection_attention(**small_call(), backend="sdpa")
    assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 2, "backend='sdpa'": 1}}
    nsa_sel.reset_stats()
    assert nsa_sel.stats() == {}


def test_what_did_not_run_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    nsa_sel.explain(**small_call())
    with pytest.raises(nsa_sel.ArgumentError):
        nsa_sel.selection_attention(**small_call(), softmax_scale=float("nan"))
    with pytest.raises(nsa_sel.BackendError):
        nsa_sel.selection_attention(**small_call(), backend="cuda")

    def fail(*arguments: Any) -> None:
        raise MemoryError("too large")

    monkeypatch.setattr(sdpa, "run", fail)
    with pytest.raises(MemoryError):
        nsa_sel.selection_attention(**small_call())
    assert nsa_sel.stats() == {}


def test_the_answer_is_a_copy() -> None:
    nsa_sel.selection_attention(**small_call())
    nsa_sel.stats()["sdpa"].clear()
    assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 1}}


def test_no_count_is_lost_between_threads() -> None:
    arguments = small_call()
    before = sdpa.counters().calls
    threads = [
        threading.Thread(target=lambda: [nsa_sel.selection_attention(**arguments) for _ in range(20)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 160}}
    assert sdpa.counters().calls - before == 160


def test_empty_calls_are_counted_too() -> None:
    arguments = small_call()
    arguments["ranges"] = torch.zeros(1, 1, 1, 0, 2, dtype=torch.int32)
    nsa_sel.selection_attention(**arguments)
    assert nsa_sel.stats() == {"sdpa": {"tensors on cpu": 1}}
