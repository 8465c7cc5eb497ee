"""The dense parts of some processors as compiled loops over float32 rows, for scores on the CPU.

They do what the torch operations beside each call do, in place: torch's masked operations and its sort take 10 to 100
times as long there (a row of 152k scores: sort 40 ms, masked fill 1 ms). Comparisons, products, quotients and
differences are the same IEEE operations, so the bits are too; ``keep_top_p`` says where it may differ.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import njit

from specdec.types import IntArray

__all__ = ["ban", "keep_top_k", "keep_top_p", "penalise_repeated", "subtract_counts"]

Floats: TypeAlias = npt.NDArray[np.float32]
Bools: TypeAlias = npt.NDArray[np.bool_]
_NEGATIVE_INFINITY: Final = np.float32(-np.inf)
_CHUNK: Final = 128  # scores that are compared together before any is looked at alone
# Bins of ``keep_top_p``: 160 per nat down to 25.6 nats below the best score; lower scores share the last bin, whose
# mass is below V * e^-25.6 (1e-6 at V = 152k).
_NUM_BINS: Final = 4096
_BINS_PER_NAT: Final = np.float32(160.0)


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def ban(scores: Floats, banned: Bools) -> None:
    """``scores[r, v] = -inf`` where ``banned[r, v]``. Both [n, V]."""
    for row in range(scores.shape[0]):
        line, gone = scores[row], banned[row]
        for index in range(scores.shape[1]):
            line[index] = _NEGATIVE_INFINITY if gone[index] else line[index]


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def keep_top_k(scores: Floats, counts: npt.NDArray[np.int64]) -> None:
    """Ban the scores below the k-th largest of their row.

    One pass with a heap of the k largest so far: after the first scores hardly any enters it.

    Args:
        scores: [n, V] float32, edited in place.
        counts: [n]: k of each row, in [1, V].
    """
    for row in range(scores.shape[0]):
        line = scores[row]
        heap = np.sort(line[: counts[row]])  # a sorted array is a heap with its least element first
        for start in range(counts[row], len(line), _CHUNK):
            chunk = line[start : start + _CHUNK]
            if _num_above(chunk, heap[0]) > 0:
                for value in chunk:
                    if value > heap[0]:
                        _replace_least(heap, value)
        limit = heap[0]
        for index in range(len(line)):
            line[index] = _NEGATIVE_INFINITY if line[index] < limit else line[index]


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _num_above(values: Floats, limit: np.float32) -> np.int32:
    count = np.int32(0)
    for index in range(len(values)):
        count += np.int32(values[index] > limit)
    return count


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _replace_least(heap: Floats, value: np.float32) -> None:
    """Put ``value`` in the place of the least element and restore the heap."""
    place, child = 0, 1
    while child < len(heap):
        if child + 1 < len(heap) and heap[child + 1] < heap[child]:
            child += 1
        if value <= heap[child]:
            break
        heap[place] = heap[child]
        place, child = child, 2 * child + 1
    heap[place] = value


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def keep_top_p(scores: Floats, probs: Floats, limits: Floats) -> None:
    """Ban the lowest scores whose total probability is at most ``limits[r]``; the best one always stays.

    Of equal scores the first go first. Instead of sorting all scores, they are counted into bins by their distance to
    the best one, and only the bin at the edge is sorted. The masses are summed in float64 and rounded to float32 for
    the comparison, as in a cumulative sum of sorted probabilities; ``probs`` themselves may differ from those in the
    last bit, so the edge may differ where a mass equals the limit up to 1e-7.

    Args:
        scores: [n, V] float32, edited in place.
        probs: [n, V] float32: their softmax.
        limits: [n] float32: 1 - p.
    """
    num_rows, vocab_size = scores.shape
    masses = np.empty(_NUM_BINS, dtype=np.float64)
    bins = np.empty(vocab_size, dtype=np.int16)
    for row in range(num_rows):
        line, prob, limit = scores[row], probs[row], limits[row]
        best = np.float32(_NEGATIVE_INFINITY)
        for index in range(vocab_size):
            best = max(best, line[index])
        masses[:] = 0.0
        for index in range(vocab_size):
            distance = (best - line[index]) * _BINS_PER_NAT
            # Written so that what is not a number lands in the last bin too.
            bins[index] = np.int16(distance) if distance < np.float32(_NUM_BINS - 1) else np.int16(_NUM_BINS - 1)
        for index in range(vocab_size):
            if prob[index] > 0:
                masses[bins[index]] += np.float64(prob[index])
        edge = _NUM_BINS - 1
        below = 0.0
        while edge > 0 and np.float32(below + masses[edge]) <= limit:
            below += masses[edge]
            edge -= 1
        members = np.flatnonzero(bins == edge)
        members = members[np.argsort(line[members], kind="mergesort")]
        num_banned = 0
        while num_banned < len(members) - (edge == 0):
            below += np.float64(prob[members[num_banned]])
            if not np.float32(below) <= limit:
                break
            num_banned += 1
        for index in members[:num_banned]:
            line[index] = _NEGATIVE_INFINITY
        for index in range(vocab_size):
            line[index] = _NEGATIVE_INFINITY if bins[index] > edge else line[index]


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def penalise_repeated(scores: Floats, seen: Bools, token_ids: IntArray, parents: IntArray, penalty: np.float32) -> None:
    """The repetition penalty over one tree.

    Args:
        scores: [N, V] float32, edited in place.
        seen: [V] bool: the tokens of the committed prefix.
        token_ids: [N] int32; the root, whose token is committed, is not read.
        parents: [N] int32.
        penalty: as in ``counts.RepetitionPenalty``.
    """
    for node in range(len(token_ids)):
        line = scores[node]
        walker = node
        while parents[walker] >= 0:
            token = token_ids[walker]
            if 0 <= token < len(seen) and not seen[token] and not _is_below(node, walker, token, token_ids, parents):
                value = line[token]
                line[token] = value * penalty if value < 0 else value / penalty
            walker = parents[walker]
        for index in range(len(line)):
            value = line[index]
            lowered = value * penalty if value < 0 else value / penalty
            line[index] = lowered if seen[index] else value


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _is_below(node: int, end: int, token: int, token_ids: IntArray, parents: IntArray) -> bool:
    """True if the way up from ``node`` meets the token before it comes to ``end``."""
    while node != end:
        if token_ids[node] == token:
            return True
        node = parents[node]
    return False


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def subtract_counts(
    scores: Floats, counts: Floats, token_ids: IntArray, parents: IntArray, frequency: np.float32, presence: np.float32
) -> None:
    """The presence and frequency penalties over one tree.

    Args:
        scores: [N, V] float32, edited in place.
        counts: [V] float32: how often each token was written; unchanged on return.
        token_ids: [N] int32; the root, whose token is committed, is not read.
        parents: [N] int32.
        frequency: as in ``counts.OutputPenalty``.
        presence: likewise.
    """
    for node in range(len(token_ids)):
        _count_path(counts, node, token_ids, parents, np.float32(1))
        line = scores[node]
        for index in range(len(line)):
            count = counts[index]
            present = presence if count > 0 else np.float32(0)
            line[index] = (line[index] - frequency * count) - present
        _count_path(counts, node, token_ids, parents, np.float32(-1))


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _count_path(counts: Floats, node: int, token_ids: IntArray, parents: IntArray, step: np.float32) -> None:
    """Add ``step`` to the count of every draft token on the path to ``node``."""
    while parents[node] >= 0:
        if 0 <= token_ids[node] < len(counts):
            counts[token_ids[node]] += step
        node = parents[node]
