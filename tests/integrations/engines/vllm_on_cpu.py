"""vLLM's sparse attention on a CPU: its own classes and metadata, its own Triton kernels under Triton's interpreter.

vLLM serves these models on GPUs alone, so a few things are stood in for. None of them computes: a driver for Triton,
the packages of the models (their `__init__` load whole models), what a module imports and never calls here.
Import this before anything of vLLM.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import numpy as np
import torch
import triton.backends
from triton.runtime import interpreter


class _Driver:
    """Says that there is something to run on; the interpreter asks no driver for more."""

    @staticmethod
    def is_active() -> bool:
        return True


triton.backends.backends["cpu"] = SimpleNamespace(driver=_Driver)


def _as_bool(handle: Any) -> Any:
    return interpreter.TensorHandle(handle.data.astype(np.bool_), handle.dtype)


def _cast_masks(name: str, place: int) -> None:
    """The interpreter makes numbers of some masks, which its loads and stores then refuse."""
    original = getattr(interpreter.InterpreterBuilder, name)

    def with_bool(self: Any, *args: Any) -> Any:
        return original(self, *args[:place], _as_bool(args[place]), *args[place + 1 :])

    setattr(interpreter.InterpreterBuilder, name, with_bool)


def _and_of_mixed_masks(self: Any, lhs: Any, rhs: Any) -> Any:
    if (lhs.data.dtype == np.bool_) != (rhs.data.dtype == np.bool_):
        lhs, rhs = _as_bool(lhs), _as_bool(rhs)
    return self.binary_op(lhs, rhs, np.bitwise_and)


_cast_masks("create_masked_load", 1)
_cast_masks("create_masked_store", 2)
interpreter.InterpreterBuilder.create_and = _and_of_mixed_masks

import vllm  # noqa: E402 - it looks for Triton when it is imported


def _bare(name: str, **members: Any) -> None:
    module = ModuleType(name)
    module.__path__ = [str(Path(vllm.__file__).parent.joinpath(*name.split(".")[1:]))]  # type: ignore[attr-defined]
    vars(module).update(members)
    sys.modules[name] = module


def load_models() -> SimpleNamespace:
    """Import the modules with the implementations and the kernels."""
    for package in ("models", "models.minimax_m3", "models.qwen4_exp", "models.qwen4_exp.nvidia"):
        _bare(f"vllm.{package}")
    _bare("vllm.model_executor.models.qwen3_vl", mrope_positions_factor=None)  # wants torchvision
    _bare("vllm.models.qwen4_exp.nvidia.model", without_modelopt_fp4=None)  # is the whole model
    from vllm.models.minimax_m3.common import sparse_attention
    from vllm.models.qwen4_exp.nvidia import qsa
    from vllm.models.qwen4_exp.nvidia.ops import qsa as qsa_ops

    qsa.is_flash_attn_varlen_func_available = lambda: True  # it asks and never calls it
    return SimpleNamespace(m3=sparse_attention, qsa=qsa, qsa_ops=qsa_ops)


class BFloat16Is:
    """`torch` with another dtype for bfloat16: QSA insists on bfloat16, which the interpreter gets wrong by 1e8."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.bfloat16 = dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def forward_context(metadata: dict[str, Any]) -> Iterator[None]:
    """Run with vLLM's forward context holding this metadata."""
    from vllm.forward_context import ForwardContext, override_forward_context

    with override_forward_context(ForwardContext({}, metadata, {})):
        yield


def m3_metadata(models: SimpleNamespace, tensors: dict[str, Any], queries: list[int]) -> Any:
    """Let vLLM's builder make the metadata of a step in which each request has so many queries, decodes first."""
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    G, D = tensors["num_kv_heads"], tensors["q"].shape[2]
    spec = FullAttentionSpec(block_size=128, num_kv_heads=G, head_size=D, dtype=tensors["q"].dtype)
    builder = models.m3.MiniMaxM3SparseMetadataBuilder(spec, ["layer"], VllmConfig(), torch.device("cpu"))
    builder.reorder_batch_threshold = min(q for q in queries if q)  # what speculative decoding would set
    starts = torch.nn.functional.pad(torch.tensor(queries).cumsum(0), (1, 0)).to(torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=tensors["seq_lens"],
        num_reqs=len(queries),
        num_actual_tokens=sum(queries),
        max_query_len=max(queries),
        max_seq_len=int(tensors["seq_lens"].max()),
        block_table_tensor=tensors["block_table"],
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
        seq_lens_cpu_upper_bound=tensors["seq_lens"],
    )
    return builder.build(0, common)


def run_m3(models: SimpleNamespace, tensors: dict[str, Any], queries: list[int]) -> tuple[torch.Tensor, Any]:
    """Run vLLM's implementation class on a step: out [T, heads, D], and the metadata."""
    q, topk = tensors["q"], tensors["topk_idx"]
    T, heads, D = q.shape
    implementation = models.m3.MiniMaxM3SparseTritonImpl(
        heads, D, tensors["sm_scale"], tensors["num_kv_heads"], topk_blocks=topk.shape[2], sparse_block_size=128
    )
    layer = SimpleNamespace(layer_name="layer", topk_indices_buffer=topk.transpose(0, 1).contiguous())
    metadata = m3_metadata(models, tensors, queries)
    output = torch.full((T, heads * D), float("nan"), dtype=q.dtype)
    with forward_context({"layer": metadata}):
        returned = implementation.forward(layer, q.reshape(T, -1), tensors["kv_cache"], output)
    assert returned is output
    return output.view(T, heads, D), metadata


def run_qsa(models: SimpleNamespace, tensors: dict[str, Any]) -> torch.Tensor:
    """Run vLLM's implementation class of QSA: out [T, heads, D]."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

    q, k = tensors["q"], tensors["k_cache"]
    T, heads, D = q.shape
    implementation = models.qsa.Qwen4ExpQSAFlashAttentionImpl(
        heads, D, D**-0.5, k.shape[2], None, None, "auto"
    )  # fmt: skip
    metadata = FlashAttentionMetadata(
        num_actual_tokens=T,
        max_query_len=1,
        query_start_loc=torch.arange(T + 1, dtype=torch.int32),
        max_seq_len=1,
        seq_lens=torch.ones(T, dtype=torch.int32),
        block_table=tensors["block_table"],
        slot_mapping=torch.zeros(T, dtype=torch.int64),
    )
    cache = torch.cat([k, tensors["v_cache"]], -1).transpose(1, 2)  # [P, G, page, 2 * D], as vLLM allocates it
    layer = SimpleNamespace(topk_indices_buffer=tensors["logical_indices"])
    return implementation.forward_qsa(
        layer, q, None, None, cache, metadata, torch.empty_like(q), tensors["token_to_req"],
        tensors["use_prefill_config"], tensors["output_gate"].view(T, heads, D),
    )  # fmt: skip
