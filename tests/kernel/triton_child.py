"""Compiles the Triton kernels of some cases for a GPU that need not be there; a process of its own, because Triton
either interprets or compiles. Usage: python -m tests.kernel.triton_child ARCHITECTURE CASE:STAGES...
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

import torch

from nsa_sel.check import check
from tests.cases import case


class NoGpu:
    """Stands in for the driver, which says what to compile for; nothing is ever launched."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(name: str, stages: int) -> dict[str, Any]:
    """Compile what a case would launch and describe the machine code."""
    from nsa_sel.backends import triton as backend

    call = check(**case(name).inputs().arguments(return_lse=True))
    out = torch.empty((*call.q.shape[:4], call.Dv), dtype=call.q.dtype)
    kernel, arguments = backend.launch(call, out, torch.empty(call.q.shape[:4]), backend.Config(num_stages=stages))
    binary = kernel.warmup(grid=(call.rows,), **arguments)
    assert binary.asm["cubin"].startswith(b"\x7fELF")
    instructions = Counter(re.findall(r"\b(LDGSTS|HMMA|HGMMA|LDL|STL)\b", binary.asm["sass"]))
    return {
        "case": name,
        "kernel": kernel.__name__,
        "target": re.findall(r"\.target (\w+)", binary.asm["ptx"])[0],
        "shared": binary.metadata.shared,
        "copies": instructions["LDGSTS"],
        "products": instructions["HMMA"] + instructions["HGMMA"],
        "spills": instructions["LDL"] + instructions["STL"],
    }


if __name__ == "__main__":
    assert "triton" not in sys.modules, "importing nsa_sel imported triton"
    import triton
    from triton.backends.compiler import GPUTarget

    architecture, *wanted = sys.argv[1:]
    triton.runtime.driver.set_active(NoGpu(GPUTarget("cuda", int(architecture), 32)))
    pairs = [one.rsplit(":", 1) for one in wanted]
    print(json.dumps([compiled(name, int(stages)) for name, stages in pairs]))
