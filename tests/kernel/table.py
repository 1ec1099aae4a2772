"""The generated parts of the documents: `python -m tests.kernel.table` writes them anew.

The README's support matrix follows from the table of instances, docs/kernels.md from the installed build.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

import nsa_sel
from nsa_sel import _core, facts

ROOT = Path(__file__).resolve().parents[2]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "kernels.md"
_TABLE = re.compile(r"<!-- kernels: NVRTC ([\d.]+) -->\n(.*?)<!-- /kernels -->\n", re.DOTALL)
_MATRIX = re.compile(r"<!-- matrix: begin -->\n(.*?)<!-- matrix: end -->\n", re.DOTALL)


def shown() -> tuple[str, str]:
    """Return the CUDA compiler's version and the table that docs/kernels.md shows."""
    ((compiler, table),) = _TABLE.findall(PAGE.read_text(encoding="utf-8"))
    return compiler, table


def generated() -> str:
    """Return the table of the installed build."""
    return facts.markdown(facts.collect())


def shown_matrix() -> str:
    """Return the support matrix that the README shows."""
    (matrix,) = _MATRIX.findall(README.read_text(encoding="utf-8"))
    return matrix


def generated_matrix() -> str:
    """Return the support matrix of cpp/instances.h."""
    lines = ["| dtype of q | of k, v | Dk/Dv | heads per KV group | GPU |", "|---|---|---|---|---|"]
    instances = [i for i in _core.instances() if i["loads"] == "cp.async"]
    for (dtype, cache), found in groupby(instances, key=lambda i: (i["dtype"], i["cache"])):
        table = list(found)
        dims = ", ".join(f"{Dk}/{Dv}" for Dk, Dv in sorted({(i["Dk"], i["Dv"]) for i in table}))
        most = max(i["head_tile"] for i in table)
        stored = dtype if cache == "same" else cache
        gpus = "sm_80, sm_86, sm_89 (off until measured), sm_90; later ones by PTX"
        lines.append(f"| {dtype} | {stored} | {dims} | 1 to {most} | {gpus} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    matrix = f"<!-- matrix: begin -->\n{generated_matrix()}<!-- matrix: end -->\n"
    README.write_text(_MATRIX.sub(lambda _: matrix, README.read_text(encoding="utf-8")), encoding="utf-8")
    if nsa_sel.build_info()["kernels"]:
        block = f"<!-- kernels: NVRTC {nsa_sel.build_info()['cuda_version']} -->\n{generated()}<!-- /kernels -->\n"
        PAGE.write_text(_TABLE.sub(lambda _: block, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
