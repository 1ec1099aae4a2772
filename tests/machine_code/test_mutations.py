"""Changed machine code is noticed: named faults each by their detector, and random ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.machine_code import code, mutate, selection_attention
from tests.machine_code.listing import Kernel
from tests.machine_code.native import MachineCodeError, Program

KERNEL = "nsa_sel_decode_bfloat16_192x128_h16"
# Of 200 at least; the rest change nothing that can be seen: a wait behind a wait, an operand that is never used.
CAUGHT = {"sm_90": 170, "sm_80": 170}


def broken(change: Callable[[str], str], arch: str) -> Callable[[str, str], Program]:
    """Change the text of every instruction of the decode kernel."""
    kernel = code.program(KERNEL, arch).kernel
    lines = [type(x)(x.address, x.high, change(x.text), x.stage) for x in kernel.lines]
    assert lines != kernel.lines, "nothing was changed"
    mutant = Program(Kernel(KERNEL, lines, kernel.banks), arch)
    return lambda name, arch: mutant if name == KERNEL else code.program(name, arch)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("HMMA.16816", "HMMA.1688", "unknown"),  # an opcode that the machine does not have
        ("ARRIVES.LDGSTSBAR.64", "NOP.ALL", "deadlock"),  # nobody says that the tiles are there
        ("LDGSTS.E.BYPASS.128", "NOP.ALL", "unwritten"),  # nothing is loaded
        ("LDGSTS.E.BYPASS.128", "LDGSTS.E.BYPASS.64", "unwritten"),  # half of every row is
        ("STG.E ", "STG.E.128 ", r"misaligned|outside|registers behind"),
    ],
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_each_detector_sees_its_fault(old: str, new: str, message: str, arch: str) -> None:
    def change(text: str) -> str:
        return new.replace(".ALL", "") if old in text and new.startswith("NOP") else text.replace(old, new)

    with pytest.raises(MachineCodeError, match=message):
        selection_attention(
            **mutate.inputs().arguments(return_lse=True), arch=arch, num_splits=1, programs=broken(change, arch)
        )


def test_a_value_that_is_used_before_it_is_waited_for_is_a_hazard() -> None:
    kernel = code.program(KERNEL, "sm_90").kernel
    lines = [type(x)(x.address, x.high & ~(63 << 52), x.text, x.stage) for x in kernel.lines]  # nobody waits
    mutant = Program(Kernel(KERNEL, lines, kernel.banks), "sm_90")
    with pytest.raises(MachineCodeError, match=r"before its value|under way|still being read|not arrived"):
        selection_attention(
            **mutate.inputs().arguments(), num_splits=1,
            programs=lambda name, arch: mutant if name == KERNEL else code.program(name, arch),
        )  # fmt: skip


def test_a_sample_of_mutations_is_caught() -> None:
    found = mutate.campaign(16, "sm_90")
    assert sum(verdict != "survived" for _, _, verdict in found) >= 8, found


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_of_two_hundred_mutations_most_are_caught(arch: str) -> None:
    found = mutate.campaign(200, arch)
    survivors = [(kind, change) for kind, change, verdict in found if verdict == "survived"]
    assert len(found) - len(survivors) >= CAUGHT[arch], survivors
