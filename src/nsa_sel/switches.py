"""The environment variables that steer routing: unset and empty mean the same, an unknown value is an error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nsa_sel.errors import SwitchError

TRITON_MIN_L = 4096
DEBUG_MODES = ("compare", "timing")


@dataclass(frozen=True, slots=True)
class Switches:
    """What the environment asks for; None where a variable is unset."""

    cuda: bool | None = None  # NSA_SEL_CUDA
    triton: bool | None = None  # NSA_SEL_TRITON
    triton_min_l: int = TRITON_MIN_L  # NSA_SEL_TRITON_MIN_L, tokens
    triton_force: bool = False  # NSA_SEL_TRITON_FORCE
    policy: str | None = None  # NSA_SEL_POLICY, a path
    debug: frozenset[str] = frozenset()  # NSA_SEL_DEBUG, of DEBUG_MODES
    vllm: bool = False  # NSA_SEL_VLLM
    vllm_prefill: bool = False  # NSA_SEL_VLLM_PREFILL


def parse(environ: Mapping[str, str]) -> Switches:
    """Read every switch from `environ`.

    Raises:
        SwitchError: a variable holds a value that it does not know.

    >>> parse({"NSA_SEL_CUDA": "0"}).cuda
    False
    >>> parse({"NSA_SEL_CUDA": ""}) == parse({})
    True
    """
    return Switches(
        cuda=_flag(environ, "NSA_SEL_CUDA"),
        triton=_flag(environ, "NSA_SEL_TRITON"),
        triton_min_l=_tokens(environ, "NSA_SEL_TRITON_MIN_L", TRITON_MIN_L),
        triton_force=bool(_flag(environ, "NSA_SEL_TRITON_FORCE")),
        policy=environ.get("NSA_SEL_POLICY") or None,
        debug=_modes(environ, "NSA_SEL_DEBUG"),
        vllm=bool(_flag(environ, "NSA_SEL_VLLM")),
        vllm_prefill=bool(_flag(environ, "NSA_SEL_VLLM_PREFILL")),
    )


def _flag(environ: Mapping[str, str], name: str) -> bool | None:
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SwitchError(f"{name}: expected 0, 1 or nothing, got {value!r}")
    return None if value == "" else value == "1"


def _tokens(environ: Mapping[str, str], name: str, default: int) -> int:
    value = environ.get(name, "")
    if value == "":
        return default
    # str.isdigit() alone would take superscripts, which int() refuses
    if not (value.isascii() and value.isdigit()):
        raise SwitchError(f"{name}: expected a whole number of tokens >= 0 or nothing, got {value!r}")
    if len(value) > 18:
        raise SwitchError(f"{name}: expected a number of tokens that a cache can hold, got {len(value)} digits")
    return int(value)


def _modes(environ: Mapping[str, str], name: str) -> frozenset[str]:
    value = environ.get(name, "")
    modes = frozenset(value.split(",")) if value else frozenset()
    if not modes <= set(DEBUG_MODES):
        raise SwitchError(f"{name}: expected {', '.join(DEBUG_MODES)}, both with a comma, or nothing, got {value!r}")
    return modes


_current: Switches | None = None


def current() -> Switches:
    """Return the switches as they were when the first call routed (or at the last `refresh`)."""
    global _current
    if _current is None:
        _current = parse(os.environ)
    return _current


def refresh() -> None:
    """Read the environment again; what is wrong is raised here and again by the next call."""
    global _current
    _current = None
    current()
