"""NSA_SEL_DEBUG: `compare` holds sampled rows of every call against the oracle, `timing` logs path, reason and time.

Both log to the standard logger "nsa_sel". They read results back and wait for the GPU. A graph capture forbids that, so
nothing is logged during one.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable

import torch

from nsa_sel import switches
from nsa_sel.call import Call
from nsa_sel.reference import selection_attention_reference
from nsa_sel.routing import Decision

logger = logging.getLogger("nsa_sel")

SAMPLED_ROWS = 8
MAX_MAE = 1e-3  # above it, and for NaN, the comparison is logged as a warning

_ORACLES = inspect.signature(selection_attention_reference).parameters

Result = tuple[torch.Tensor, "torch.Tensor | None"]


def observed(run: Callable[[Call], Result], call: Call, decision: Decision) -> Result:
    """Run `call` with `run` and log what NSA_SEL_DEBUG asks for; the result is that of `run`, untouched."""
    modes = switches.current().debug
    if not modes or torch.compiler.is_compiling() or _capturing(call):
        return run(call)
    _make_visible()
    if "timing" in modes:
        _wait(call)
        start = time.perf_counter()
        result = run(call)
        _wait(call)
        elapsed = (time.perf_counter() - start) * 1e3
        logger.info("%s (%s): %.3f ms, %s", decision.backend, decision.reason, elapsed, _shape(call))
    else:
        result = run(call)
    if "compare" in modes:
        _compare(call, result, decision)
    return result


def _compare(call: Call, result: Result, decision: Decision) -> None:
    rows = _sampled(call)
    if not rows:
        return
    out, lse = result
    given = {name: value for name, value in call.arguments().items() if name in _ORACLES}
    expected, expected_lse = selection_attention_reference(**given, rows=rows)  # type: ignore[arg-type]
    index = torch.tensor(rows, device=out.device).unbind(dim=1)
    error = (out.detach()[index].to("cpu", torch.float64) - expected).abs()
    mae, largest = float(error.mean()), float(error.max())
    texts = [f"MAE {mae:.3g}, largest error {largest:.3g}"]
    wrong = not mae <= MAX_MAE  # so that NaN is wrong
    if lse is not None:
        found = lse.detach()[index].to("cpu", torch.float64)
        # -inf on both sides is an empty row that is right; their difference would be NaN
        lse_error = torch.where(found == expected_lse, 0.0, (found - expected_lse).abs()).max()
        texts.append(f"largest lse error {float(lse_error):.3g}")
        wrong = wrong or not float(lse_error) <= MAX_MAE * 10
    level = logging.WARNING if wrong else logging.INFO
    found_text = ", ".join(texts)
    logger.log(
        level, "%s against the oracle: %s over %d rows, %s", decision.backend, found_text, len(rows), _shape(call)
    )


def _make_visible() -> None:
    """Let the messages be seen where the program set up no logging: whoever sets the variable wants to read them."""
    if not logger.isEnabledFor(logging.INFO) and logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
        logger.addHandler(handler)


def _sampled(call: Call) -> list[tuple[int, int, int]]:
    """Return up to SAMPLED_ROWS rows (b, s, g), spread evenly over the call: the first and the last among them."""
    p = call
    count = min(p.rows, SAMPLED_ROWS)
    numbers = sorted({round(i * (p.rows - 1) / max(1, count - 1)) for i in range(count)})
    return [(row // (p.S * p.G), row // p.G % p.S, row % p.G) for row in numbers]


def _shape(call: Call) -> str:
    p = call
    bound = "unknown" if p.max_selected is None else p.max_selected
    return f"B={p.B} S={p.S} G={p.G} h={p.h} Dk={p.Dk} Dv={p.Dv} S_kv={p.S_kv} n={p.n} {_dtypes(p)} L bound {bound}"


def _dtypes(call: Call) -> str:
    return f"{call.dtype} on {call.kv_dtype}" if call.fp8 else call.dtype


def _capturing(call: Call) -> bool:
    return call.q.is_cuda and torch.cuda.is_current_stream_capturing()


def _wait(call: Call) -> None:
    if call.q.is_cuda:
        torch.cuda.synchronize(call.q.device)
