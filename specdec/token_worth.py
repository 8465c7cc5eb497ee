"""What an accepted token saves: much where the text is hard to guess, little inside a copy that the next step goes on.

A step that stops short of the end of a copy loses little, for the next step drafts the rest. So an accepted token does
not save the mean time per token, but the time that a token takes where it stands. The speed-up over plain decoding that
can be had behind a node follows from the chance q of the token that comes next and from what a draft token costs, in
steps of one request:

    s(q) = max over L of (1 + q + ... + q^L) / (1 + price L)

A node counts (s / s(q)) ^ 0.6 tokens, where s is the engine's own speed-up: the power, because the chance of the next
token says only in part how the text goes on.

Sources: the relative values of an average-reward decision process (Howard 1960) for the principle; the trade within
copies is that of ``specdec.suffix_tree.stopping``.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from specdec.tree import FloatArray, IntArray

__all__ = ["attainable_speedups", "token_worths"]

_TRUST = 0.6  # on two cost tables, 0.4 and 0.8 give about the same; with 0 every token takes the mean time
_BINS = 32
_LONGEST = 8  # tokens that a copy is believed to go on
_SUREST = np.float32(0.98)


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def attainable_speedups(price: float) -> FloatArray:
    """[33] float32: the speed-up over plain decoding in text whose tokens have the chance 0, 1/32, ... 1.

    Args:
        price: what a draft token costs, in steps of one request.
    """
    speedups = np.ones(_BINS + 1, np.float32)
    for row in range(1, _BINS + 1):
        chance = min(np.float32(row / _BINS), _SUREST)
        tokens = power = np.float32(1.0)
        for length in range(1, _LONGEST + 1):
            power *= chance
            tokens += power
            speedups[row] = max(speedups[row], tokens / np.float32(1.0 + price * length))
    return speedups


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def token_worths(parents: IntArray, values: FloatArray, speedups: FloatArray, speedup: float) -> FloatArray:
    """What the nodes of a tree are worth, in tokens of mean worth; never more than their parents.

    Args:
        parents: [N] int32.
        values: [N] float32: the chance that the path to each node is accepted; the root's is 1.
        speedups: [33] float32, from ``attainable_speedups``.
        speedup: of the engine over plain decoding, in the recent past.

    Returns:
        [N] float32; the root's is infinite.
    """
    size = len(values)
    ahead = np.full(size, np.float32(-1.0))  # the chance of the likeliest token behind each node
    for node in range(1, size):
        above = parents[node]
        chance = values[node] / max(values[above], np.float32(1e-9))
        ahead[above] = max(ahead[above], chance)
        if ahead[node] < 0:
            ahead[node] = -1.0 - chance  # of a leaf, its own stands in
    worths = np.empty(size, np.float32)
    worths[0] = np.inf
    for node in range(1, size):
        chance = ahead[node] if ahead[node] >= 0 else -1.0 - ahead[node]
        attainable = speedups[int(min(max(chance, np.float32(0.0)), np.float32(1.0)) * _BINS)]
        worth = values[node] * np.float32((speedup / attainable) ** _TRUST)
        worths[node] = min(worth, worths[parents[node]])
    return worths
