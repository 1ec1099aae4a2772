"""Mutations of machine code: one executed instruction changed at random; what notices it, if anything does.

python -m tests.machine_code.mutate --number 200
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch

from nsa_sel.testing import Inputs, make_inputs
from tests.machine_code import Run, code, selection_attention
from tests.machine_code.listing import Kernel, Line
from tests.machine_code.native import MachineCodeError, Program

_BARRIERS = re.compile(r"^(@!?U?P\d )?(BAR|SYNCS|ARRIVES|UCGABAR_\w+|WARPSYNC|ATOMS|LDGDEPBAR|DEPBAR)\b")
_GUARD = re.compile(r"^@(!?)(U?P\d) ")
_REGISTER = re.compile(r"\bR(\d+)\b")
CUTS = ({"num_splits": 1}, {"num_splits": 3}, {"batch_invariant": True})


def inputs() -> Inputs:
    """Make two rows in odd spans over pages, NaN in all that is not selected: little work, most of the code."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randint(0, 400, (1, 1, 2, 5), generator=generator)
    spans = torch.stack([start, start + torch.randint(1, 110, start.shape, generator=generator)], -1)
    return make_inputs(
        ranges=spans.int(), h=13, Dk=192, Dv=128, S_kv=512, dtype=torch.bfloat16, seq_lens=[480], page_size=64
    )


def _operand(line: Line, random_: random.Random) -> Line | None:
    found = list(_REGISTER.finditer(line.text))
    if not found:
        return None
    one = random_.choice(found)
    other = int(one[1]) ^ 1 << random_.randrange(3)
    return replace(line, text=f"{line.text[: one.start()]}R{other}{line.text[one.end() :]}")


def _predicate(line: Line, _: random.Random) -> Line | None:
    match = _GUARD.match(line.text)
    if match is None:
        return None
    return replace(line, text=f"@{'' if match[1] else '!'}{match[2]} {line.text[match.end() :]}")


def _barrier(line: Line, _: random.Random) -> Line | None:
    return replace(line, text="NOP") if _BARRIERS.match(line.text) else None


def _wait(line: Line, random_: random.Random) -> Line | None:
    waits = [bit for bit in range(6) if line.high >> 52 + bit & 1]
    return replace(line, high=line.high & ~(1 << 52 + random_.choice(waits))) if waits else None


KINDS: dict[str, Callable[[Line, random.Random], Line | None]] = {
    "operand": _operand,
    "predicate": _predicate,
    "barrier": _barrier,
    "wait": _wait,
}


def _same(a: Run, b: Run) -> str | None:
    if not (torch.equal(a.out, b.out) and a.lse is not None and b.lse is not None and torch.equal(a.lse, b.lse)):
        return "result"
    return None if a.counts == b.counts else "count"


def _verdict(error: MachineCodeError) -> str:
    text = str(error)
    for word, verdict in (("deadlock", "deadlock"), ("unwritten", "unwritten read"), ("instructions", "endless")):
        if word in text:
            return verdict
    hazards = ("before its", "under way", "still being read", "while a copy", "has not arrived")
    return "hazard" if any(word in text for word in hazards) else "stray access or wrong use"


def campaign(number: int, arch: str, seed: int = 0) -> list[tuple[str, str, str]]:
    """Return (kind, changed instruction, what caught it or "survived") of so many mutations of executed instructions.

    A mutation runs on three cuts of one call (whole rows, a cluster or partials, fixed splits) until something differs
    from the unchanged code: a fault of the machine, a bit of out or lse, a count of any opcode.
    """
    random_ = random.Random(seed)
    arguments = inputs().arguments(return_lse=True)
    baseline = [selection_attention(**arguments, arch=arch, **cut) for cut in CUTS]
    symbol = next(iter(baseline[0].grids))
    kernel = code.program(symbol, arch).kernel
    visited = [any(run.decode.visited[i] for run in baseline) for i in range(len(kernel.lines))]
    found = []
    while len(found) < number:
        kind = list(KINDS)[len(found) % len(KINDS)]
        at = random_.randrange(len(kernel.lines))
        changed = KINDS[kind](kernel.lines[at], random_) if visited[at] else None
        if changed is None or changed == kernel.lines[at]:
            continue
        mutant = Program(Kernel(symbol, [*kernel.lines[:at], changed, *kernel.lines[at + 1 :]], kernel.banks), arch)
        verdict = "survived"
        for cut, expected in zip(CUTS, baseline, strict=True):

            def programs(name: str, arch: str, mutant: Program = mutant) -> Program:
                return mutant if name == symbol else code.program(name, arch)

            limit = 20 * expected.decode.instructions
            try:
                run = selection_attention(**arguments, arch=arch, programs=programs, limit=limit, **cut)
                caught = _same(run, expected)
            except MachineCodeError as error:
                caught = _verdict(error)
            if caught:
                verdict = caught
                break
        found.append((kind, f"{changed.address:05x} {kernel.lines[at].text} -> {changed.text}", verdict))
    return found


def main() -> None:
    """Print how many mutations of each kind are caught by what, and those that are not."""
    parser = argparse.ArgumentParser(prog="python -m tests.machine_code.mutate", description=__doc__)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--arch", choices=["sm_80", "sm_90"], default="sm_90")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = campaign(arguments.number, arguments.arch, arguments.seed)
    for kind, change, verdict in found:
        if verdict == "survived":
            print(f"survived  {kind:<10}{change}")
    for kind in KINDS:
        verdicts = Counter(verdict for k, _, verdict in found if k == kind)
        print(f"{kind:<10}{sum(verdicts.values()):4}: " + ", ".join(f"{v} {n}" for v, n in verdicts.most_common()))
    caught = sum(verdict != "survived" for _, _, verdict in found)
    print(f"{arguments.arch}: {caught} of {len(found)} mutations caught")


if __name__ == "__main__":
    main()
