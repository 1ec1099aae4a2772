"""The compiled kernels' machine code, run instruction by instruction on the CPU with real values, and its clock."""

from tests.machine_code.call import Run, selection_attention

__all__ = ["Run", "selection_attention"]
