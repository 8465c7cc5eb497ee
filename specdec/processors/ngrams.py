"""No n-gram twice, with an index that makes a step independent of the length of the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numba import njit
from torch import Tensor

from specdec.processors.base import Op
from specdec.processors.nodes import Index, NodeBatch
from specdec.types import IntArray

__all__ = ["NoRepeatNGram"]

_BUCKETS: Final = 4096  # of the index: a power of two; 16 KiB per request that uses it


class NoRepeatNGram(Op):
    """A token is banned if it would complete an n-gram that the prefix already holds.

    The committed positions are chained by their token's bucket, so a node visits only the positions that hold the last
    token of its prefix.

    Args:
        size: n, at least 2.
        token_ids: [L] the committed tokens.
    """

    __slots__ = ("_first", "_next", "_num_tokens", "_size")
    rank = 20

    def __init__(self, size: int, token_ids: IntArray) -> None:
        super().__init__()
        self._size = size
        self._num_tokens = 0
        self._first = np.full(_BUCKETS, -1, dtype=np.int32)  # bucket -> newest position
        self._next = np.empty(max(2 * len(token_ids), 64), dtype=np.int32)  # position -> older position of its bucket
        self.commit(token_ids.astype(np.int64))

    def commit(self, ids: Index) -> None:
        end = self._num_tokens + len(ids)
        if end > len(self._next):
            grown = np.empty(2 * end, dtype=np.int32)
            grown[: self._num_tokens] = self._next[: self._num_tokens]
            self._next = grown
        _chain(ids, self._num_tokens, self._first, self._next)
        self._num_tokens = end

    @classmethod
    def apply(cls, ops: Sequence[NoRepeatNGram], requests: Sequence[int], nodes: NodeBatch, scores: Tensor) -> None:
        for op, request in zip(ops, requests, strict=True):
            tree, context = nodes.trees[request], nodes.states[request].token_ids
            rows, tokens = _repeats(context, op._first, op._next, tree.token_ids, tree.parents, op._size - 1)
            possible = tokens < scores.shape[-1]
            rows, tokens = rows[possible] + nodes.starts[request], tokens[possible]
            if len(rows):
                index = tuple(torch.from_numpy(pair).to(scores.device) for pair in (rows, tokens))
                scores[index] = -float("inf")


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _chain(ids: Index, start: int, first: IntArray, following: IntArray) -> None:
    """Add the positions ``start ...`` of tokens ``ids`` to the chains."""
    for index in range(len(ids)):
        bucket = ids[index] & (len(first) - 1)
        following[start + index] = first[bucket]
        first[bucket] = start + index


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _token_at(context: IntArray, path: IntArray, index: int) -> int:
    """The token at ``index`` of context + path."""
    return context[index] if index < len(context) else path[index - len(context)]  # type: ignore[no-any-return]


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _is_repeat(context: IntArray, path: IntArray, place: int, num_tokens: int) -> bool:
    """True if the tokens that end at ``place`` equal the last ones of context + path, and one more comes after."""
    length = len(context) + len(path)
    if place < num_tokens - 1 or place + 1 >= length:
        return False
    for back in range(num_tokens):
        if _token_at(context, path, place - back) != _token_at(context, path, length - 1 - back):
            return False
    return True


@njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _repeats(
    context: IntArray, first: IntArray, following: IntArray, token_ids: IntArray, parents: IntArray, num_tokens: int
) -> tuple[Index, Index]:
    """(node, token) for every token that followed the last ``num_tokens`` >= 1 tokens of the node's prefix before.

    A pair comes once per earlier place.
    """
    nodes = np.empty(64, dtype=np.int64)
    banned = np.empty(64, dtype=np.int64)
    count = 0
    for node in range(len(token_ids)):
        depth = 0
        walker = node
        while parents[walker] >= 0:
            depth += 1
            walker = parents[walker]
        path = np.empty(depth, dtype=np.int32)
        walker = node
        for index in range(depth - 1, -1, -1):
            path[index] = token_ids[walker]
            walker = parents[walker]
        # Places on the path one by one, then the committed ones of the chain; each place is visited once.
        last = _token_at(context, path, len(context) + depth - 1)
        place = len(context) + depth - 2 if depth >= 2 else first[last & (len(first) - 1)]
        while place >= 0:
            if _is_repeat(context, path, place, num_tokens):
                if count == len(nodes):
                    nodes = np.concatenate((nodes, nodes))
                    banned = np.concatenate((banned, banned))
                nodes[count] = node
                banned[count] = _token_at(context, path, place + 1)
                count += 1
            if place > len(context):
                place -= 1
            elif place == len(context):
                place = first[last & (len(first) - 1)]
            else:
                place = following[place]
    return nodes[:count], banned[:count]
