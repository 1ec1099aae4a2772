"""What the built kernels are: machine code, registers, shared memory, bytes in flight, and the tables that say so."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

import nsa_sel
from nsa_sel import facts
from nsa_sel.cli.app import app
from nsa_sel.facts import GPUS, Gpu, Key, Resources
from tests.kernel import sass
from tests.kernel import table as kernel_table

BUILD = nsa_sel.build_info()
ARCHITECTURES = BUILD["architectures"] or ["none"]
REGISTERS_PER_SM = 65_536
REGISTER_UNIT = 8  # a thread's registers are handed out in eights
# On sm_90 the splits of a cluster are read through generic addresses, and everywhere a partial goes to the workspace or
# to shared memory by one pointer. Everything else must be LDS, STS, LDG or STG: a generic access of shared memory takes
# longer, and a compiler that loses track of an address space says nothing.
CLUSTER_LOADS = 48

with_kernels = pytest.mark.skipif(not BUILD["kernels"], reason=f"this build has no kernels: {BUILD['reason']}")


def instances(architecture: str | None = None) -> set[Key]:
    """Return the kernels that the build says it has, or those that run on an architecture."""
    keys = {
        Key(i["dtype"], i["Dk"], i["Dv"], i["head_tile"], i.get("loads", "cp.async"), i["cache"])
        for i in BUILD["instances"]
    }
    return {key for key in keys if architecture is None or key.loads != "bulk" or int(architecture) >= 90}


def tile(key: Key) -> dict[str, int]:
    from nsa_sel import _core

    return _core.tile_shape(key.Dk, key.Dv, key.head_tile, key.loads, key.cache)


def generic_stores(shape: dict[str, int]) -> int:
    """Count the stores of `write_partial`: O, (max, sum) of every head, and an empty split's pair and zeros."""
    column_tiles = shape["Dv"] // (16 * shape["token_warps"])
    return 4 * shape["units"] * column_tiles + 2 * shape["units"] + 2


# ---- The binary -----------------------------------------------------------------------------------------------------


@with_kernels
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_is_what_a_decode_kernel_needs(architecture: str) -> None:
    kernels = sass.kernels(architecture)
    assert set(kernels) == instances()
    assert len(sass.functions(architecture)) <= 85
    for key, ops in kernels.items():
        assert sass.count(ops, "LDL", "STL") == 0, f"{key}: local memory"
        assert sass.count(ops, "HMMA") > 0, f"{key}: no tensor cores"
        assert sass.count(ops, "LDGSTS") > 0, f"{key}: no asynchronous copies"  # of Q, where K and V come in bulk
        scales = {"LDGSTS.E"} if key.cache == "float8_e4m3fn" else set()  # 4 bytes, one a token
        assert {op for op in ops if op.startswith("LDGSTS")} == {"LDGSTS.E.BYPASS.128"} | scales, f"{key}: other copies"
        bulk = key in instances(architecture) and key.loads == "bulk"  # the planner refuses them below sm_90
        assert (sass.count(ops, "UBLKCP") > 0) == bulk, f"{key}: bulk copies"


@with_kernels
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_memory_is_not_reached_through_generic_addresses(architecture: str) -> None:
    for key, ops in sass.kernels(architecture).items():
        loads, stores = sass.count(ops, "LD"), sass.count(ops, "ST")
        assert loads <= (CLUSTER_LOADS if int(architecture) >= 90 else 0), f"{key}: {loads} generic loads"
        assert stores <= generic_stores(tile(key)), f"{key}: {stores} generic stores"
        assert sass.count(ops, "ATOM", "ATOMG", "RED") == 0, f"{key}: nothing is shared between blocks"
        assert sass.count(ops, "LDS", "STS", "LDSM") > 0
        assert sass.count(ops, "LDG") > 0


@with_kernels
def test_registers_fit_the_launch_bound_and_nothing_is_on_the_stack() -> None:
    used, why = facts.resources()
    assert why is None
    assert set(used) >= {(architecture, key) for architecture in ARCHITECTURES for key in instances(architecture)}
    for (architecture, key), one in used.items():
        shape = tile(key)
        allowed = REGISTERS_PER_SM // (shape["threads"] * shape["blocks_per_sm"]) // REGISTER_UNIT * REGISTER_UNIT
        assert one.registers <= min(allowed, 255), f"sm_{architecture} {key}"
        assert (one.stack, one.local) == (0, 0), f"sm_{architecture} {key}"
        # All shared memory is the plan's; sm_90 keeps 1 KB for itself, which the planner counts.
        assert one.static_shared == (1024 if int(architecture) >= 90 and one.static_shared else 0), f"{key}"


@with_kernels
def test_instances_stay_few() -> None:
    assert len(instances()) == len(BUILD["instances"]) <= 85
    assert sum(key.loads == "bulk" for key in instances()) <= 4


# ---- The plan -------------------------------------------------------------------------------------------------------

SHAPES = {"NSA paper": (Key("bfloat16", 192, 128, 16), 1024), "MiniMax-M3": (Key("bfloat16", 128, 128, 16), 2048)}


@with_kernels
@pytest.mark.parametrize("B", [1, 4096])
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_enough_bytes_are_in_flight(shape: str, gpu: Gpu, B: int) -> None:
    from nsa_sel import _core

    key, L = SHAPES[shape]
    planned = facts.plan(key, gpu, B=B, L=L)
    in_flight = facts.bytes_in_flight(planned["num_slots"], tile(key)["slot_bytes"], planned["blocks_per_sm"])
    assert in_flight >= _core.bytes_in_flight_needed(gpu.capability)
    assert planned["full_rows"] > 0 if B > 1 else planned["num_splits"] > 1


def layout(shape: dict[str, int], slots: int) -> int:
    """Sum up a block's shared memory as the traits lay it out: barriers, headers, row maps, max and sum, Q, P, ring.

    A float8 cache has scales beside its row maps, a barrier for each, and at 64 heads room for more slots.
    """
    heads, segment, float8 = shape["head_tile"], shape["segment"], shape["cache_bytes"] == 1
    most = 32 if float8 and heads > 32 else 16
    barriers = 2 * most + 3 * (segment // shape["rows_k"] + 1) + 2 + 3 * float8
    scales = up(3 * (2 * segment * 4 + 8), 16) * float8
    before_q = up(barriers * 8, 16) + 3 * 32 + 3 * 2 * segment * 4 + scales + 2 * shape["token_warps"] * heads * 4
    ring = up(up(before_q, 128) + heads * shape["Dk"] * 2 + heads * segment * 2, 1024)
    return up(ring + slots * shape["slot_bytes"], 128)


def up(size: int, step: int) -> int:
    """Round up."""
    return (size + step - 1) // step * step


@with_kernels
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_shared_memory_is_what_the_layout_adds_up_to_and_fits(gpu: Gpu) -> None:
    for key in sorted(instances(str(gpu.capability)), key=str):
        for h in (key.head_tile, key.head_tile // 2 + 1):
            planned = facts.plan(key, gpu, B=4096, h=h)
            assert planned["smem_bytes"] == layout(tile(key), planned["num_slots"])
            assert planned["smem_bytes"] <= gpu.smem_per_block
            assert (planned["smem_bytes"] + 1024) * planned["blocks_per_sm"] <= gpu.smem_per_sm
            assert planned["blocks_per_sm"] <= tile(key)["blocks_per_sm"]
            assert planned["num_slots"] >= 2


# ---- The model ------------------------------------------------------------------------------------------------------


def test_model_counts_what_crosses_shared_memory() -> None:
    h64 = dict(Dk=128, Dv=128, head_tile=64, head_warps=2, token_warps=2, units=4, rows_k=32, cache_bytes=2)
    assert facts.smem_traffic(h64) == (1 + 2 + 4 * 32 / 32 + 1 + 2 + 4 * 32 / 128) / 2
    slow = Gpu("made up", 1, 90, 0, 0, bandwidth=128e9, clock=1e9, source="")  # one byte of 128 a clock arrives
    assert facts.model(h64, slow) == 5.5


# ---- The tables -----------------------------------------------------------------------------------------------------

REPORT = """
arch = sm_89
Resource usage:
 Common:
  GLOBAL:0
 Function nsa_sel_decode_bfloat16_192x128_h16_bulk:
  REG:161 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:872 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function nsa_sel_combine_bfloat16:
  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:872 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_resource_usage_is_read() -> None:
    expected = {("89", Key("bfloat16", 192, 128, 16, "bulk")): Resources(161, 8, 4, 1024)}
    assert facts.parse_resources(REPORT) == expected
    with pytest.raises(nsa_sel.BackendError, match="symbol: expected nsa_sel_decode"):
        facts.kernel_of_symbol("nsa_sel_decode_3")


def invoke(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["info", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@with_kernels
def test_info_prints_the_facts() -> None:
    few, everything = facts.collect(), facts.collect(everything=True)
    shown = invoke("--kernels")
    for fact in few:
        line = next(x for x in shown.splitlines() if f" {fact.kernel} " in x and f" {fact.gpu}," in x)
        assert tuple(cell.strip() for cell in line.strip("│").split("│")) == facts.cells(fact)
    assert "(model)" in shown
    assert "No speed in this table was measured." in " ".join(shown.split())
    assert {(f.Dk, f.Dv) for f in few} == {(192, 128), (128, 128)}
    assert json.loads(invoke("--kernels", "--all", "--json")) == [asdict(fact) for fact in everything]
    kernels = Counter((f.kernel, f.loads) for f in everything)
    assert kernels == {(i["name"], i["loads"]): 1 if i["loads"] == "bulk" else len(GPUS) for i in BUILD["instances"]}


@with_kernels
def test_without_a_disassembler_the_binary_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "find_cuobjdump", lambda: None)
    facts.resources.cache_clear()
    table = invoke("--kernels", "--markdown")
    facts.resources.cache_clear()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| bfloat16")]
    assert rows
    assert {(row[2], row[3]) for row in rows} == {("NOT MEASURED", "NOT MEASURED")}
    assert "NOT MEASURED: no cuobjdump" in table


@pytest.mark.parametrize("options", [("--all",), ("--markdown",), ("--kernels", "--json", "--markdown")])
def test_options_that_do_not_go_together_are_refused(options: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["info", *options])
    assert result.exit_code == 2
    assert "expected" in result.output


def test_without_kernels_info_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    none = {"kernels": False, "reason": "made up", "instances": [], "architectures": []}
    monkeypatch.setattr("nsa_sel._build.build_info", lambda: none)
    result = CliRunner().invoke(app, ["info", "--kernels"])
    assert result.exit_code == 2
    assert "got none: made up" in result.output


@with_kernels
def test_the_page_of_kernels_is_the_generated_one() -> None:
    compiler, table = kernel_table.shown()
    if BUILD["cuda_version"] != compiler or not {str(gpu.capability) for gpu in GPUS} <= set(ARCHITECTURES):
        pytest.skip(f"docs/kernels.md is of NVRTC {compiler}, all architectures; this build is another one")
    assert table == kernel_table.generated(), "run: python -m tests.kernel.table"
