"""The machine code of the installed package: disassembled once per architecture, kept on disk for all test workers."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

from nsa_sel import _build, facts
from nsa_sel.facts import Key
from tests.host_run.build import CHECKOUT, locked

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([\w.]+)", re.MULTILINE)


def module_file() -> Path:
    """Return the path of the file that holds the machine code."""
    return _build.machine_code()


def cuobjdump(*arguments: str) -> str:
    """Return what NVIDIA's disassembler says of the module."""
    tool = facts.find_cuobjdump()
    assert tool, "cuobjdump: expected the wheel nvidia-cuda-cuobjdump (extra `test`) or a CUDA toolkit, got neither"
    command = [str(tool), *arguments, str(module_file())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}:\n{result.stdout[-2000:]}{result.stderr}"
    return result.stdout


@functools.cache
def functions(architecture: str) -> dict[str, Counter[str]]:
    """Return how often every function has each instruction, by mangled name; `LDG.E.128` with its suffixes."""
    file = module_file()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:24]
    folder = CHECKOUT / "build" / "sass"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{digest}-sm_{architecture}.json"
    with locked(folder):
        if not kept.exists():
            for old in folder.glob(f"*-sm_{architecture}.json"):
                old.unlink()
            text = cuobjdump("--dump-sass", "-arch", f"sm_{architecture}")
            counts = {
                body.split(maxsplit=1)[0]: Counter(_INSTRUCTION.findall(body)) for body in text.split("Function : ")[1:]
            }
            partial = kept.with_suffix(".part")
            partial.write_text(json.dumps(counts))
            partial.replace(kept)
    found = {name: Counter(ops) for name, ops in json.loads(kept.read_text()).items()}
    for name, ops in found.items():
        assert ops["EXIT"] > 0, f"{name}: the pattern no longer reads this disassembler's lines"
    return found


def kernels(architecture: str) -> dict[Key, Counter[str]]:
    """Return the decode kernels among `functions`."""
    found: dict[Key, Counter[str]] = {}
    for name, ops in functions(architecture).items():
        key = facts.kernel_of_symbol(name)
        if key is not None:
            assert key not in found, f"{key}: two functions on sm_{architecture}"
            found[key] = ops
    return found


def count(ops: Counter[str], *mnemonics: str) -> int:
    """Return how many instructions have one of these names, whatever their suffixes."""
    return sum(number for op, number in ops.items() if op.partition(".")[0] in mnemonics)
