"""Mutation of the kernel's synchronisation: the sites that runs execute, and what the emulator says without one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.host_run.kernel import Device, HostRun, Options, selection_attention

H200 = Device(sm_count=4, capability=90, smem_per_block=232_448, smem_per_sm=233_472)
ONE_H200_SM = replace(H200, sm_count=1)
A100 = Device(sm_count=1, capability=80, smem_per_block=166_912, smem_per_sm=167_936)


@dataclass(frozen=True)
class Scenario:
    """A small run that reaches a part of the kernel; together they execute every synchronisation in it."""

    name: str
    h: int
    dims: tuple[int, int]
    B: int
    spans: tuple[int, ...]  # length of every span of a row
    device: Device
    num_splits: int | None = None
    G: int = 1
    empty: tuple[int, ...] = ()  # requests that see no token
    page_size: int = 0
    loads: str = "cp.async"
    float8: bool = False  # K and V, with a scale a token; q in fp16

    def run(self, schedule: int, drop: tuple[str, str, int] | None = None, trace: bool = False) -> HostRun:
        """Run with one synchronisation left out."""
        q, k, v, keywords = self._inputs()
        if self.float8:
            q, k, v = q.half(), k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)
            k_scale, v_scale = torch.rand(2, *k.shape[:3], generator=torch.Generator().manual_seed(8))
            keywords |= {"k_scale": k_scale, "v_scale": v_scale}
        options = Options(drop=drop, device=self.device, trace=trace, loads=self.loads)
        keywords |= {"num_splits": self.num_splits, "schedule": schedule, "options": options}
        return selection_attention(q, k, v, return_lse=True, **keywords)

    def _inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
        generator = torch.Generator().manual_seed(7)
        Dk, Dv = self.dims
        S_kv = 512

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32).bfloat16()

        q = normal(self.B, 1, self.G, self.h, Dk)
        starts = torch.randint(0, S_kv // 2, (self.B, 1, self.G, len(self.spans)), generator=generator)
        ranges = torch.stack([starts, starts + torch.tensor(self.spans)], -1).int()
        seq_lens = torch.full((self.B,), S_kv, dtype=torch.int32)
        seq_lens[list(self.empty)] = 0
        keywords: dict[str, Any] = {"ranges": ranges, "seq_lens": seq_lens}
        if self.page_size == 0:
            return q, normal(self.B, self.G, S_kv, Dk), normal(self.B, self.G, S_kv, Dv), keywords
        pages = self.B * S_kv // self.page_size
        table = torch.randperm(pages, generator=generator).reshape(self.B, -1).int()
        shape = (pages, self.G, self.page_size)
        return q, normal(*shape, Dk), normal(*shape, Dv), keywords | {"block_table": table}


# Long rows wrap the ring and the map slots; several items per block reuse Q; splits reach combine kernel and cluster.
SCENARIOS = (
    Scenario("whole-rows", h=16, dims=(192, 128), B=5, spans=(100, 70, 130), device=A100, num_splits=1),
    Scenario("q-in-shared-memory", h=40, dims=(64, 64), B=4, spans=(90, 60, 50), device=A100, num_splits=1),
    Scenario("combine", h=16, dims=(64, 128), B=2, spans=(80, 90), device=A100, num_splits=3),
    Scenario("combine-programmatic", h=16, dims=(64, 64), B=2, spans=(80, 90), device=H200, num_splits=9),
    Scenario("cluster", h=16, dims=(128, 64), B=2, spans=(80, 90), device=H200, num_splits=4, empty=(0,)),
    Scenario("cluster-of-two", h=64, dims=(128, 128), B=2, spans=(60, 68), device=H200, num_splits=2),
    Scenario(
        "bulk",
        h=9,
        dims=(128, 128),
        B=5,
        spans=(100, 130),
        device=ONE_H200_SM,
        num_splits=1,
        page_size=16,
        loads="bulk",
    ),
    Scenario("bulk-cluster", h=16, dims=(192, 128), B=1, spans=(80, 90), device=H200, num_splits=2, loads="bulk"),
    Scenario("float8", h=16, dims=(192, 128), B=5, spans=(100, 70, 130), device=A100, num_splits=1, float8=True),
    Scenario(
        "short-rows", h=3, dims=(64, 64), B=9, spans=(5, 9), device=A100, num_splits=1, page_size=16, empty=(0, 2, 4, 6)
    ),
)

# Synchronisations that may go without a trace, with the reason why they stay. At most three.
REDUNDANT: dict[tuple[str, str], str] = {
    ("MBAR_WAIT", "traits.cuh"): "consumers read the map behind copies whose arrival, here, releases it as well",
}


@dataclass(frozen=True)
class Site:
    """A synchronisation in the source and the scenarios that execute it."""

    kind: str
    file: str
    line: int
    scenarios: tuple[Scenario, ...]

    @property
    def key(self) -> tuple[str, str, int]:
        """What `drop` takes."""
        return self.kind, self.file, self.line

    def findings(self) -> list[str]:
        """Leave the site out of every scenario that reaches it, under both schedules, until something is found."""
        for scenario in self.scenarios:
            for schedule in (0, 1):
                found = scenario.run(schedule, drop=self.key).findings
                if found:
                    return [f"{scenario.name}, schedule {schedule}: {text}" for text in found]
        return []


def executed_sites() -> list[Site]:
    """Run every scenario once and collect what it executed: the sites come from the trace, not from a list."""
    reached: dict[tuple[str, str, int], list[Scenario]] = {}
    for scenario in SCENARIOS:
        for site in scenario.run(schedule=0).counters["sync_sites"]:
            reached.setdefault((site.kind, site.file, site.line), []).append(scenario)
    return [Site(*key, tuple(scenarios)) for key, scenarios in sorted(reached.items())]
