"""How likely a drafted token is: learned online from what was really accepted.

Each drafted node is described by a few small contexts (how long the match is and whether it goes on behind its first
mismatch, how far back it lies, how the candidates agree, how deep the node lies, what became of the last draft, which
tokens it and the two before it are). Each context owns an adaptive probability; a logistic mixer joins them, its
weights learned online as well (context mixing as in PAQ-type compressors, Mahoney 2005): an input's weight is the sum
of two, one from a set chosen by the node's depth, one from a set chosen by the match. What comes out is a probability
of acceptance, so drafting can stop where a token costs more than it is worth.

The tables belong to one tenant's index. They start from trained values (``prior.npz``), never from nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree._layout import (
    D_INPUT,
    D_PARENT,
    D_TOKEN,
    MAX_DRAFT,
    MAX_MATCH,
    NUM_INPUTS,
    NUM_SOURCES,
    R_DRAFT,
    R_DRAFTED,
    R_HISTORY,
    RECORD_WIDTH,
    X_CELLS,
    X_FROZEN,
    X_WEIGHTS,
)
from specdec.suffix_tree.memory import Int32Array, Int64Array, float32_at, int32_at, kernel
from specdec.suffix_tree.surroundings import BEYONDS, DISTANCES

__all__ = [
    "CELL_WIDTH",
    "C_COUNT",
    "C_PROB",
    "C_STRETCHED",
    "NUM_TABLE_CELLS",
    "NUM_WEIGHTS",
    "SETS_BY_DEPTH",
    "SET_WIDTH",
    "T_TOKEN",
    "describe",
    "learn",
    "predict",
]

FloatArray = npt.NDArray[np.float32]
f4 = np.float32

LENGTHS = 13  # buckets of the effective match length
DEPTHS = 8
_LENGTH_EDGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
_DEPTH_EDGES = (0, 1, 2, 4, 8, 16, 32)
_SPAN = MAX_MATCH + MAX_DRAFT + 2
LENGTH_BUCKET = np.array([12, *(int(np.searchsorted(_LENGTH_EDGES, e)) for e in range(1, _SPAN))], np.int32)
DEPTH_BUCKET = np.array([int(np.searchsorted(_DEPTH_EDGES, d)) for d in range(MAX_DRAFT + 2)], np.int32)

SHARES = 13
HISTORIES = 6
TOKEN_BITS = 13
BIGRAM_BITS = 16
T_SHARE = 0
T_START = T_SHARE + NUM_SOURCES * LENGTHS * SHARES
T_RANK = T_START + LENGTHS * DEPTHS * 4
T_HISTORY = T_RANK + 5 * LENGTHS * 2
T_BEYOND = T_HISTORY + HISTORIES * DEPTHS * LENGTHS
T_TOKEN = T_BEYOND + LENGTHS * BEYONDS * NUM_SOURCES * DISTANCES
T_BIGRAM = T_TOKEN + (1 << TOKEN_BITS)
T_TRIGRAM = T_BIGRAM + (1 << BIGRAM_BITS)
NUM_TABLE_CELLS = T_TRIGRAM + (1 << BIGRAM_BITS)
# A cell: its probability as the mixer reads it, log(p / (1 - p)); p - 1/2, so that untouched memory means "unknown";
# and how many outcomes it stands for. A cell lies in one cache line: prediction brings in what learning changes.
CELL_WIDTH = 4  # the fourth place is unused
C_STRETCHED, C_PROB, C_COUNT = range(3)
TOKEN_INPUTS = 5  # inputs from here on belong to tokens: nothing is known about them at first
SETS_BY_DEPTH = DEPTHS * NUM_SOURCES * 4
SET_WIDTH = NUM_INPUTS + 1  # a weight for each input, and a bias
NUM_WEIGHTS = (SETS_BY_DEPTH + LENGTHS * BEYONDS * 4) * SET_WIDTH

_HASH_A = np.uint64(0x9E3779B97F4A7C15)
_HASH_B = np.uint64(0xBF58476D1CE4E5B9)
_RATE = f4(0.006)  # of the mixer; 0.005 beat 0.02 on the traces
_COUNT_LIMIT = f4(1000.0)  # a table cell averages over about so many outcomes
_FLOOR = f4(0.002)


@kernel
def _share_bucket(share: float, voters: int, dissent: int) -> int:
    if dissent == 0:
        return 0 if voters == 1 else (1 if voters == 2 else (2 if voters <= 4 else (3 if voters <= 8 else 4)))
    if share < f4(0.34):
        return 5 if share < f4(0.1) else (6 if share < f4(0.2) else 7)
    if share < f4(0.67):
        return 8 if share < f4(0.5) else 9
    return 10 if share < f4(0.8) else (11 if share < f4(0.92) else 12)


@kernel
def describe(
    out: Int32Array,
    at: int,
    source: int,
    start_length: int,
    depth: int,
    share: float,
    voters: int,
    dissent: int,
    rank: int,
    beyond: int,
    distance: int,
    history: int,
    before: int,
    last: int,
    token: int,
) -> None:
    """Write the table cells and the weight sets of a node to ``out[at : at + NODE_CELLS]``.

    Args:
        out: int32 array.
        at: where to write.
        source: of the longest matching candidate that votes for the token.
        start_length: its match length at the root.
        depth: of the node, 0 = child of the root.
        share: the token's share of the votes' weight.
        voters: how many candidates vote for it.
        dissent: how many vote against it.
        rank: of its newest voter.
        beyond: bucket of the longest matching candidate's match behind its first mismatch.
        distance: bucket of how far back that candidate lies.
        history: what became of the last draft.
        before: the token before the last one.
        last: the token before it.
        token: itself.
    """
    length = LENGTH_BUCKET[start_length + depth]
    level = DEPTH_BUCKET[depth]
    against = dissent if dissent < 2 else (2 if dissent < 5 else 3)
    newest = rank if rank < 2 else (2 if rank < 4 else (3 if rank < 8 else 4))
    out[at] = T_SHARE + (source * LENGTHS + length) * SHARES + _share_bucket(share, voters, dissent)
    out[at + 1] = T_START + (LENGTH_BUCKET[start_length] * DEPTHS + level) * 4 + against
    out[at + 2] = T_RANK + (newest * LENGTHS + length) * 2 + (1 if dissent == 0 else 0)
    out[at + 3] = T_HISTORY + (history * DEPTHS + level) * LENGTHS + length
    out[at + 4] = T_BEYOND + ((length * BEYONDS + beyond) * NUM_SOURCES + source) * DISTANCES + distance
    cell = (np.uint64(token) + np.uint64(7)) * _HASH_A
    out[at + 5] = T_TOKEN + np.int64(cell >> np.uint64(64 - TOKEN_BITS))
    cell = ((np.uint64(last) + np.uint64(11)) * _HASH_A) ^ ((np.uint64(token) + np.uint64(7)) * _HASH_B)
    out[at + 6] = T_BIGRAM + np.int64(cell >> np.uint64(64 - BIGRAM_BITS))
    cell = (cell ^ (np.uint64(before) + np.uint64(3))) * _HASH_B
    out[at + 7] = T_TRIGRAM + np.int64(cell >> np.uint64(64 - BIGRAM_BITS))
    out[at + NUM_INPUTS] = (level * NUM_SOURCES + source) * 4 + against
    out[at + NUM_INPUTS + 1] = SETS_BY_DEPTH + (LENGTH_BUCKET[start_length] * BEYONDS + beyond) * 4 + against


@kernel
def predict(cells: FloatArray, weights: FloatArray, inputs: Int32Array, at: int) -> Any:
    """Probability that a node described by ``inputs[at:]`` is accepted, given that its parent is."""
    w = inputs[at + NUM_INPUTS] * SET_WIDTH
    v = inputs[at + NUM_INPUTS + 1] * SET_WIDTH
    x = weights[w + NUM_INPUTS] + weights[v + NUM_INPUTS]
    for i in range(NUM_INPUTS):
        x += (weights[w + i] + weights[v + i]) * cells[inputs[at + i] * CELL_WIDTH + C_STRETCHED]
    return f4(1.0) / (f4(1.0) + np.exp(-x))


@kernel
def _learn_node(x: Int64Array, inputs: Int32Array, at: int, accepted: bool) -> None:
    cells = float32_at(x[X_CELLS])
    weights = float32_at(x[X_WEIGHTS])
    outcome = f4(1.0) if accepted else f4(0.0)
    error = (outcome - predict(cells, weights, inputs, at)) * _RATE
    w = inputs[at + NUM_INPUTS] * SET_WIDTH
    v = inputs[at + NUM_INPUTS + 1] * SET_WIDTH
    weights[w + NUM_INPUTS] += error * f4(0.5)
    weights[v + NUM_INPUTS] += error * f4(0.5)
    for i in range(NUM_INPUTS):
        cell = inputs[at + i] * CELL_WIDTH
        step = error * cells[cell + C_STRETCHED]
        weights[w + i] += step
        weights[v + i] += step
        count = cells[cell + C_COUNT]
        p = cells[cell + C_PROB] + f4(0.5)
        p += (outcome - p) / (count + f4(1.5))
        p = min(max(p, _FLOOR), f4(1.0) - _FLOOR)
        count = min(count + f4(1.0), _COUNT_LIMIT)
        s = np.log(p / (f4(1.0) - p))
        if i >= TOKEN_INPUTS:
            s *= count / (count + f4(2.0))  # a token seen once or twice says little
        cells[cell + C_STRETCHED] = s
        cells[cell + C_PROB] = p - f4(0.5)
        cells[cell + C_COUNT] = count


@kernel
def learn(x: Int64Array, row: Int64Array, new: Int32Array, start: int, stop: int) -> None:
    """Compare the pending draft with the tokens that came and adjust the tables.

    Only nodes whose parent path came true are learned from. What was verified does not matter: the tokens that came
    are the truth about each of these nodes.
    """
    drafted = row[R_DRAFTED]
    row[R_DRAFTED] = 0
    if drafted == 0:
        row[R_HISTORY] = 0
        return
    record = int32_at(row[R_DRAFT])
    node = -1
    right = 0
    i = 0
    while start + right < stop and i < drafted:
        found = -1
        while i < drafted and record[i * RECORD_WIDTH + D_PARENT] <= node:
            at = i * RECORD_WIDTH
            if record[at + D_PARENT] == node:
                accepted = record[at + D_TOKEN] == new[start + right]
                if x[X_FROZEN] == 0:
                    _learn_node(x, record, at + D_INPUT, accepted)
                if accepted:
                    found = i
            i += 1
        if found < 0:
            break
        node = found
        right += 1
    if right == 0:
        row[R_HISTORY] = 1
    elif right == drafted:
        row[R_HISTORY] = 5
    else:
        row[R_HISTORY] = 2 if right < 3 else (3 if right < 8 else 4)
