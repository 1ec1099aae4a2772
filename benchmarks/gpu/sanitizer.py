"""compute-sanitizer's memcheck and racecheck over small calls; without a GPU the emulator's checks stand in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.common import ROOT, arguments, finish, has_gpu

TOOLS = ("memcheck", "racecheck")
# Every head tile, spans and blocks, pages, empty rows, drafts, several splits; few tokens, for racecheck is slow.
CASES = (
    "dims-64x64-bf16", "dims-192x128-fp16", "h3", "h17", "h64-192x128", "empty-rows", "300-spans", "hostile-int32",
    "seq-lens-zero", "blocks-unused", "blocks-beyond-the-end", "nsa-paper-short", "pages-3", "pages-packed-192x128",
    "pages-hostile", "pages-draft", "rows-of-very-different-length",
)  # fmt: skip
SMALL = CASES[:3]
_CLEAN = {
    "memcheck": re.compile(r"ERROR SUMMARY: 0 errors"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)"),
}


def calls(names: tuple[str, ...]) -> int:
    """Run the cases on the kernel, hold each against the oracle, and return how often the kernel ran."""
    import nsa_sel
    from nsa_sel.testing import assert_matches_reference
    from tests.backends_under_test import backend
    from tests.cases import case

    for name in names:
        one = case(name)
        inputs = one.inputs()
        out, lse = backend("cuda").run(inputs, **one.options)
        assert_matches_reference(out, lse, inputs)
    return sum(nsa_sel.stats().get("cuda", {}).values())


def clean(tool: str, code: int, said: str, expected: int) -> str:
    """Return why a tool's run is not clean, "" where it is: ended well, nothing found, every call seen."""
    if f"kernel calls: {expected}" not in said:
        return f"{tool}: expected {expected} calls of the kernel to end, exit status {code}"
    if not _CLEAN[tool].search(said):
        found = re.findall(r"^.*SUMMARY.*$", said, re.MULTILINE)
        return f"{tool}: {found[-1].strip(' =') if found else 'no summary'}"
    return "" if code == 0 else f"{tool}: exit status {code}"


def on_gpu(out: Path, names: tuple[str, ...]) -> list[str]:
    """Run both tools, keep their logs, and return what is wrong."""
    tool_path = shutil.which("compute-sanitizer")
    assert tool_path is not None
    wrong = []
    for tool in TOOLS:
        # Without the caching allocator every tensor has bounds of its own, so that a stray access is one.
        variables = os.environ | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {})
        command = [tool_path, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        command += [sys.executable, "-m", "benchmarks.gpu.sanitizer", "--calls", *names]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables, cwd=ROOT, check=False
        )
        (out / f"sanitizer-{tool}.log").write_text(f"$ {' '.join(command)}\n{done.stdout}", encoding="utf-8")
        if reason := clean(tool, done.returncode, done.stdout, len(names)):
            wrong.append(reason)
    return wrong


def on_emulator(out: Path, names: tuple[str, ...]) -> list[str]:
    """Run the cases on both host runs with every check on; their findings are what is wrong."""
    from nsa_sel.testing import assert_matches_reference
    from tests.backends_under_test import backend
    from tests.cases import case

    wrong = []
    for tool, name in zip(TOOLS, ("host-run-sm80", "host-run-sm90"), strict=True):
        lines = [f"NOT MEASURED: no GPU, so no {tool}; {name} of the kernel's source with every access checked:"]
        for one in map(case, names):
            inputs = one.inputs()
            try:
                assert_matches_reference(*backend(name).run(inputs, **one.options), inputs)
                lines.append(f"{one.name}: nothing found")
            except AssertionError as error:
                wrong.append(f"{name}, {one.name}")
                lines.append(f"{one.name}: {error}")
        (out / f"sanitizer-{tool}.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return wrong


def main() -> None:
    """Run both tools; PASS where both are clean."""
    if sys.argv[1:2] == ["--calls"]:
        print("kernel calls:", calls(tuple(sys.argv[2:])), flush=True)
        return
    options = arguments(__doc__)
    names = SMALL if options.small else CASES
    if options.dry or not has_gpu():
        wrong = on_emulator(options.out, names)
        finish(bool(wrong), True, f"{len(names)} cases on the emulator, wrong: {'; '.join(wrong) or 'none'}")
    if shutil.which("compute-sanitizer") is None:
        for tool in TOOLS:
            (options.out / f"sanitizer-{tool}.log").write_text("NOT MEASURED: no compute-sanitizer on PATH\n")
        finish(False, True, "no compute-sanitizer on PATH")
    wrong = on_gpu(options.out, names)
    finish(bool(wrong), False, f"{len(names)} cases under memcheck and racecheck: {'; '.join(wrong) or 'clean'}")


if __name__ == "__main__":
    main()
