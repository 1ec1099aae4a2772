"""Merging attention over several parts of the keys into attention over all of them, by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nsa_sel.errors import ArgumentError, ArgumentTypeError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LSES = (torch.float32, torch.float64)


def merge_states(
    outs: Sequence[torch.Tensor] | torch.Tensor, lses: Sequence[torch.Tensor] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partial attentions of the same queries over disjoint keys into the attention over all those keys.

    Equivalent to:

        lse = torch.logsumexp(torch.stack(lses), 0)
        out = sum(torch.exp(part_lse - lse)[..., None] * part for part, part_lse in zip(outs, lses))

    in fp32 (fp64 if any input is), one part after another in the order given: the same parts give the same bits. A part
    with lse = -inf is neutral wherever it stands, whatever its out holds, NaN included: leaving it out changes no bit,
    and where every part is, out = 0 and lse = -inf. A part that is alone not empty comes back unchanged. The result is
    differentiable, in out and in lse. No value is read back to the host.

    >>> import torch, nsa_sel
    >>> q, k, v = torch.randn(1, 1, 2, 4, 64), torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64)
    >>> spans = torch.tensor([[0, 16], [80, 100]]).expand(1, 1, 2, 2, 2)
    >>> parts = [nsa_sel.selection_attention(q, k, v, spans[..., i : i + 1, :], return_lse=True) for i in (0, 1)]
    >>> out, lse = nsa_sel.merge_states(*zip(*parts))
    >>> whole, whole_lse = nsa_sel.selection_attention(q, k, v, spans, return_lse=True)
    >>> torch.allclose(out, whole, atol=1e-5), torch.allclose(lse, whole_lse, atol=1e-5)
    (True, True)

    Args:
        outs: one tensor [..., D] for each part (at least one), or one tensor [parts, ..., D]; any float dtype.
        lses: natural log-sum-exp of each part's scaled logits, [...] of fp32 or fp64, or one tensor [parts, ...].
            Where another library gives base 2, multiply by ln 2.

    Returns:
        out [..., D] in the dtype of outs, lse [...] in the dtype of lses.

    Raises:
        ArgumentError, ArgumentTypeError: number, shape, dtype or device of the parts is wrong.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867, section 3.1.
    """
    parts, part_lses = _parts("outs", outs), _parts("lses", lses)
    _check(parts, part_lses)
    wide = torch.float64 if torch.float64 in (parts[0].dtype, part_lses[0].dtype) else torch.float32
    stacked = torch.stack(part_lses).to(wide)  # [parts, ...]
    top = stacked.detach().amax(0)
    # where every part is empty (-inf) - (-inf) is NaN, and so is inf - inf where a logit is infinite: subtract 0
    top = top.masked_fill(top.isinf(), 0)
    weights = torch.exp(stacked - top).unsqueeze(-1)
    # an empty part has weight 0, and 0 * NaN is NaN: nothing of it may come in
    kept = torch.stack(parts).to(wide).masked_fill((stacked == -torch.inf).unsqueeze(-1), 0)
    kept = torch.nn.functional.pad(kept, (0, 1), value=1.0)  # a last column of ones sums up the weights
    merged = kept.new_zeros(kept.shape[1:])
    for part, weight in zip(kept.unbind(0), weights.unbind(0), strict=True):
        merged = torch.addcmul(merged, part, weight)
    summed, total = merged.split([parts[0].shape[-1], 1], dim=-1)
    empty = total == 0
    total = total.masked_fill(empty, 1)  # its log and its inverse have no gradient at 0
    lse = (top.unsqueeze(-1) + torch.log(total)).masked_fill(empty, -torch.inf).squeeze(-1)
    return (summed / total).to(parts[0].dtype), lse.to(part_lses[0].dtype)


def _parts(name: str, given: Sequence[torch.Tensor] | torch.Tensor) -> list[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        if not given.dim():
            raise ArgumentError(f"{name}: expected [parts, ...], got a tensor without dimensions")
        given = given.unbind(0)
    if not isinstance(given, (list, tuple)):
        raise ArgumentTypeError(f"{name}: expected a list, tuple or tensor of parts, got {type(given).__name__}")
    if not given:
        raise ArgumentError(f"{name}: expected at least one part, got none")
    return list(given)


def _check(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> None:
    if len(outs) != len(lses):
        raise ArgumentError(f"lses: expected {len(outs)} parts (as outs has), got {len(lses)}")
    for name, parts, dtypes in (("outs", outs, _FLOATS), ("lses", lses, _LSES)):
        first = parts[0]
        for i, part in enumerate(parts):
            if not isinstance(part, torch.Tensor):
                raise ArgumentTypeError(f"{name}[{i}]: expected a torch.Tensor, got {type(part).__name__}")
            if part.dtype not in dtypes or part.dtype != first.dtype:
                wanted = [first.dtype] if first.dtype in dtypes else dtypes
                text = " or ".join(str(dtype)[6:] for dtype in wanted)
                raise ArgumentTypeError(f"{name}[{i}]: expected {text}, got {str(part.dtype)[6:]}")
            shape = outs[0].shape if name == "outs" else outs[0].shape[:-1]
            if part.shape != shape or not outs[0].dim():
                text = "[..., D]" if not outs[0].dim() else str(list(shape))
                raise ArgumentError(f"{name}[{i}]: expected {text}, got {list(part.shape)}")
            if part.device != outs[0].device:
                raise ArgumentError(f"{name}[{i}]: expected device {outs[0].device}, got {part.device}")
