"""The README's table of kernels: `python -m tests.kernel.table` writes it anew from the installed build."""

from __future__ import annotations

import re
from pathlib import Path

import nsa_sel
from nsa_sel import facts

README = Path(__file__).resolve().parents[2] / "README.md"
_TABLE = re.compile(r"<!-- kernels: NVRTC ([\d.]+) -->\n(.*?)<!-- /kernels -->\n", re.DOTALL)


def shown() -> tuple[str, str]:
    """Return the CUDA compiler's version and the table that the README shows."""
    ((compiler, table),) = _TABLE.findall(README.read_text(encoding="utf-8"))
    return compiler, table


def generated() -> str:
    """Return the table of the installed build."""
    return facts.markdown(facts.collect())


if __name__ == "__main__":
    compiler = nsa_sel.build_info()["cuda_version"]
    block = f"<!-- kernels: NVRTC {compiler} -->\n{generated()}<!-- /kernels -->\n"
    README.write_text(_TABLE.sub(lambda _: block, README.read_text(encoding="utf-8")), encoding="utf-8")
