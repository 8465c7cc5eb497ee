"""One call per engine step: extend and draft for all requests of a batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree._layout import (
    D_PARENT,
    D_TOKEN,
    D_VALUES,
    PAGE_BITS,
    R_CAPACITY,
    R_DRAFT,
    R_DRAFTED,
    R_INDEX,
    R_LENGTH,
    R_ROOM_MADE,
    R_SEQUENCE,
    RECORD_WIDTH,
    X_MAX_PAGES,
    X_NUM_FREE,
    X_NUM_PAGES,
)
from specdec.suffix_tree.calibration import learn
from specdec.suffix_tree.drafting import draft_path, draft_tree
from specdec.suffix_tree.matching import advance_pins, prefetch_chains
from specdec.suffix_tree.memory import Int32Array, Int64Array, float32_at, int32_at, int64_at, kernel
from specdec.suffix_tree.paged import append_tokens, begin_cached

__all__ = ["begin_request", "extend_batch", "replay", "step_batch", "step_one"]

FloatArray = npt.NDArray[np.float32]


@kernel
def begin_request(row: Int64Array, prompt: Int32Array) -> None:
    """Index the prompt as the request's own text and open its cached response."""
    append_tokens(row, prompt, 0, prompt.shape[0], False)
    if row[R_SEQUENCE] > 0:
        begin_cached(int64_at(row[R_INDEX]), row)


@kernel
def _extend(row: Int64Array, new: Int32Array, start: int, stop: int) -> None:
    if stop == start:
        return
    learn(int64_at(row[R_INDEX]), row, new, start, stop)
    advance_pins(row, new, start, stop)
    append_tokens(row, new, start, stop, row[R_SEQUENCE] > 0)
    row[R_ROOM_MADE] = 0


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
def _has_room(row: Int64Array, num_tokens: int, num_pages: int) -> bool:
    """Whether the request's buffers hold ``num_tokens`` more and its index has ``num_pages`` to give."""
    if row[R_ROOM_MADE] != 0:
        return True
    if row[R_LENGTH] + num_tokens > row[R_CAPACITY]:
        return False
    if row[R_SEQUENCE] <= 0:
        return True
    x = int64_at(row[R_INDEX])
    return bool(x[X_NUM_FREE] + x[X_MAX_PAGES] - x[X_NUM_PAGES] >= num_pages)


@kernel
def _copy_out(row: Int64Array, at: int, tokens: Int32Array, parents: Int32Array, values: FloatArray) -> int:
    """Copy a request's draft to ``at`` and beyond, a root in front; returns where it ends."""
    record = int32_at(row[R_DRAFT])
    node_values = float32_at(row[R_DRAFT] + 4 * D_VALUES)
    tokens[at] = 0
    parents[at] = -1
    values[at] = np.float32(1.0)
    for n in range(row[R_DRAFTED]):
        at += 1
        tokens[at] = record[n * RECORD_WIDTH + D_TOKEN]
        parents[at] = record[n * RECORD_WIDTH + D_PARENT] + 1
        values[at] = node_values[n]
    return at + 1


@kernel
def step_batch(
    rows: Int64Array, slots: Int64Array, new: Int32Array, offsets: Int64Array, budgets: Int64Array,
    threshold: float, as_tree: bool, ends: Int64Array, tokens: Int32Array, parents: Int32Array, values: FloatArray,
) -> bool:  # fmt: skip
    """Extend and draft for all requests of a step.

    Everything is appended first: that asks for the places where the searches begin, so that they are on their way from
    memory while the other requests are extended.

    Args:
        rows: the table of live requests.
        slots: [R] rows of the batch.
        new: tokens to append; ``new[offsets[i] : offsets[i + 1]]`` are those of request i, and may be none.
        offsets: [R + 1].
        budgets: [R] most draft tokens of each.
        threshold: see ``stopping``.
        as_tree: draft trees.
        ends: [R + 1] out: draft i is ``[ends[i], ends[i + 1])`` of the arrays below.
        tokens: out, with room for all budgets and a root for each.
        parents: likewise, counted from the draft's own root.
        values: likewise.

    Returns:
        False if room must be made first: then nothing was done.
    """
    pages = 0
    for i in range(slots.shape[0]):
        length = offsets[i + 1] - offsets[i]
        pages += (length >> PAGE_BITS) + 1
        if length > 0 and not _has_room(rows[slots[i]], length, pages):
            return False
    for i in range(slots.shape[0]):
        _extend(rows[slots[i]], new, offsets[i], offsets[i + 1])
        prefetch_chains(rows[slots[i]])
    ends[0] = 0
    for i in range(slots.shape[0]):
        row = rows[slots[i]]
        _draft(row, budgets[i], threshold, as_tree)
        ends[i + 1] = _copy_out(row, ends[i], tokens, parents, values)
    return True


@kernel
def step_one(address: int, new: Int32Array, budget: int, threshold: float, as_tree: bool) -> int:
    """``step_batch`` for the request whose row is at ``address``; the draft stays in its record.

    Each argument costs time in a call, an array most. Returns the number of nodes, or -1 if room must be made first.
    """
    row = int64_at(address)
    length = new.shape[0]
    if length > 0:
        if not _has_room(row, length, (length >> PAGE_BITS) + 1):
            return -1
        _extend(row, new, 0, length)
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
