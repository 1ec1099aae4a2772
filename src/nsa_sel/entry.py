"""Where a call comes in: one that looks like an earlier one goes straight to its launch, every other the long way."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from nsa_sel import _build, arrays, execute, ops
from nsa_sel.check import PARAMETERS


def _long_way(*arguments: Any) -> Any:
    """Run a call given by the arguments of `selection_attention`, each in its place, as what it is."""
    q = arguments[0]
    if arrays.is_foreign(q):
        return arrays.attend(attend, *arguments)
    if isinstance(q, torch.Tensor) and ops.must_see(q):
        return ops.attend(*arguments)
    return execute.attend(*arguments)


def set_up(exchange: bool = True) -> Any:
    """Return the function that every eager call goes through: the cache of launches, and behind it the long way.

    Args:
        exchange: read tensors through torch's DLPack exchange interface where it has one, else by their attributes.
    """
    if _build.core is None:
        return _long_way
    modes = (torch._C._len_torch_function_stack, *ops.MODES)
    _build.core.set_up_calls(_long_way, (*PARAMETERS, "backend"), modes, torch, forward_ad, exchange)
    return _build.core.attend


attend = set_up()
