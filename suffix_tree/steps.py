"""One call per engine step: extend and draft for all requests of a batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree._layout import (
    D_PARENT,
    D_TOKEN,
    D_VALUES,
    R_DRAFT,
    R_DRAFTED,
    R_INDEX,
    R_SEQUENCE,
    RECORD_WIDTH,
)
from specdec.suffix_tree.calibration import learn
from specdec.suffix_tree.drafting import draft_path, draft_tree
from specdec.suffix_tree.matching import advance_pins
from specdec.suffix_tree.memory import Int32Array, Int64Array, float32_at, int32_at, int64_at, kernel
from specdec.suffix_tree.paged import append_tokens, begin_cached

__all__ = ["begin_request", "extend_batch", "read_drafts", "replay", "speculate_batch", "step_batch", "step_one"]

FloatArray = npt.NDArray[np.float32]


@kernel
def begin_request(row: Int64Array, prompt: Int32Array) -> None:
    """Index the prompt as the request's own text and open its cached response."""
    append_tokens(row, prompt, 0, prompt.shape[0], False)
    if row[R_SEQUENCE] > 0:
        begin_cached(int64_at(row[R_INDEX]), row)


@kernel
def _extend(row: Int64Array, new: Int32Array, start: int, stop: int) -> None:
    learn(int64_at(row[R_INDEX]), row, new, start, stop)
    advance_pins(row, new, start, stop)
    append_tokens(row, new, start, stop, row[R_SEQUENCE] > 0)


@kernel
def _draft(row: Int64Array, budget: int, threshold: float, as_tree: bool) -> int:
    row[R_DRAFTED] = 0
    if budget <= 0:
        return 0
    return draft_tree(row, budget, threshold) if as_tree else draft_path(row, budget, threshold)


@kernel
def extend_batch(rows: Int64Array, slots: Int64Array, new: Int32Array, offsets: Int64Array) -> None:
    """Append ``new[offsets[i] : offsets[i + 1]]`` to the request in row ``slots[i]``, for all i, and learn."""
    for i in range(slots.shape[0]):
        _extend(rows[slots[i]], new, offsets[i], offsets[i + 1])


@kernel
def speculate_batch(
    rows: Int64Array, slots: Int64Array, budgets: Int64Array, threshold: float, as_tree: bool, counts: Int64Array
) -> int:
    """Draft for each request at most ``budgets[i]`` tokens; ``counts[i]`` tells how many. Returns their sum."""
    total = 0
    for i in range(slots.shape[0]):
        counts[i] = _draft(rows[slots[i]], budgets[i], threshold, as_tree)
        total += counts[i]
    return total


@kernel
def read_drafts(
    rows: Int64Array, slots: Int64Array, tokens: Int32Array, parents: Int32Array, values: FloatArray
) -> None:
    """Copy the pending drafts out, one after the other, with a root before each.

    A draft of n nodes takes n + 1 places: place 0 is for the root (token 0, parent -1, value 1), parents count from it.
    """
    at = 0
    for i in range(slots.shape[0]):
        row = rows[slots[i]]
        record = int32_at(row[R_DRAFT])
        node_values = float32_at(row[R_DRAFT] + 4 * D_VALUES)
        tokens[at] = 0
        parents[at] = -1
        values[at] = np.float32(1.0)
        at += 1
        for n in range(row[R_DRAFTED]):
            tokens[at] = record[n * RECORD_WIDTH + D_TOKEN]
            parents[at] = record[n * RECORD_WIDTH + D_PARENT] + 1
            values[at] = node_values[n]
            at += 1


@kernel
def step_batch(
    rows: Int64Array, slots: Int64Array, new: Int32Array, offsets: Int64Array, budgets: Int64Array,
    threshold: float, as_tree: bool, counts: Int64Array,
) -> int:  # fmt: skip
    """``extend_batch`` and ``speculate_batch`` in one call, request by request while its memory is warm."""
    total = 0
    for i in range(slots.shape[0]):
        row = rows[slots[i]]
        _extend(row, new, offsets[i], offsets[i + 1])
        counts[i] = _draft(row, budgets[i], threshold, as_tree)
        total += counts[i]
    return total


@kernel
def step_one(address: int, new: Int32Array, budget: int, threshold: float, as_tree: bool) -> int:
    """``step_batch`` for the request whose row is at ``address``; returns the number of nodes.

    Each argument costs time in a call, an array most.
    """
    row = int64_at(address)
    if new.shape[0] > 0:
        _extend(row, new, 0, new.shape[0])
    return _draft(row, budget, threshold, as_tree)


@kernel
def replay(
    row: Int64Array, response: Int32Array, budget: int, threshold: float, as_tree: bool, totals: Int64Array
) -> None:
    """Draft and verify a recorded response to its end; adds (steps, accepted, drafted) to ``totals``.

    The same steps that an engine with this target would take, without leaving machine code: for quality studies.
    """
    record = int32_at(row[R_DRAFT])
    at = 0
    while at < response.shape[0]:
        drafted = _draft(row, budget, threshold, as_tree)
        node = -1
        right = 0
        for i in range(drafted):
            base = i * RECORD_WIDTH
            if at + right == response.shape[0]:
                break
            if record[base + D_PARENT] == node and record[base + D_TOKEN] == response[at + right]:
                node = i
                right += 1
        stop = min(at + right + 1, response.shape[0])
        _extend(row, response, at, stop)
        at = stop
        totals[0] += 1
        totals[1] += right
        totals[2] += drafted
