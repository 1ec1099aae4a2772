"""Light stand-ins for the parts of the engines that the integrations name, for machines without the engines.

They hold names and arguments and no behaviour beyond what a test needs. `make test-engines` compares every signature
with the real one (`differences`), so that a stand-in cannot drift from what it stands for.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

Modules = dict[str, ModuleType]


def module(name: str, *members: Any, **values: Any) -> tuple[str, ModuleType]:
    """Return a module of this name with functions and classes under their own names, and values under theirs."""
    made = ModuleType(name)
    made.__path__ = []  # type: ignore[attr-defined]  # others may be imported from below it
    for member in members:
        member.__module__ = name
        setattr(made, member.__name__, member)
    for key, value in values.items():
        setattr(made, key, value)
    return name, made


def install(modules: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the stand-ins importable until the test ends, each bound in its parent as an import would."""
    for name, made in modules.items():
        monkeypatch.setitem(sys.modules, name, made)
        parent, _, child = name.rpartition(".")
        if parent in modules:
            monkeypatch.setattr(modules[parent], child, made, raising=False)


def differences(modules: Modules) -> list[str]:
    """Say where the real, installed modules differ from the stand-ins: names, order, kinds, which have defaults."""
    found = []
    for name, stand_in in modules.items():
        real = importlib.import_module(name)
        assert real is not stand_in, f"{name}: the stand-in is installed, there is nothing to compare it with"
        for label, mine in _functions(stand_in, name):
            theirs = real
            for part in label.removeprefix(f"{name}.").split("."):
                theirs = getattr(theirs, part, None)
            if theirs is None:
                found.append(f"{label}: gone")
            elif parameters(theirs) != parameters(mine):
                found.append(f"{label}: expected {parameters(mine)}, got {parameters(theirs)}")
    return found


def parameters(function: Callable[..., Any]) -> list[tuple[str, str, bool]]:
    """Return name, kind and whether there is a default, of each parameter."""
    return [
        (parameter.name, parameter.kind.name, parameter.default is not inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
    ]


def _functions(stand_in: ModuleType, label: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, member in vars(stand_in).items():
        if name.startswith("_"):
            continue
        if inspect.isfunction(member):
            yield f"{label}.{name}", member
        elif inspect.isclass(member):
            for inner in vars(member):
                function = getattr(member, inner)
                if inspect.isroutine(function) and (inner == "__init__" or not inner.startswith("_")):
                    yield f"{label}.{name}.{inner}", function


# --- transformers --------------------------------------------------------------------------------------------------


class AttentionInterface:
    registered: dict[str, Any] = {}  # noqa: RUF012 - shared by all, as the real one is

    @classmethod
    def register(cls, key, value):
        cls.registered[key] = value


class AttentionMaskInterface:
    registered: dict[str, Any] = {}  # noqa: RUF012

    @classmethod
    def register(cls, key, value):
        cls.registered[key] = value


def sdpa_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=False,
    use_vmap=False,
    device="cpu",
    **kwargs,
):
    raise AssertionError("the stand-in makes no masks")


def sdpa_attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    is_causal=None,
    position_bias=None,
    cache=None,
    **kwargs,
):
    """Dense attention under a mask (None: none)."""
    repeat = query.shape[1] // key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1), attention_mask, scale=scaling
    )
    return out.transpose(1, 2), None


TRANSFORMERS: Modules = dict(
    [
        module("transformers", AttentionInterface, AttentionMaskInterface),
        module("transformers.masking_utils", sdpa_mask),
        module("transformers.integrations"),
        module("transformers.integrations.sdpa_attention", sdpa_attention_forward),
    ]
)


# --- vLLM ----------------------------------------------------------------------------------------------------------

ran: list[str] = []  # which of vLLM's own functions ran


def minimax_m3_sparse_attn_decode(
    q,
    kv_cache,
    topk_idx,
    block_table,
    seq_lens,
    num_kv_heads,
    sm_scale,
    output,
    decode_query_len,
    k_scale=None,
    v_scale=None,
):
    ran.append("minimax_m3_sparse_attn_decode")


def minimax_m3_sparse_attn(
    q,
    kv_cache,
    topk_idx,
    block_table,
    cu_seqlens_q,
    seq_lens,
    prefix_lens,
    max_query_len,
    num_kv_heads,
    sm_scale,
    output,
    k_scale=None,
    v_scale=None,
):
    ran.append("minimax_m3_sparse_attn")


def qsa_sparse_paged_attention(
    q,
    k_cache,
    v_cache,
    logical_indices,
    block_table,
    token_to_req,
    use_prefill_config,
    out=None,
    k_scale=None,
    v_scale=None,
    *,
    output_gate,
):
    ran.append("qsa_sparse_paged_attention")
    return out


class Platform:
    """`vllm.platforms.current_platform` on a GPU; the real class has another name."""

    def __init__(self, major: int = 9, minor: int = 0) -> None:
        self.capability = SimpleNamespace(major=major, minor=minor)

    def is_cuda(self):
        return True

    def get_device_capability(self, device_id=0):
        return self.capability


def vllm_modules(version: str = "0.32.0", platform: object | None = None) -> Modules:
    """Return fresh stand-ins of a vLLM of this version on this platform (an H100 unless said otherwise)."""
    ran.clear()
    m3, qsa = "vllm.models.minimax_m3", "vllm.models.qwen4_exp"
    functions = (minimax_m3_sparse_attn_decode, minimax_m3_sparse_attn)
    return dict(
        [
            module("vllm", __version__=version),
            module("vllm.platforms", current_platform=platform or Platform()),
            module("vllm.models"),
            module(m3),
            module(f"{m3}.common"),
            module(f"{m3}.common.sparse_attention", *functions, SPARSE_BLOCK_SIZE=128),
            module(qsa),
            module(f"{qsa}.nvidia"),
            module(f"{qsa}.nvidia.ops"),
            module(f"{qsa}.nvidia.ops.qsa", qsa_sparse_paged_attention),
        ]
    )
