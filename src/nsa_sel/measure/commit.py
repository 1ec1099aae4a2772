"""The commit of what is measured: one answer for the package, the GPU run and everything they write.

Standard library only: the GPU run reads it from this file before anything is installed.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path


@functools.cache
def commit() -> str:
    """Return the commit of the checkout that holds this file, "-dirty" with changes.

    COMMIT names it where the sources came without their repository; "unknown" without either.
    """
    source = Path(__file__).resolve()
    # An installed package inside some checkout's folder is not that checkout's code: only a tracked file counts.
    head = None
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is not None:
        head = _git(source.parent, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return os.environ.get("COMMIT") or "unknown"
    return head + ("-dirty" if _git(source.parent, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
