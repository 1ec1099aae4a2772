"""Changed copies of the kernel's sources, to show that a test would fail on a kernel that is wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.host_run.abi import HOST_SOURCE, ROOT

_INSTANCES = Path("cpp/instances.h")


def copy_sources(target: Path, dims: tuple[int, int]) -> Path:
    """Copy cuda/, cpp/ and the C interface to `target` with the instances of one (Dk, Dv) only, which build faster."""
    for folder in ("cuda", "cpp"):
        shutil.copytree(ROOT / folder, target / folder)
    (target / HOST_SOURCE).parent.mkdir(parents=True)
    shutil.copy(ROOT / HOST_SOURCE, target / HOST_SOURCE)
    pair = f"{dims[0]}, {dims[1]}"

    def keep(match: re.Match[str]) -> str:
        return match[0] if match[1] == pair else ""

    header = target / _INSTANCES
    header.write_text(re.sub(r"X\(\w+, (\d+, \d+)\)", keep, header.read_text()))
    assert pair in header.read_text(), f"dims: expected those of an instance, got {dims}"
    return target


def patch(root: Path, file: str, old: str, new: str) -> None:
    """Replace a piece of a copied source that must be there exactly once."""
    path = root / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file}: expected {old!r} once, found it {text.count(old)} times"
    path.write_text(text.replace(old, new))
