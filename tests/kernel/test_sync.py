"""Every barrier, wait, fence and arrival of the kernel is needed: without any one the emulator finds a fault."""

from __future__ import annotations

import pytest
import torch

import nsa_sel
from tests import host_run
from tests.host_run import mutation
from tests.host_run.mutation import REDUNDANT, SCENARIOS, Scenario


@pytest.mark.parametrize("schedule", [0, 1, 2])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_scenario_is_clean_as_it_stands(scenario: Scenario, schedule: int) -> None:
    run = scenario.run(schedule)
    assert run.findings == []
    assert run.lse is not None
    assert not torch.isnan(run.out).any()


def test_dropping_any_synchronisation_is_found() -> None:
    sites = mutation.executed_sites()
    kinds = {site.kind for site in sites}
    expected = {"BAR", "CLUSTER", "CP_ASYNC_ARRIVE", "GRIDDEP", "MBAR_ARRIVE", "MBAR_WAIT", "WAIT", "WARPSYNC"}
    assert expected <= kinds, f"the scenarios no longer reach {expected - kinds}"
    unnoticed = [site.key for site in sites if not site.findings()]
    assert [key for key in unnoticed if (key[0], key[1]) not in REDUNDANT] == []
    assert len(REDUNDANT) <= 3


def test_scenarios_reach_every_synchronisation_that_the_suite_reaches() -> None:
    """A site that only a larger case executes would be one that no mutation looks at."""
    known = {site.key for site in mutation.executed_sites()}
    torch.manual_seed(0)
    for h, dims in ((16, (64, 64)), (64, (192, 128)), (5, (128, 64))):
        q = torch.randn(3, 2, 2, h, dims[0]).bfloat16()
        k, v = torch.randn(3, 2, 400, dims[0]).bfloat16(), torch.randn(3, 2, 400, dims[1]).bfloat16()
        start = torch.randint(0, 300, (3, 2, 2, 40))
        ranges = torch.stack([start, start + 20], -1)
        for device in (host_run.Device(), mutation.H200):
            run = host_run.selection_attention(q, k, v, ranges, options=host_run.Options(device=device))
            assert {(s.kind, s.file, s.line) for s in run.counters["sync_sites"]} <= known


def test_host_run_holds_the_instances_of_the_build() -> None:
    compiled = nsa_sel.build_info()["instances"]
    if not compiled:
        pytest.skip(f"this build has no kernels: {nsa_sel.build_info()['reason']}")
    assert {
        tuple(i[name] for name in ("dtype", "Dk", "Dv", "head_tile", "loads", "cache")) for i in compiled
    } == host_run.instances()
