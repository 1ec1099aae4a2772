"""`nsa-sel info`: what this build holds, what this machine has, and what would run on it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import nsa_sel
from nsa_sel import _build, execute, facts, policy, switches
from nsa_sel.check import check
from nsa_sel.demo.shapes import SHAPES, Shape


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(info)


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    kernels: Annotated[bool, typer.Option("--kernels", help="Print the table of facts about the kernels.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="With --kernels: every instance.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="With --kernels: as docs/kernels.md shows it.")
    ] = False,
) -> None:
    """Print the build, devices, switches and policy and what routing makes of them, or the facts of the kernels."""
    if not kernels and (everything or as_markdown):
        typer.echo("nsa-sel info: --all and --markdown: expected with --kernels, got them alone", err=True)
        raise typer.Exit(2)
    if as_json and as_markdown:
        typer.echo("nsa-sel info: --json, --markdown: expected one of the two, got both", err=True)
        raise typer.Exit(2)
    try:
        if kernels:
            show_kernels(facts.collect(everything=everything), as_json, as_markdown)
            return
        found = collect()
    except nsa_sel.NsaSelError as error:
        typer.echo(f"nsa-sel info: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found, Console())


def show_kernels(rows: list[facts.Fact], as_json: bool, as_markdown: bool) -> None:
    """Print the table of facts; its model is labelled as one."""
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    elif as_markdown:
        typer.echo(facts.markdown(rows), nl=False)
    else:
        table = Table(*facts.COLUMNS, title="kernels, many rows, sizes in bytes", title_justify="left")
        for row in rows:
            table.add_row(*facts.cells(row))
        console = Console()
        widths = [max(map(len, column)) for column in zip(facts.COLUMNS, *map(facts.cells, rows), strict=True)]
        console.width = max(console.width, sum(widths) + 3 * len(widths) + 1)  # a number that is cut off is no fact
        console.print(table)
        for note in facts.notes(rows):
            console.print(note)


def collect() -> dict[str, Any]:
    """Gather everything that `info` prints: plain values, ready for JSON.

    Raises:
        SwitchError, PolicyError: an environment variable or the policy file is wrong.
    """
    nsa_sel.refresh_routing()  # raises here what a call would raise
    path = policy.default_path()
    current = asdict(switches.current())
    return {
        "build": nsa_sel.build_info(),
        "driver": _driver(),
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "switches": {**current, "debug": sorted(current["debug"])},
        "policy": {
            "path": str(path),
            "exists": policy.find(current["policy"]) is not None and os.access(path, os.F_OK),
        },
    }


def _driver() -> str:
    core = _build.core
    if core is None or not nsa_sel.build_info()["kernels"]:
        return "not looked for: this build has no kernels"
    bar = core.driver_bar()
    version = 0 if bar else core.driver_version()
    return str(bar) if bar else f"CUDA {version // 1000}.{version % 1000 // 10}"


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sm_count": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        # Examples, because what auto decides depends on the problem too.
        "routing": {shape.name: _routed(index, shape)._asdict() for shape in SHAPES},
    }


def _routed(index: int, shape: Shape) -> nsa_sel.Decision:
    """Route a decode step of these dims as if its tensors lay on this GPU."""
    q, k, v = (
        torch.empty((1, *dims), dtype=torch.bfloat16, device="meta")
        for dims in ((1, shape.G, shape.h, shape.Dk), (shape.G, 65536, shape.Dk), (shape.G, 65536, shape.Dv))
    )
    blocks = torch.empty((1, 1, shape.G, shape.n), dtype=torch.int32, device="meta")
    call = check(q, k, v, block_indices=blocks, block_size=shape.block_size)
    return execute.route(replace(call, device_type="cuda", device_index=index))


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `collect` gathered."""
    build = found["build"]
    table = Table("what", "value", title="nsa_sel", title_justify="left", show_header=False)
    table.add_row("version", build["version"])
    table.add_row("kernels", f"{len(build['instances'])} compiled" if build["kernels"] else f"none: {build['reason']}")
    if build["kernels"]:
        table.add_row("architectures", ", ".join(f"sm_{a}" for a in build["architectures"]))
        table.add_row("compiler", f"{build['compiler']}; oldest driver {build['oldest_driver']}")
    table.add_row("driver", found["driver"])
    table.add_row("torch", f"{found['torch']['version']} (CUDA {found['torch']['cuda'] or 'none'})")
    table.add_row("policy", f"{found['policy']['path']}{'' if found['policy']['exists'] else ' (no such file)'}")
    table.add_row("switches", ", ".join(f"{name}={value}" for name, value in found["switches"].items()))
    console.print(table)

    if not found["devices"]:
        console.print('No CUDA device: every call runs on backend "sdpa".')
        return
    devices = Table("device", "capability", "SMs", "GiB", "shape", "auto runs", "because", title="devices, bf16 decode")
    for device in found["devices"]:
        for name, decision in device["routing"].items():
            devices.add_row(
                f"{device['index']} {device['name']}",
                device["capability"],
                str(device["sm_count"]),
                f"{device['memory_bytes'] / 2**30:.0f}",
                name,
                decision["backend"],
                decision["reason"],
            )
    console.print(devices)
