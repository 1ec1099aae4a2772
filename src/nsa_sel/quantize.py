"""K and V as float8_e4m3fn with the scales that `selection_attention` takes: half the bytes of a 16-bit cache."""

from __future__ import annotations

import torch

from nsa_sel.errors import ArgumentError, ArgumentTypeError

SCOPES = ("tensor", "group", "token")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def quantize_kv(
    k: torch.Tensor, v: torch.Tensor, scope: str = "tensor"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return K and V as float8_e4m3fn, each with the scales by which its values are the old ones again.

    Equivalent to, for the K of one scope and alike for V:

        k_scale = k.abs().amax() / 448
        k8 = (k / k_scale).to(torch.float8_e4m3fn)

    >>> import torch
    >>> import nsa_sel
    >>> q, k, v = (torch.randn(1, 1, 2, 4, 64).bfloat16(), *torch.randn(2, 1, 2, 100, 64).bfloat16())
    >>> ranges = torch.tensor([[[[[0, 16], [80, 100]], [[5, 30], [0, 0]]]]])
    >>> k8, v8, k_scale, v_scale = quantize_kv(k, v, scope="token")
    >>> k8.dtype, k8.shape == k.shape, k_scale.shape
    (torch.float8_e4m3fn, True, torch.Size([1, 2, 100]))
    >>> out = nsa_sel.selection_attention(q, k8, v8, ranges, k_scale=k_scale, v_scale=v_scale)
    >>> error = (out - nsa_sel.selection_attention(q, k, v, ranges)).float().abs().mean()
    >>> out.dtype, bool(error < 0.02)
    (torch.bfloat16, True)

    A cache that grows cannot look at all of its tokens first. There, scope "token" is the one to call on each new
    token, [B, G, 1, D], or a scale is fixed beforehand and the division written out.

    Args:
        k: keys [B, G, S_kv, Dk] or pages of them [P, G, page_size, Dk], any strides; fp16, bf16 or fp32, finite.
        v: values [B, G, S_kv, Dv] or pages of them.
        scope: what shares one scale: "tensor", all of k; "group", a KV group in every request or page; "token", the
            row of one token in one group.

    Returns:
        k8 and v8 in the shapes of k and v, contiguous, and k_scale and v_scale in fp32: [1], [G], or [B, G, S_kv]
        (pages: [P, G, page_size]). A scope of zeros has scale 1. The relative error of an element is at most 2^-4,
        or 2^-10 of the scale where it lies below 2^-6 of it.

    Raises:
        ArgumentError, ArgumentTypeError: a shape, a dtype or the scope is wrong.

    Format: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433), section 3.
    """
    for name, cache in (("k", k), ("v", v)):
        if not isinstance(cache, torch.Tensor):
            raise ArgumentTypeError(f"{name}: expected a torch.Tensor, got {type(cache).__name__}")
        if cache.dtype not in _FLOATS:
            raise ArgumentTypeError(f"{name}: expected float16, bfloat16 or float32, got {str(cache.dtype)[6:]}")
        if cache.dim() != 4:
            raise ArgumentError(f"{name}: expected 4 dimensions [B or P, G, tokens, D], got {list(cache.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ArgumentError(f"v: expected {list(k.shape[:3])} (those of k) before Dv, got {list(v.shape)}")
    if scope not in SCOPES:
        raise ArgumentError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    k8, k_scale = _quantize(k, scope)
    v8, v_scale = _quantize(v, scope)
    return k8, v8, k_scale, v_scale


def _quantize(cache: torch.Tensor, scope: str) -> tuple[torch.Tensor, torch.Tensor]:
    shared = {"tensor": (0, 1, 2, 3), "group": (0, 2, 3), "token": (3,)}[scope]
    wide = cache.detach().to(torch.float32)
    if wide.numel():
        largest = wide.abs().amax(shared, keepdim=True)
    else:  # amax has no result over nothing
        largest = wide.new_zeros([1 if d in shared else extent for d, extent in enumerate(wide.shape)])
    # a quotient of the smallest numbers would be 0, and 0 / 0 is NaN
    scale = torch.where(largest > 0, (largest / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    # a quotient may be rounded up beyond the largest value, which float8_e4m3fn has nothing but NaN for
    stored = (wide / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return stored, scale.flatten() if scope != "token" else scale.squeeze(3)
