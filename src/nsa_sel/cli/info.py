"""`nsa-sel info`: what this build holds, what this machine has, and what would run on it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import nsa_sel
from nsa_sel import api, policy, switches
from nsa_sel.demo.shapes import SHAPES, Shape
from nsa_sel.problem import Problem


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(info)


def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print the build, the devices, the switches, the policy and what routing makes of them."""
    try:
        facts = collect()
    except nsa_sel.NsaSelError as error:
        typer.echo(f"nsa-sel info: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        show(facts, Console())


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
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda},
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "switches": {**current, "debug": sorted(current["debug"])},
        "policy": {"path": str(path), "exists": path.exists()},
    }


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
    problem = Problem(
        B=1, S=1, G=shape.G, h=shape.h, Dk=shape.Dk, Dv=shape.Dv, S_kv=65536, n=shape.n, dtype="bfloat16",
        device_type="cuda", device_index=index, blocks=True, block_size=shape.block_size,
        max_selected=shape.n * shape.block_size,
    )  # fmt: skip
    return api.route(problem)


def show(facts: dict[str, Any], console: Console) -> None:
    """Print what `collect` gathered."""
    build = facts["build"]
    table = Table("what", "value", title="nsa_sel", title_justify="left", show_header=False)
    table.add_row("version", build["version"])
    table.add_row("kernels", f"{len(build['instances'])} compiled" if build["kernels"] else f"none: {build['reason']}")
    if build["kernels"]:
        table.add_row("architectures", ", ".join(f"sm_{a}" for a in build["architectures"]))
        table.add_row("CUDA compiler", str(build["cuda_version"]))
    table.add_row("torch", f"{facts['torch']['version']} (CUDA {facts['torch']['cuda'] or 'none'})")
    table.add_row("policy", f"{facts['policy']['path']}{'' if facts['policy']['exists'] else ' (no such file)'}")
    table.add_row("switches", ", ".join(f"{name}={value}" for name, value in facts["switches"].items()))
    console.print(table)

    if not facts["devices"]:
        console.print('No CUDA device: every call runs on backend "sdpa".')
        return
    devices = Table("device", "capability", "SMs", "GiB", "shape", "auto runs", "because", title="devices, bf16 decode")
    for device in facts["devices"]:
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
