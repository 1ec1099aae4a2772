"""Every case on every backend of this machine, judged by the oracle."""

from __future__ import annotations

from typing import Any

import pytest

from nsa_sel.testing import assert_matches_reference
from tests.backends_under_test import BACKENDS, BackendUnderTest
from tests.cases import CASES, Case


def _runs() -> list[Any]:
    """Pair backends and cases; a backend that this machine lacks is skipped once, by name, with the reason."""
    runs = []
    for backend in BACKENDS:
        why = backend.missing()
        if why is not None:
            skip = pytest.mark.skip(reason=f"{backend.name}: {why}")
            runs.append(pytest.param(backend, CASES[0], id=f"{backend.name}-all", marks=skip))
            continue
        runs += [
            pytest.param(backend, case, id=f"{backend.name}-{case.name}")
            for case in CASES
            if backend.cannot(case) is None
        ]
    return runs


@pytest.mark.parametrize(("backend", "case"), _runs())
def test_backend_agrees_with_the_oracle(backend: BackendUnderTest, case: Case) -> None:
    inputs = case.inputs()
    out, lse = backend.run(inputs, **case.options)
    assert_matches_reference(out, lse, inputs)


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert len({backend.name for backend in BACKENDS}) == len(BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_backend_leaves_out_no_more_than_dtypes_and_dims(backend: BackendUnderTest) -> None:
    """A predicate that grows would quietly empty the suite."""
    left_out = [case.name for case in CASES if backend.cannot(case) is not None]
    assert all(name.startswith(("dims-", "fp8-dims-")) for name in left_out), left_out
