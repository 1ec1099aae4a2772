"""What a GPU is by its name: its compute capability, and the GB/s that its memory delivers at most, by datasheet."""

from __future__ import annotations

import functools
import re

# The first that is found in a device's name counts, so the longer names stand first. A GPU that is not here is not
# checked: that a name is unknown says nothing about the data.
GPUS: tuple[tuple[str, str, float], ...] = (
    (r"GB?200|B100|B300", "100", 8000), (r"GH200", "90", 4900), (r"H200", "90", 4890), (r"H100 NVL", "90", 3938),
    (r"H100 PCIe", "90", 2039), (r"H100|H800", "90", 3352), (r"H20\b", "90", 4000),
    (r"A[18]00.*40GB", "80", 1555), (r"A[18]00.*80GB PCIe|A[18]00-PCIE-80GB", "80", 1935), (r"A[18]00\b", "80", 2039),
    (r"A30\b", "80", 933), (r"A40\b", "86", 696), (r"A10G?\b", "86", 600), (r"A16\b", "86", 200), (r"A2\b", "86", 200),
    (r"RTX A6000", "86", 768), (r"RTX A5500|RTX A5000", "86", 768), (r"RTX A4000", "86", 448),
    (r"3090 Ti", "86", 1008), (r"3090", "86", 936), (r"3080 Ti", "86", 912), (r"3080", "86", 760),
    (r"L40S?\b", "89", 864), (r"L4\b", "89", 300), (r"4090", "89", 1008), (r"4080", "89", 737), (r"4070", "89", 672),
    (r"RTX 6000 Ada", "89", 960), (r"RTX 5000 Ada", "89", 576), (r"5090", "120", 1792), (r"5080", "120", 960),
    (r"V100", "70", 900), (r"T4\b", "75", 320),
)  # fmt: skip


@functools.cache
def known(device: str) -> tuple[str, float] | None:
    """Return compute capability and GB/s of a GPU by its name, None for one that is not in the list.

    >>> known("NVIDIA H100 80GB HBM3")
    ('90', 3352)
    """
    return next(((sm, gbps) for pattern, sm, gbps in GPUS if re.search(pattern, device)), None)
