"""The cache of a drafter: committed rows that stay, and within a step a tree that grows by levels and is dropped.

Rows are tokens for a draft model and (state, token) pairs for an EAGLE head; the cache does not care. Slots come from a
``KVPool``; the layouts that it hands out say who sees whom and at which position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from specdec.kv_cache import Keep, KVPool
from specdec.query_layout import QueryLayout
from specdec.types import IntArray

__all__ = ["GrowingCache", "Growth", "chain_growth"]

_ROOM_AHEAD = 512  # slots that a request's run is likely to grow by


@dataclass(frozen=True, slots=True, eq=False)
class Growth:
    """New nodes of one request's tree.

    Args:
        request_id: whose.
        token_ids: [W] int32.
        parents: [W] int32: places among the request's nodes so far, these included; -1: the root.
    """

    request_id: str
    token_ids: IntArray
    parents: IntArray


def chain_growth(request_id: str, token_ids: IntArray) -> Growth:
    """Rows that follow each other right after the committed ones."""
    return Growth(request_id, token_ids, np.arange(-1, len(token_ids) - 1, dtype=np.int32))


@dataclass(slots=True, eq=False)
class _Held:
    """What is held of one request."""

    num_read: int = 0  # committed rows
    depths: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # [E] of the nodes
    ancestors: npt.NDArray[np.bool_] = field(default_factory=lambda: np.empty((0, 0), dtype=np.bool_))  # [E, E]


class GrowingCache:
    """Slots, positions and ancestors of many requests' rows.

    Args:
        pool: where K and V lie.
    """

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self._held: dict[str, _Held] = {}

    def num_read(self, request_id: str) -> int:
        """How many rows of the request are committed."""
        held = self._held.get(request_id)
        return held.num_read if held else 0

    def reserve(self, growths: Sequence[Growth]) -> bool:
        """Slots for all of these, or nothing is changed."""
        if sum(len(growth.token_ids) for growth in growths) > self.pool.num_free:
            return False
        for position, growth in enumerate(growths):
            count = len(growth.token_ids)
            if not self.pool.reserve(growth.request_id, count, count + _ROOM_AHEAD):
                self.drop([earlier.request_id for earlier in growths[:position]])
                return False
        return True

    def lay_out(self, growths: Sequence[Growth]) -> tuple[list[QueryLayout], npt.NDArray[np.int64]]:
        """Layouts of new rows in a flat row, and their positions [T]; their slots must have been reserved."""
        layouts: list[QueryLayout] = []
        start = 0
        for growth in growths:
            held, width = self._held.setdefault(growth.request_id, _Held()), len(growth.token_ids)
            num_earlier = len(held.depths)
            held.depths, held.ancestors = _extended(held, growth.parents)
            layouts.append(
                QueryLayout(
                    growth.request_id,
                    start,
                    width,
                    held.num_read,
                    held.num_read + held.depths,
                    held.ancestors[num_earlier:],
                    num_earlier,
                )  # fmt: skip
            )
            start += width
        return layouts, np.concatenate([layout.positions[layout.num_earlier :] for layout in layouts])

    def keep(self, counts: Mapping[str, int]) -> None:
        """Commit all rows that the latest forward of these requests added, ``counts`` each."""
        self.pool.commit([Keep(request_id, count, _NOTHING) for request_id, count in counts.items()])
        for request_id, count in counts.items():
            held = self._held[request_id]
            held.num_read += count
            _clear(held)

    def drop(self, request_ids: Sequence[str]) -> None:
        """Drop the trees of these requests, not their committed rows."""
        known = [request_id for request_id in request_ids if request_id in self._held]
        for request_id in known:
            _clear(self._held[request_id])
        self.pool.commit([Keep(request_id, 0, _NOTHING) for request_id in known if self._has_table(request_id)])

    def cut(self, request_id: str, num_read: int) -> None:
        """Drop the committed rows of a request from ``num_read`` on; its tree must have been dropped.

        All of them where layers that forget have given back what a query there would see.
        """
        held = self._held.get(request_id)
        if held is None or held.num_read <= num_read:
            return
        if not self.pool.holds(request_id, num_read):
            self.release([request_id])
            return
        self.pool.cut(request_id, num_read)
        held.num_read = num_read

    def release(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ones are no error."""
        for request_id in request_ids:
            if self._held.pop(request_id, None) is not None:
                self.pool.release(request_id)

    def _has_table(self, request_id: str) -> bool:
        return all(request_id in group.tables for group in self.pool.groups.values())


_NOTHING: IntArray = np.empty(0, dtype=np.int32)


def _clear(held: _Held) -> None:
    held.depths, held.ancestors = held.depths[:0], held.ancestors[:0, :0]


def _extended(held: _Held, parents: IntArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Depths [E + W] (0: right after the committed rows) and ancestors [E + W, E + W] with W more nodes."""
    old = len(held.depths)
    total = old + len(parents)
    depths = np.empty(total, dtype=np.int64)
    depths[:old] = held.depths
    ancestors = np.zeros((total, total), dtype=np.bool_)
    ancestors[:old, :old] = held.ancestors
    for node, parent in enumerate(parents.tolist(), start=old):
        depths[node] = depths[parent] + 1 if parent >= 0 else 0
        if parent >= 0:
            ancestors[node] = ancestors[parent]
        ancestors[node, node] = True
    return depths, ancestors
