"""docs/distributed.md: its example runs under torchrun as it stands, its model prints the table that it shows."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_example_runs_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "decode.py").write_text(blocks("python")[0])
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "decode.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == blocks("text")[0]


def test_the_model_prints_its_table() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(blocks("python")[1], "docs/distributed.md", "exec"), {})
    assert printed.getvalue() == blocks("text")[1]
    assert len(blocks("python")) == len(blocks("text")) == 2
