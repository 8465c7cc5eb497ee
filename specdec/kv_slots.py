"""Which slots of a KV pool are free, and which ones a request owns: the book-keeping of ``specdec.kv_cache``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from specdec.types import IntArray

__all__ = ["TRASH_SLOT", "SlotAllocator", "SlotTable"]

TRASH_SLOT = 0  # never handed out: padding writes of captured graphs go there


class SlotAllocator:
    """Which slots are free, and which free runs are promised to whom.

    A claim is a soft promise: placement of newcomers and single slots avoid it, but a pool in need may use it.

    Args:
        num_slots: the trash slot included.
    """

    def __init__(self, num_slots: int) -> None:
        self._free = np.ones(num_slots, dtype=np.bool_)
        self._free[TRASH_SLOT] = False
        self._num_claims = np.zeros(num_slots, dtype=np.int32)  # claims may overlap when the pool was in need
        self.num_slots = num_slots
        self.num_free = num_slots - 1
        self._cursor = 1

    @property
    def num_taken(self) -> int:
        """Slots that somebody owns."""
        return self.num_slots - 1 - self.num_free

    def take_run(self, start: int, count: int) -> bool:
        """Take ``[start, start + count)`` if every slot of it is free."""
        end = start + count
        if end > self.num_slots or not self._free[start:end].all():
            return False
        self._free[start:end] = False
        self.num_free -= count
        return True

    def take_any(self, count: int) -> IntArray:
        """Take ``count`` slots wherever they are, unpromised ones first; the caller has compared ``num_free``."""
        slots = self._search(count, avoid_claims=True)
        if len(slots) < count:
            slots = self._search(count, avoid_claims=False)
        self._free[slots] = False
        self.num_free -= count
        if count:
            self._cursor = int(slots[-1]) + 1
        return slots

    def give(self, slots: IntArray) -> None:
        """Return slots."""
        self._free[slots] = True
        self.num_free += len(slots)

    def find_run(self, wanted: int, least: int) -> tuple[int, int] | None:
        """(start, length) of a free run: the tightest one of ``wanted`` slots, unclaimed if possible.

        Else the far half of the largest one, of at least ``least`` slots. Claimed runs are used from their end: their
        owner grows from their start.
        """
        starts, lengths = _runs(self._free & (self._num_claims == 0))
        fitting = np.flatnonzero(lengths >= wanted)
        if len(fitting):
            return int(starts[fitting[lengths[fitting].argmin()]]), wanted
        starts, lengths = _runs(self._free)
        if not len(lengths):
            return None
        best = lengths.argmax()
        longest = int(lengths[best])
        length = min(wanted, max(least, longest // 2))
        return (int(starts[best]) + longest - length, length) if length <= longest else None

    def has_run(self, wanted: int) -> bool:
        """True if ``wanted`` slots in a row are free and promised to nobody."""
        return bool((_runs(self._free & (self._num_claims == 0))[1] >= wanted).any())

    def claim(self, start: int, length: int) -> None:
        """Promise a run."""
        self._num_claims[start : start + length] += 1

    def unclaim(self, start: int, length: int) -> None:
        """Take a promise back."""
        self._num_claims[start : start + length] -= 1

    def _search(self, count: int, *, avoid_claims: bool) -> IntArray:
        """Up to ``count`` free slots from the cursor on, around the end: windows that double, not the whole pool."""
        found: list[npt.NDArray[np.int64]] = []
        missing = count
        for start, end in ((self._cursor, self.num_slots), (1, self._cursor)):
            width = 4 * count + 64
            while start < end and missing:
                stop = min(start + width, end)
                free = self._free[start:stop]
                if avoid_claims:
                    free = free & (self._num_claims[start:stop] == 0)
                slots = np.flatnonzero(free)[:missing] + start
                found.append(slots)
                missing -= len(slots)
                start, width = stop, 2 * width
        return np.concatenate(found or [np.empty(0, dtype=np.int64)]).astype(np.int32)


def _runs(available: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Starts and lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(available, prepend=False, append=False))
    return edges[::2], edges[1::2] - edges[::2]


class SlotTable:
    """One request's slots in one group, for positions ``first ...``: cached ones, then the reserved ones of a step."""

    __slots__ = ("base", "claim", "first", "num_cached", "num_reserved", "num_sent", "retry_at", "slots")

    def __init__(self) -> None:
        self.slots: IntArray = np.empty(64, dtype=np.int32)
        self.first = 0  # position of slots[0]
        self.num_cached = 0
        self.num_reserved = 0
        self.base = 0  # first slot if the table is one run of slots, else -1
        self.claim = (0, 0)
        self.num_sent = 0  # positions below it are known to a copy of the table on the device
        self.retry_at = 0  # end position from which becoming one run is worth another try

    def __len__(self) -> int:
        return self.num_cached + self.num_reserved

    @property
    def is_run(self) -> bool:
        """True if the slots are consecutive, in order."""
        return self.base >= 0

    @property
    def reserved(self) -> IntArray:
        """[num_reserved] view of the slots of the present step."""
        return self.slots[self.num_cached : self.num_cached + self.num_reserved]

    def append(self, slots: IntArray) -> None:
        """Add reserved slots at the end."""
        end = len(self) + len(slots)
        if end > len(self.slots):
            grown = np.empty(2 * end, dtype=np.int32)
            grown[: len(self)] = self.slots[: len(self)]
            self.slots = grown
        self.slots[len(self) : end] = slots
        self.num_reserved += len(slots)

    def forget(self, count: int) -> IntArray:
        """Drop the first ``count`` cached slots, and return them."""
        dropped = self.slots[:count].copy()
        self.slots[: len(self) - count] = self.slots[count : len(self)]
        self.num_cached -= count
        self.first += count
        if self.is_run:
            self.base += count
        return dropped
