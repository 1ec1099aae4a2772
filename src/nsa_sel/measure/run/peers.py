"""The peers: finding their adapters, and one process each to run them in.

Adapters are modules of a checkout's benchmarks/peers, because they are no part of the package. Each names in MODULE
what has to be installed and has `prepare` and `refuses` of a Contestant; where more than the module may be missing,
`available` returns why it cannot run on this machine at all.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import select
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import nsa_sel
from nsa_sel.measure.run.contestants import Contestant
from nsa_sel.measure.run.inputs import Inputs
from nsa_sel.measure.run.race import Settings, Timed
from nsa_sel.measure.run.workload import Workload

PEERS = ("flashinfer", "fla", "xunhaolai", "vllm", "flex", "flash_attn")
NO_FOLDER = "no adapters here: they are in benchmarks/peers of a checkout (--peers DIR)"


class NotHereError(RuntimeError):
    """Why an adapter cannot run on this machine."""


def peers_folder(given: Path | None = None) -> Path | None:
    """Return the folder of adapters: the one given, else that of the checkout whose sources this package is.

    Nowhere else is looked: an adapter is code that runs with the user's rights.
    """
    if given is not None:
        if not given.is_dir():
            raise ValueError(f"peers: expected a folder of adapters, got {given}")
        return given
    package = Path(nsa_sel.__file__).resolve().parent  # of a checkout: <root>/src/nsa_sel
    root = package.parents[1]
    ours = package.parent.name == "src" and (root / "pyproject.toml").is_file()
    return root / "benchmarks" / "peers" if ours and (root / "benchmarks" / "peers").is_dir() else None


def load_peers(names: list[str], folder: Path | None) -> tuple[list[Contestant], dict[str, str]]:
    """Load the adapters called `names`; returns those that can run here, and for the others the reason why not."""
    found: list[Contestant] = []
    absent: dict[str, str] = {}
    for name in names:
        if name not in PEERS:
            raise ValueError(f"peer: expected one of {', '.join(PEERS)}, got {name!r}")
        try:
            found.append(load(name, folder))
        except NotHereError as error:
            absent[name] = str(error)
        except Exception as error:  # a library that cannot be looked at is not here
            absent[name] = f"{type(error).__name__}: {error}"
    return found, absent


def load(name: str, folder: Path | None) -> Contestant:
    """Load the adapter of a peer from its file.

    Raises:
        NotHereError: there is no such file, or its library is not on this machine.
    """
    if folder is None or not (folder / f"{name}.py").is_file():
        raise NotHereError(NO_FOLDER if folder is None else f"no adapter {folder / name}.py")
    # A name of our own: the module must not shadow the library of the same name that it imports.
    spec = importlib.util.spec_from_file_location(f"nsa_sel_peer_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if reason := missing(module.MODULE) or (module.available() if hasattr(module, "available") else None):
        raise NotHereError(reason)
    return Contestant(name, module.prepare, module.refuses)


def needs(
    inputs: Inputs, *, blocks: bool = True, paged: bool | None = False, equal_dims: bool = True, unused: bool = False
) -> str | None:
    """Return why inputs are not what most peers take: block selections over a plain cache with Dk = Dv, on CUDA.

    `paged` None: either kind of cache. `unused`: it has a sign for an unused slot.
    """
    w, ids = inputs.workload, inputs.block_indices
    for wrong, reason in (
        (inputs.q.device.type != "cuda", f"needs CUDA tensors, got {inputs.q.device.type}"),
        (blocks and ids is None, f"takes whole blocks, got dist {w.dist}"),
        (paged is True and inputs.block_table is None, "takes paged caches"),
        (paged is False and inputs.block_table is not None, "takes caches that are not paged"),
        (equal_dims and w.Dk != w.Dv, f"takes one head dimension, got {w.Dk} and {w.Dv}"),
        (w.dtype not in ("bf16", "fp16"), f"takes bf16, fp16, got {w.dtype}"),
        (not unused and ids is not None and bool((ids < 0).any()), "has no unused slots"),
    ):
        if wrong:
            return reason
    return None


def missing(module: str) -> str | None:
    """Return why a module cannot be imported, or None; importing it here would be slow."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        return f"{module} is not installed ({error})"
    return f"{module} is not installed" if found is None else None


def block_pointers() -> str | None:
    """Return why a kernel that needs Triton's block pointers cannot run here, or None."""
    if (absent := missing("triton")) is not None:
        return absent
    import triton
    import triton.language as tl

    gone = not hasattr(tl, "make_block_ptr")
    return f"needs block pointers, which Triton {triton.__version__} no longer has" if gone else None


class Peer:
    """A peer in a process of its own, which times sdpa again as an anchor; what it breaks, it breaks alone."""

    def __init__(self, name: str, folder: Path, settings: Settings, seconds: float = 240.0) -> None:
        self.name, self.folder, self.settings, self.seconds = name, folder, settings, seconds
        self.child: subprocess.Popen[str] | None = None

    def measure(self, workload: Workload, mode: str) -> tuple[Timed, Timed]:
        """Return the peer's times and those of sdpa beside them in its process; a reason where there are none."""
        if self.child is None or self.child.poll() is not None:
            self.close()
            self._start()
        assert self.child is not None
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        try:
            self.child.stdin.write(json.dumps({"workload": asdict(workload), "mode": mode}) + "\n")
            self.child.stdin.flush()
        except OSError:  # it ended before it had read anything
            return self._failed("ended early")
        ready, _, _ = select.select([self.child.stdout], [], [], self.seconds)
        answer = self.child.stdout.readline() if ready else ""
        if not answer:
            return self._failed("ended" if ready else f"did not answer within {self.seconds:g} s")
        peer, anchor = (Timed(**one) for one in json.loads(answer))
        return peer, anchor

    def close(self) -> None:
        """End the process."""
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None
            self.said.close()

    def _start(self) -> None:
        data = json.dumps(vars(self.settings) | {"device": str(self.settings.device)})
        command = [sys.executable, "-m", "nsa_sel.measure.run.worker", self.name, str(self.folder), data]
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see close)
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True, encoding="utf-8"
        )

    def _failed(self, how: str) -> tuple[Timed, Timed]:
        assert self.child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(5 if how.startswith("ended") else 0.0)
        self.child.kill()
        code = self.child.wait()
        self.said.seek(0)
        last = [line.strip() for line in self.said if line.strip()][-1:]
        self.close()
        reason = f"its process {how} (exit status {code})" + (f": {last[0][:300]}" if last else "")
        return Timed(reason=reason), Timed(reason=reason)
