"""Keeps the target's states of each request until a head has read them into its cache, piece by piece.

Row t of such a cache belongs to the target's state at token t, and the state at the last committed token does not exist
yet. A preempted request shows old states again; a request whose states have a gap is begun anew, should its beginning
come again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.growing import GrowingCache, Growth, chain_growth
from specdec.types import RequestState

__all__ = ["PIECE", "ReadRows", "StateReader"]

PIECE = 512  # most rows of one request that are read in one pass
# (rows with reserved slots, their states [T, layers * E]) -> by row a result, at least of each request's last one
ReadRows: TypeAlias = Callable[[Sequence[Growth], Tensor], Any]


@dataclass(slots=True, eq=False)
class _Unread:
    """The target's states at a stretch of tokens that the head has not read yet.

    They are put together when they are read: a request that rests for many steps gets a piece in each of them.
    """

    start: int  # position of the first
    end: int
    pieces: list[Tensor]  # [n, layers * E], end - start rows in all

    def first(self, count: int) -> Tensor:
        """The first ``count`` states."""
        if len(self.pieces) > 1:
            self.pieces = [torch.cat(self.pieces)]
        return self.pieces[0][:count]

    def drop(self, count: int) -> None:
        """Forget the first ``count`` states, which ``first`` has given."""
        self.start += count
        self.pieces = [self.pieces[0][count:]]


class StateReader:
    """Hands a head the target's states in order.

    Args:
        cache: where rows lie that were read.
        layers: whose states the head reads.
    """

    def __init__(self, cache: GrowingCache, layers: tuple[int, ...]) -> None:
        self._cache = cache
        self._layers = layers
        self._unread: dict[str, _Unread] = {}

    def take(self, states: Sequence[RequestState]) -> list[int]:
        """Keep the newest states; the indices of requests whose states are known up to the token before the root."""
        for state in states:
            self._take(state)
        return [index for index, state in enumerate(states) if self._is_ready(state)]

    def read(self, states: Sequence[RequestState], read_rows: ReadRows) -> dict[int, Any]:
        """Read all that is unread.

        Args:
            states: requests that are ready.
            read_rows: reads a piece of some of them; the token of a row is the one *after* its state.

        Returns:
            By index of the request, the result of its last row; those without room in the cache are missing.
        """
        rest = {index: self._unread[state.request_id] for index, state in enumerate(states)}
        last: dict[int, Any] = {}
        while rest:
            growths, pieces = [], []
            for index, unread in rest.items():
                stop = min(unread.start + PIECE, unread.end)
                token_ids = states[index].token_ids[unread.start + 1 : stop + 1].copy()
                growths.append(chain_growth(states[index].request_id, token_ids))
                pieces.append(unread.first(stop - unread.start))
            if not self._cache.reserve(growths):
                break
            results = read_rows(growths, torch.cat(pieces))
            self._cache.keep({growth.request_id: len(growth.token_ids) for growth in growths})
            ends = np.cumsum([len(growth.token_ids) for growth in growths]) - 1
            for end, growth, (index, unread) in zip(ends.tolist(), growths, list(rest.items()), strict=True):
                unread.drop(len(growth.token_ids))
                if unread.start == unread.end:
                    last[index] = results[end]
                    del rest[index], self._unread[growth.request_id]
        return last

    def release(self, request_ids: Sequence[str]) -> None:
        """Forget requests and their rows; unknown ones are no error."""
        self._cache.release(request_ids)
        for request_id in request_ids:
            self._unread.pop(request_id, None)

    def _take(self, state: RequestState) -> None:
        if state.hidden is None:
            return
        start, end = state.num_cached - len(state.hidden), state.num_cached
        unread = self._unread.get(state.request_id)
        wanted = unread.end if unread else self._cache.num_read(state.request_id)
        if start > wanted:  # a stretch is missing
            self.release([state.request_id])
        elif end > wanted:  # after a preemption the target reads old tokens again
            if unread is None:
                unread = self._unread[state.request_id] = _Unread(wanted, wanted, [])
            states = state.hidden.of(self._layers)
            unread.pieces.append(states[wanted - start :] if wanted > start else states)
            unread.end = end

    def _is_ready(self, state: RequestState) -> bool:
        unread = self._unread.get(state.request_id)
        return unread is not None and unread.end == state.num_tokens - 1
