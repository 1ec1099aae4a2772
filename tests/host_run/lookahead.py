"""The pipeline between two items of one block: what was loaded before what was computed."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.host_run.abi import ROOT, Device
from tests.host_run.kernel import Options, selection_attention

_LOAD = {"cp.async": "LDGSTS", "bulk": "BULK"}  # events that bring K and V, by way of loading


def assert_next_items_keys_fly_early(schedule: int, loads: str = "cp.async", root: Path = ROOT) -> None:
    """Run two rows of 250 tokens at the NSA paper's shape in one block and look at the trace.

    Raises:
        AssertionError: the second row's first K load came after the first row's last MMA: the ring ran empty.
    """
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 1, 1, 16, 192, generator=generator).bfloat16()
    k = torch.randn(2, 1, 512, 192, generator=generator).bfloat16()
    v = torch.randn(2, 1, 512, 128, generator=generator).bfloat16()
    spans = torch.tensor([[0, 200], [250, 300]]).expand(2, 1, 1, 2, 2)
    one_block = Device(
        sm_count=1, capability=90 if loads == "bulk" else 89, smem_per_block=101_376, smem_per_sm=102_400
    )
    options = Options(device=one_block, trace=True, loads=loads, root=root)
    result = selection_attention(q, k, v, spans, num_splits=1, schedule=schedule, options=options)
    assert result.findings == []
    assert result.counters["plan"]["grid"] == 1
    trace = result.counters["trace"]
    second = k[0].numel() * 2  # bytes: where request 1's keys begin
    first_load = next(i for i, e in enumerate(trace) if e.op == _LOAD[loads] and e.buffer == "k" and e.offset >= second)
    products = [i for i, e in enumerate(trace) if e.op == "MMA"]
    last_product_of_first = products[len(products) // 2 - 1]  # both rows have the same work
    assert first_load < last_product_of_first, f"schedule {schedule}: the ring ran empty between items"
