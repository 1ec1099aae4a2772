"""compute-sanitizer's memcheck and racecheck over small calls of the kernel; tests/kernel checks it on the emulator."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends_under_test import no_kernels
from tests.gpu.sanitized_calls import NAMES

ROOT = Path(__file__).parents[2]
CLEAN = {
    "memcheck": re.compile(r"ERROR SUMMARY: 0 errors"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)"),
}


def only_our_kernels(help_text: str) -> list[str]:
    """Return the option that keeps the tool from instrumenting PyTorch's kernels, which takes hours."""
    names = ("--kernel-name", "--kernel-regex", "--filter")
    found = [option for option in names if re.search(rf"{option}\b", help_text)]
    return [found[0], "kns=nsa_sel"] if found else []


def fault(tool: str, code: int, said: str, expected: int) -> str:
    """Return why a tool's run is not clean, "" where it is: ended well, nothing found, every call seen."""
    if f"kernel calls: {expected}" not in said:
        return f"{tool}: expected {expected} calls of the kernel to end, exit status {code}"
    if not CLEAN[tool].search(said):
        found = re.findall(r"^.*SUMMARY.*$", said, re.MULTILINE)
        return f"{tool}: {found[-1].strip(' =') if found else 'no summary'}"
    return "" if code == 0 else f"{tool}: exit status {code}"


@pytest.mark.gpu
@pytest.mark.parametrize("tool", CLEAN)
def test_sanitizer_finds_nothing(tool: str, tmp_path: Path) -> None:
    if (why := no_kernels()) is not None:
        pytest.skip(f"cuda: {why}")
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("no compute-sanitizer on PATH")
    options = subprocess.run([program, "--help"], capture_output=True, text=True, check=False).stdout
    # Without the caching allocator every tensor has bounds of its own, so that a stray access is one.
    variables = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {})
    command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *only_our_kernels(options)]
    command += [sys.executable, "-m", "tests.gpu.sanitized_calls"]
    log = Path(os.environ.get("NSA_SEL_RUN_LOGS", tmp_path)) / f"sanitizer-{tool}.log"
    with log.open("w", encoding="utf-8") as file:  # it grows as the tool speaks: what a time limit cuts is there too
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=variables, cwd=ROOT, check=False)
    assert fault(tool, done.returncode, log.read_text(encoding="utf-8", errors="replace"), len(NAMES)) == ""


def test_only_our_kernels_are_instrumented() -> None:
    assert only_our_kernels("  --kernel-name arg   Filter\n") == ["--kernel-name", "kns=nsa_sel"]
    assert only_our_kernels("  --kernel-regex arg  Filter\n") == ["--kernel-regex", "kns=nsa_sel"]
    assert only_our_kernels("  --tool arg\n") == []


def test_a_sanitizer_that_saw_nothing_is_not_clean() -> None:
    good = "kernel calls: 3\n========= ERROR SUMMARY: 0 errors\n"
    assert fault("memcheck", 0, good, 3) == ""
    assert "expected 3 calls" in fault("memcheck", 0, "========= ERROR SUMMARY: 0 errors\n", 3)
    assert "2 errors" in fault("memcheck", 9, good.replace("0 errors", "2 errors"), 3)
    assert fault("memcheck", 9, good, 3) != ""
    race = "kernel calls: 3\n========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"
    assert fault("racecheck", 0, race.format(0, 0), 3) == ""
    assert "1 hazards" in fault("racecheck", 9, race.format(1, 1), 3)
    assert "no summary" in fault("racecheck", 0, "kernel calls: 3\n", 3)
