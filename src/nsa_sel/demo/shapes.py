"""The two attention shapes that the demonstration decodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's attention at decode, B = S = 1."""

    name: str
    G: int  # KV groups
    h: int  # query heads per group
    Dk: int
    Dv: int
    n: int  # selected blocks
    block_size: int  # l_sel, tokens
    page_size: int | None = None  # tokens; None: the cache is contiguous

    @property
    def heads(self) -> int:
        """Query heads in all groups."""
        return self.G * self.h


SHAPES = (
    Shape("NSA paper", G=4, h=16, Dk=192, Dv=128, n=16, block_size=64),
    Shape("MiniMax-M3", G=4, h=16, Dk=128, Dv=128, n=16, block_size=128, page_size=128),
)
