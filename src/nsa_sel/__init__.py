"""Selection attention: each query row attends to the K/V tokens that it selected, and to no others.

>>> import nsa_sel, torch
>>> q = torch.randn(1, 1, 4, 16, 192)  # [B, S, G, h, Dk]
>>> k, v = torch.randn(1, 4, 4096, 192), torch.randn(1, 4, 4096, 128)  # [B, G, S_kv, D]
>>> blocks = torch.randint(0, 64, (1, 1, 4, 16))  # [B, S, G, n]
>>> nsa_sel.selection_attention(q, k, v, block_indices=blocks, block_size=64).shape
torch.Size([1, 1, 4, 16, 128])
"""

from nsa_sel import distributed
from nsa_sel._build import __version__, build_info
from nsa_sel.api import explain, selection_attention
from nsa_sel.errors import (
    ArgumentError,
    ArgumentTypeError,
    AutogradError,
    BackendError,
    KernelLaunchError,
    NsaSelError,
    PolicyError,
    SwitchError,
)
from nsa_sel.execute import refresh_routing
from nsa_sel.merge import merge_states
from nsa_sel.quantize import quantize_kv
from nsa_sel.ranges import blocks_to_ranges, merge_ranges
from nsa_sel.routing import Decision
from nsa_sel.stats import reset_stats, stats

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "AutogradError",
    "BackendError",
    "Decision",
    "KernelLaunchError",
    "NsaSelError",
    "PolicyError",
    "SwitchError",
    "__version__",
    "blocks_to_ranges",
    "build_info",
    "distributed",
    "explain",
    "merge_ranges",
    "merge_states",
    "quantize_kv",
    "refresh_routing",
    "reset_stats",
    "selection_attention",
    "stats",
]
