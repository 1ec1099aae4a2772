"""Chunks of rows for packed SDPA: from the lengths of the rows alone, in numpy, before anything is gathered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsa_sel.call import Call

MEMORY_BUDGET = 256 * 2**20  # bytes that a chunk may hold beyond inputs and outputs
_SMALL = 4 * 2**20  # bytes below which padding costs less than another chunk would
_MAX_ROWS = 32768  # rows of a chunk: a batch beyond 65,535 does not fit CUDA's grid
_INVARIANT_ROWS = 16  # rows of a chunk of short rows when a row's bits may not depend on its batch
_INVARIANT_TOKENS = 16  # the fewest slots of such a chunk, and the steps in which it grows to its double
INVARIANT_SLOTS = 16384  # slots of such a chunk: of longer rows it holds fewer


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that are gathered and attended together."""

    rows: slice  # of the rows in planned order
    tokens: int  # slots per row, the longest row's L or more
    piece: int  # slots that fit into memory at once
    masked: bool  # some slots hold no selected token
    pad_rows: int = 0  # times that the last row is repeated to keep the chunk's shape the same


def captured_bound(problem: Call) -> int:
    """Return how many tokens of each row a captured graph computes, where no length can be looked at.

    Blocks bound L by themselves, so that a broken promise does no harm. Spans do not (n * S_kv is theirs): there the
    caller's promise counts.
    """
    if problem.block_indices is not None or problem.max_selected is None:
        return problem.largest
    return problem.max_selected


def bytes_per_token(problem: Call) -> int:
    """Memory that one gathered token takes: K and V, their upcast copies, a few int64 indices, logits of h heads.

    A float8 cache is computed in fp32, and either of K and V has its bytes and their places beside it while it is
    widened.
    """
    item = {"float64": 8, "float32": 4}.get(problem.dtype, 2)
    wide = max(item, 4)
    rows = 2 * max(problem.Dk, problem.Dv) * (item + (wide if item < wide else 0))
    if problem.fp8:
        rows += 5 * max(problem.Dk, problem.Dv)
    # lse counts whether it is asked for or not: other chunks would give out other bits
    return rows + 64 + wide * (problem.Dk + 5 * problem.h)


def make_plan(problem: Call, lengths: np.ndarray, budget: int, masked: bool) -> list[Chunk]:
    """Cut rows, in descending order of L, into chunks within the budget that pad no row to more than twice its L.

    Args:
        lengths: L of each row, descending; rows with L = 0 come into no chunk.
        budget: bytes of a chunk.
        masked: slots inside a row's L may hold no token (pages that are missing).
    """
    per_token = bytes_per_token(problem)
    room = max(1, budget // per_token)  # tokens that fit into the budget
    if problem.batch_invariant:
        return _plan_invariant(lengths, room)
    chunks = []
    row, rows = 0, _rows_longer_than(lengths, 0)
    while row < rows:
        tokens = int(lengths[row])
        until = rows
        if (rows - row) * tokens * per_token > _SMALL:
            until = _rows_longer_than(lengths, tokens // 2)
        until = min(until, row + _MAX_ROWS, row + max(1, room // tokens))
        padded = bool(lengths[until - 1] != tokens)
        chunks.append(Chunk(slice(row, until), tokens, min(tokens, room), masked or padded))
        row = until
    return chunks


def _plan_invariant(lengths: np.ndarray, room: int) -> list[Chunk]:
    """Cut rows into chunks whose shape follows from a row's own L: the same arithmetic for a row in any company."""
    chunks = []
    row, rows = 0, _rows_longer_than(lengths, 0)
    while row < rows:
        step = max(_INVARIANT_TOKENS, (1 << (int(lengths[row]) - 1).bit_length()) // (2 * _INVARIANT_TOKENS))
        tokens = -(-int(lengths[row]) // step) * step
        size = max(1, min(_INVARIANT_ROWS, INVARIANT_SLOTS // tokens))
        until = min(row + size, _rows_longer_than(lengths, tokens - step))
        chunks.append(Chunk(slice(row, until), tokens, min(tokens, max(1, room // size)), True, size - (until - row)))
        row = until
    return chunks


def _rows_longer_than(lengths: np.ndarray, tokens: int) -> int:
    return int(np.searchsorted(-lengths, -tokens, side="left"))
