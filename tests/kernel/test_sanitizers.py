"""The kernel's own source under AddressSanitizer and UBSan, and what they say of one that is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.host_run import build, mutants, sanitized
from tests.host_run.abi import ROOT, library_file

REPORTS = ("AddressSanitizer", "runtime error")


def in_child(root: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    library_file("asan", root)  # the compiler must not run under the preloaded runtime
    environment = os.environ | {
        "LD_PRELOAD": build.sanitizer_preload(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "tests.host_run.sanitized", str(root), *cases]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


def assert_clean(root: Path, *cases: str) -> None:
    result = in_child(root, *cases)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == [f"{name} clean" for name in cases]
    assert not any(text in result.stderr for text in REPORTS), result.stderr[-3000:]


def test_kernels_are_clean() -> None:
    assert_clean(ROOT, *sanitized.CASES)


# Old text, new text, what the sanitizers call it, and the case that meets it.
PLANTED = {
    "block ids multiplied unchecked": (
        "cuda/row_map.cuh",
        "raw.first < 0 || raw.first > kv_len / p.block_size",
        "raw.first < 0",
        "signed integer overflow",
        "blocks",
    ),
    "a write behind a local array": (
        "cuda/row_map.cuh",
        "int kv_len = p.S_kv;",
        # The compiler must not know where the pointer comes from, or UBSan is the first to see it.
        'int kv_len = p.S_kv; int local[4]; int* past = local + 4; asm volatile("" : "+r"(past)); *past = 0;',
        "AddressSanitizer: stack-buffer-overflow",
        "hostile-ranges",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_seen(name: str, tmp_path: Path) -> None:
    file, old, new, report, case = PLANTED[name]
    root = mutants.copy_sources(tmp_path, (64, 64))
    mutants.patch(root, file, old, new)
    result = in_child(root, case)
    assert result.returncode != 0
    assert report in result.stderr, result.stderr[-3000:]
