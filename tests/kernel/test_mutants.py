"""The proofs about the kernel can fail: kernels that are wrong on purpose, built from changed copies of the sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.host_run import mutants
from tests.host_run.lookahead import assert_next_items_keys_fly_early

# Before a segment's first tile, wait until every slot has been read: the ring is empty between segments and items.
SEGMENT_BEGINS = "    if (tokens < 0) break;\n"
DRAIN = """
    RingCursor every = slot;
    for (int i = 0; i < p.smem.num_slots; ++i) {
      dev::mbarrier_wait(smem.slot_empty + every.slot, every.phase ^ 1);
      every.advance(p.smem.num_slots);
    }
"""


def test_a_ring_that_drains_between_items_is_found(tmp_path: Path) -> None:
    root = mutants.copy_sources(tmp_path, (192, 128))
    mutants.patch(root, "cuda/loader.cuh", SEGMENT_BEGINS, SEGMENT_BEGINS + DRAIN)
    for loads in ("cp.async", "bulk"):
        for schedule in (0, 1, 2):
            with pytest.raises(AssertionError, match="the ring ran empty between items"):
                assert_next_items_keys_fly_early(schedule, loads, root)
