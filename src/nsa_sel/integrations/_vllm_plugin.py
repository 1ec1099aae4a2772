"""The plug-in for vLLM: puts our functions where vLLM calls its Triton kernels, and leaves everything else alone.

vLLM calls `register` in every process that it starts, before it imports a model. Importing a model's package loads the
whole model, so nothing is imported here: each function is replaced when vLLM itself imports the module that holds it.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import nsa_sel
from nsa_sel import switches
from nsa_sel.errors import NsaSelError
from nsa_sel.integrations import _vllm_calls as calls
from nsa_sel.integrations import vllm as functions

# Names below vLLM's own, so that vLLM's settings show it.
logger = logging.getLogger("vllm.nsa_sel")

# What the functions mean (the count column, the gate, what a scale multiplies) shows in no signature.
TRIED_VERSIONS = ("0.32",)
CAPABILITIES = ((8, 0), (9, 0))  # from, to: elsewhere vLLM has kernels of its own


@dataclass(frozen=True)
class Target:
    """A function of vLLM, where it is called from, and how to say it in the words of `selection_attention`."""

    module: str  # vLLM looks the name up here at each call
    name: str
    prepare: Callable[..., calls.Prepared]
    # Of the call's arguments: whether it is a step with prefills, and all that routing's decision may depend on
    kind: Callable[..., tuple[bool, tuple[Any, ...]]]
    prefills_only: bool = False
    # Facts of the module that no signature shows; a reason where one does not hold
    problem: Callable[[ModuleType], str | None] = lambda module: None


def _m3_problem(module: ModuleType) -> str | None:
    block = getattr(module, "SPARSE_BLOCK_SIZE", None)
    return None if block == calls.M3_BLOCK else f"SPARSE_BLOCK_SIZE: expected {calls.M3_BLOCK}, got {block}"


def _kind(q: Any, cache: Any, selection: Any) -> tuple[Any, ...]:
    return q.shape[1:], q.dtype, q.device, cache.shape[1:], cache.dtype, selection.shape[-1]


def _m3_kind(q: Any, kv_cache: Any, topk_idx: Any, *_: Any, **__: Any) -> tuple[bool, tuple[Any, ...]]:
    return False, _kind(q, kv_cache, topk_idx)


def _qsa_kind(
    q: Any, k_cache: Any, v_cache: Any, logical_indices: Any, block_table: Any, token_to_req: Any,
    use_prefill_config: bool, *_: Any, **__: Any,
) -> tuple[bool, tuple[Any, ...]]:  # fmt: skip
    return use_prefill_config, _kind(q, k_cache, logical_indices)


_M3 = "vllm.models.minimax_m3.common.sparse_attention"
_QSA = "vllm.models.qwen4_exp.nvidia.ops.qsa"
TARGETS = (
    Target(_M3, "minimax_m3_sparse_attn_decode", calls.prepare_m3_decode, _m3_kind, problem=_m3_problem),
    Target(_M3, "minimax_m3_sparse_attn", calls.prepare_m3_prefill, _m3_kind, True, _m3_problem),
    Target(_QSA, "qsa_sparse_paged_attention", calls.prepare_qsa, _qsa_kind),
)


class Replacement:
    """Stands in a vLLM module for one of its functions and runs ours where the kernel can, vLLM's elsewhere.

    What runs is decided once per kind of call (shapes of heads and cache, dtypes, device) and said in the log.
    """

    def __init__(self, target: Target, original: Callable[..., Any], backends: tuple[str, ...], prefill: bool) -> None:
        functools.update_wrapper(self, original)
        self.target, self.original = target, original
        self._backends, self._prefill = backends, prefill
        self._decided: dict[tuple[Any, ...], str | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one call, with vLLM's arguments."""
        is_prefill, kind = self.target.kind(*args, **kwargs)
        if (is_prefill and not self._prefill) or self._decided.get(kind, "") is None:
            return self.original(*args, **kwargs)
        try:
            call = self.target.prepare(*args, **kwargs)
            if kind not in self._decided:
                self._decide(kind, nsa_sel.explain(**call.arguments))
            backend = self._decided[kind]
            if backend is None:
                return self.original(*args, **kwargs)
            nsa_sel.selection_attention(**call.arguments, backend=backend)
        except NsaSelError as error:  # refused before anything ran; what broke the GPU is no NsaSelError and goes on
            self._decided[kind] = None
            logger.warning("nsa_sel: %s: vLLM's own kernel runs: %s", self.target.name, error)
            return self.original(*args, **kwargs)
        return call.finish()

    def _decide(self, kind: tuple[Any, ...], decision: nsa_sel.Decision) -> None:
        ours = decision.backend in self._backends
        self._decided[kind] = decision.backend if ours else None
        who = (
            f"runs on {decision.backend}"
            if ours
            else f"is left to vLLM's own kernel, it would run on {decision.backend}"
        )
        logger.info("nsa_sel: %s %s: %s", self.target.name, who, decision.reason)


def register() -> None:
    """Wait for the modules of the models, on a vLLM and a GPU that this was made for; say in the log what was done.

    Calling it again changes nothing. Off unless NSA_SEL_VLLM=1; NSA_SEL_VLLM_PREFILL=1 takes prefills too.

    Raises:
        SwitchError: a switch holds a value that it does not know.
    """
    current = switches.current()
    if not current.vllm:
        return
    try:
        reason = _refusal()
        if reason is None:
            install(prefill=current.vllm_prefill)
        else:
            logger.warning("nsa_sel: vLLM goes on without us: %s", reason)
    except Exception:  # vLLM would not start: an accelerator that fails to load is no reason for that
        logger.exception("nsa_sel: vLLM goes on without us")


def install(backends: tuple[str, ...] = ("cuda",), prefill: bool = False) -> None:
    """Replace the functions as soon as their modules are imported; ours run where routing chooses one of `backends`."""
    from wrapt import when_imported

    for target in TARGETS:
        if target.prefills_only and not prefill:
            continue
        when_imported(target.module)(functools.partial(_replace, target, backends, prefill))


def signature_problem(target: Target, theirs: Callable[..., Any]) -> str | None:
    """Say where a function of vLLM takes other arguments than the one that would replace it."""
    ours = getattr(functions, target.name)
    wanted, found = (
        [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (ours, theirs)
    )
    if wanted == found:
        return None
    return f"expected the arguments {_in_words(wanted)}, got {_in_words(found)}"


def _in_words(parameters: list[tuple[str, Any, Any]]) -> str:
    empty = inspect.Parameter.empty
    return ", ".join(name if default is empty else f"{name}={default!r}" for name, _, default in parameters)


def _replace(target: Target, backends: tuple[str, ...], prefill: bool, module: ModuleType) -> None:
    theirs: Any = getattr(module, target.name, None)
    if isinstance(theirs, Replacement):
        return
    if not inspect.isfunction(theirs):
        reason: str | None = f"expected a function, got {theirs!r}"
    else:
        reason = target.problem(module) or signature_problem(target, theirs)
    if reason is not None:
        logger.warning("nsa_sel: %s.%s is left alone: %s", target.module, target.name, reason)
        return
    setattr(module, target.name, Replacement(target, theirs, backends, prefill))
    logger.info("nsa_sel %s stands in for %s.%s", nsa_sel.__version__, target.module, target.name)


def _refusal() -> str | None:
    """Say why this vLLM on this machine is not for us."""
    import vllm
    from vllm.platforms import current_platform

    if not vllm.__version__.startswith(tuple(f"{version}." for version in TRIED_VERSIONS)):
        return f"vllm: expected version {' or '.join(TRIED_VERSIONS)}, got {vllm.__version__}"
    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is None:
        return f"expected a CUDA platform, got {type(current_platform).__name__}"
    if not CAPABILITIES[0] <= (capability.major, capability.minor) <= CAPABILITIES[1]:
        return f"expected compute capability 8.0 to 9.0, got {capability.major}.{capability.minor}"
    if importlib.util.find_spec("wrapt") is None:
        return "wrapt is not installed: pip install 'nsa-sel[vllm]'"
    return None
