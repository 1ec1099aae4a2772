"""Finding the peers' adapters: they live in a checkout's benchmarks/peers, because they are no part of the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import nsa_sel
from nsa_sel.measure.contestants import Contestant
from nsa_sel.measure.inputs import Inputs

PEERS = ("flashinfer", "fla", "xunhaolai", "vllm", "flex", "flash_attn")
NO_FOLDER = "no adapters here: they are in benchmarks/peers of a checkout (--peers DIR)"


def peers_folder(given: Path | None = None) -> Path | None:
    """Return the folder of adapters: the one given, else that of the checkout around this package or the user."""
    if given is not None:
        if not given.is_dir():
            raise ValueError(f"peers: expected a folder of adapters, got {given}")
        return given
    roots = [*Path(nsa_sel.__file__).resolve().parents, Path.cwd()]
    for root in roots:
        if (root / "benchmarks" / "peers" / "flashinfer.py").is_file():
            return root / "benchmarks" / "peers"
    return None


def load_peers(names: list[str], folder: Path | None) -> tuple[list[Contestant], dict[str, str]]:
    """Load the adapters called `names`; returns those that can run here, and for the others the reason why not."""
    found: list[Contestant] = []
    absent: dict[str, str] = {}
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer: expected one of {', '.join(PEERS)}, got {name!r}")
        if folder is None:
            absent[name] = NO_FOLDER
            continue
        path = folder / f"{name}.py"
        if not path.is_file():
            absent[name] = f"no adapter {path}"
            continue
        adapter = _load(name, path)
        reason = adapter.available()
        if reason is None:
            found.append(adapter)
        else:
            absent[name] = reason
    return found, absent


def needs(
    inputs: Inputs,
    *,
    blocks: bool = True,
    paged: bool | None = False,
    equal_dims: bool = True,
    dtypes: tuple[str, ...] = ("bf16", "fp16"),
) -> str | None:
    """Return why inputs are not what most peers take: block selections over a plain cache with Dk = Dv, on CUDA."""
    w = inputs.workload
    if inputs.q.device.type != "cuda":
        return f"needs CUDA tensors, got {inputs.q.device.type}"
    if blocks and inputs.block_indices is None:
        return f"takes whole blocks, got dist {w.dist}"
    if paged is not None and paged != (inputs.block_table is not None):
        return "takes paged caches" if paged else "takes caches that are not paged"
    if equal_dims and w.Dk != w.Dv:
        return f"takes one head dimension, got {w.Dk} and {w.Dv}"
    if w.dtype not in dtypes:
        return f"takes {', '.join(dtypes)}, got {w.dtype}"
    return None


def unused_slots(inputs: Inputs) -> str | None:
    """Return why a peer that has no sign for an unused slot cannot take these inputs."""
    assert inputs.block_indices is not None
    return "has no unused slots" if bool((inputs.block_indices < 0).any()) else None


def missing(module: str) -> str | None:
    """Return why a module cannot be imported, or None; importing it here would be slow."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        return f"{module} is not installed ({error})"
    return f"{module} is not installed" if found is None else None


def _load(name: str, path: Path) -> Contestant:
    # A name of our own: the module must not shadow the library of the same name that it imports.
    module_name = f"nsa_sel_peer_{name}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    adapter: Contestant = module.adapter()
    return adapter
