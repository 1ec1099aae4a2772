"""Counts calls by backend and reason, so that a test or a benchmark can prove which path ran."""

from __future__ import annotations

from nsa_sel import _build, _fork

_lock = _fork.lock()
_counts: dict[str, dict[str, int]] = {}


def count(backend: str, reason: str) -> None:
    """Count one call that `backend` has run for `reason`."""
    with _lock:
        reasons = _counts.setdefault(backend, {})
        reasons[reason] = reasons.get(reason, 0) + 1


def stats() -> dict[str, dict[str, int]]:
    """Return how many calls each backend has run, by reason: `{backend: {reason: calls}}`.

    >>> import nsa_sel, torch
    >>> nsa_sel.reset_stats()
    >>> q, k = torch.zeros(1, 1, 1, 1, 8), torch.zeros(1, 1, 4, 8)
    >>> _ = nsa_sel.selection_attention(q, k, k, torch.tensor([[[[[0, 4]]]]]))
    >>> nsa_sel.stats()
    {'sdpa': {'tensors on cpu': 1}}
    """
    with _lock:
        found = {backend: dict(reasons) for backend, reasons in _counts.items()}
    for backend, reason, calls in _build.core.served() if _build.core is not None else ():
        reasons = found.setdefault(backend, {})
        reasons[reason] = reasons.get(reason, 0) + calls
    return found


def reset_stats() -> None:
    """Set every count back to nothing."""
    with _lock:
        _counts.clear()
    if _build.core is not None:
        _build.core.reset_served()
