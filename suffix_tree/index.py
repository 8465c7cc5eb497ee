"""One tenant's index of earlier responses: paged tokens, hash chains, and the calibration learned on them.

The index has a fixed byte bound and its memory is reserved at once but used only as it fills, so it grows without
copies or pauses. Eviction is least-recently-used: the response that was matched or extended longest ago goes first.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree import _layout as at
from specdec.suffix_tree.calibration import C_COUNT, C_PROB, CELL_WIDTH, NUM_TABLE_CELLS, NUM_WEIGHTS, T_TOKEN
from specdec.suffix_tree.integrity import check_arrays
from specdec.suffix_tree.memory import Int32Array, address_of, overlay_file, reserve_int32
from specdec.suffix_tree.paged import free_pages
from specdec.suffix_tree.prior import Prior

__all__ = ["BYTES_PER_PAGE", "Section", "SuffixIndex"]

_FIRST_BUCKETS = 1 << 10
_POSITIONS_PER_BUCKET = 2
_PAGE_FIELDS = (at.X_PAGE_NEXT, at.X_PAGE_PREV, at.X_PAGE_OWNER, at.X_FREE, at.X_FIRST_PAGE, at.X_LAST_USED)
# Tokens and links of 64 positions, their share of the buckets, and the bookkeeping of a page.
BYTES_PER_PAGE = at.PAGE_SIZE * (4 + 4 * at.NUM_ORDERS + 4 * at.NUM_ORDERS // _POSITIONS_PER_BUCKET) + 4 * len(
    _PAGE_FIELDS
)
_TABLE_SIZES = {at.X_CELLS: NUM_TABLE_CELLS * CELL_WIDTH, at.X_WEIGHTS: NUM_WEIGHTS}
_COUNTERS = (
    at.X_NUM_FREE, at.X_NUM_PAGES, at.X_NUM_BUCKETS, at.X_BUCKET_MASK, at.X_NUM_POSITIONS, at.X_NUM_RECYCLED, at.X_TICK,
)  # fmt: skip
_ARRAY_NAMES = {
    at.X_TOKENS: "tokens", at.X_LINKS: "links", at.X_HEADS: "heads", at.X_PAGE_NEXT: "page_next",
    at.X_PAGE_PREV: "page_prev", at.X_PAGE_OWNER: "page_owner", at.X_FREE: "free", at.X_FIRST_PAGE: "first_page",
    at.X_LAST_USED: "last_used", at.X_CELLS: "cells", at.X_WEIGHTS: "weights",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Section:
    """A saved array inside a file: ``nbytes`` at ``offset`` of an open file, ready to be mapped."""

    file_descriptor: int
    offset: int
    nbytes: int


class SuffixIndex:
    """Earlier responses of one tenant (or of the shared tier), searchable by every context that occurs in them.

    Args:
        prior: where calibration starts.
        max_bytes: bound of the index's memory in bytes; the oldest responses go when it is reached.
        max_responses: bound of their number, or None.
        learning: whether calibration adapts; the shared tier does not learn.

    Raises:
        ValueError: the bound does not hold two pages, or is beyond 2^31 positions.
    """

    def __init__(
        self, prior: Prior, *, max_bytes: int, max_responses: int | None = None, learning: bool = True
    ) -> None:
        max_pages = max_bytes // BYTES_PER_PAGE + 1  # page 0 is never used
        if not 3 <= max_pages <= (1 << 31) // at.PAGE_SIZE:
            raise ValueError(
                f"max_bytes must hold between 2 and {(1 << 31) // at.PAGE_SIZE} pages of {BYTES_PER_PAGE} bytes, "
                f"got {max_bytes}"
            )
        if max_responses is not None and max_responses < 1:
            raise ValueError(f"max_responses must be at least 1, got {max_responses}")
        self.max_bytes = max_bytes
        self.max_responses = max_responses
        self.header = np.zeros(at.INDEX_SLOTS, np.int64)
        self._arrays: dict[int, Int32Array] = {}
        positions = max_pages * at.PAGE_SIZE
        self._reserve(at.X_TOKENS, positions)[: at.PAGE_SIZE] = at.WIPED
        self._reserve(at.X_LINKS, positions * at.NUM_ORDERS)
        self._reserve(at.X_HEADS, (positions // _POSITIONS_PER_BUCKET + _FIRST_BUCKETS + 1) * at.NUM_ORDERS)
        for field in _PAGE_FIELDS:
            self._reserve(field, max_pages)
        for field in _TABLE_SIZES:
            self._reserve(field, _TABLE_SIZES[field])
        prior.write(self.table(at.X_CELLS), self.table(at.X_WEIGHTS))
        self.header[at.X_MAX_PAGES] = max_pages
        self.header[at.X_NUM_PAGES] = 1
        self.header[at.X_NUM_BUCKETS] = _FIRST_BUCKETS
        self.header[at.X_BUCKET_MASK] = 2 * _FIRST_BUCKETS - 1
        self.header[at.X_FROZEN] = 0 if learning else 1
        self._numbers: dict[Hashable, int] = {}  # response key -> sequence number
        self._keys: dict[int, Hashable] = {}
        self._active: set[Hashable] = set()
        self._spare_numbers: list[int] = []
        self._next_number = 1
        # Heap of (tick when last looked at, sequence number): one entry per number of `_queued`. An entry may be
        # outdated; it is brought up to date when it comes to the top.
        self._by_use: list[tuple[int, int]] = []
        self._queued: set[int] = set()

    def _reserve(self, field: int, size: int) -> Int32Array:
        array = self._arrays[field] = reserve_int32(size)
        self.header[field] = address_of(array)
        return array

    def table(self, field: int) -> npt.NDArray[np.float32]:
        """A calibration array, by its header slot, as float32."""
        return self._arrays[field].view(np.float32)

    @property
    def address(self) -> int:
        """Where the header lies."""
        return address_of(self.header)

    @property
    def num_tokens(self) -> int:
        """Positions held: response tokens and up to 8 prompt tokens before each response."""
        return int(self.header[at.X_NUM_POSITIONS])

    @property
    def nbytes(self) -> int:
        """Bytes in use for tokens, chains and bookkeeping; pages of deleted responses are kept for reuse and count."""
        x = self.header
        per_page = at.PAGE_SIZE * 4 * (1 + at.NUM_ORDERS) + 4 * len(_PAGE_FIELDS)
        return int(x[at.X_NUM_PAGES] - 1) * per_page + int(x[at.X_NUM_BUCKETS]) * 4 * at.NUM_ORDERS

    @property
    def table_nbytes(self) -> int:
        """Bytes of the calibration tables: a fixed amount per tenant, beside ``nbytes`` and its bound."""
        return sum(self._arrays[field].nbytes for field in _TABLE_SIZES)

    @property
    def responses(self) -> Mapping[Hashable, int]:
        """Cached responses by key, oldest first; the value is the sequence number."""
        return self._numbers

    # --- life of a response -------------------------------------------------------------------------------------------

    def open(self, key: Hashable) -> int:
        """Begin a response under ``key`` and return its sequence number; an earlier one under the key is deleted."""
        if key in self._numbers:
            self.delete(key)
        if self.max_responses is not None and len(self._numbers) >= self.max_responses:
            self._evict_oldest()
        if self._next_number < self.header[at.X_MAX_PAGES] and not self._spare_numbers:
            self._spare_numbers.append(self._next_number)
            self._next_number += 1
        if not self._spare_numbers and not self._evict_oldest():
            return 0  # as many live responses as pages: this one is not cached
        number = self._spare_numbers.pop()
        self._numbers[key] = number
        self._keys[number] = key
        self._active.add(key)
        self._arrays[at.X_FIRST_PAGE][number] = 0
        tick = self.header[at.X_TICK] = self.header[at.X_TICK] + 1
        self._arrays[at.X_LAST_USED][number] = tick
        if number not in self._queued:
            self._queued.add(number)
            heapq.heappush(self._by_use, (int(tick), number))
        return number

    def close(self, key: Hashable) -> None:
        """The response under ``key`` is complete: from now on it may be evicted."""
        self._active.discard(key)

    def delete(self, key: Hashable) -> None:
        """Delete a response and wipe its tokens.

        Raises:
            KeyError: there is no response under ``key``.
        """
        number = self._numbers.pop(key)
        del self._keys[number]
        self._active.discard(key)
        free_pages(self.header, int(self._arrays[at.X_FIRST_PAGE][number]))
        self._arrays[at.X_FIRST_PAGE][number] = 0
        self._spare_numbers.append(number)

    def make_room(self, num_pages: int) -> None:
        """Evict until ``num_pages`` pages are free, or nothing is left that may be evicted."""
        while self._count_pages_left() < num_pages and self._evict_oldest():
            pass

    def _count_pages_left(self) -> int:
        x = self.header
        return int(x[at.X_NUM_FREE] + x[at.X_MAX_PAGES] - x[at.X_NUM_PAGES])

    def _evict_oldest(self) -> bool:
        """Delete the response that was used longest ago; False if none may be deleted."""
        last_used = self._arrays[at.X_LAST_USED]
        held_back: list[tuple[int, int]] = []
        found = False
        while self._by_use and not found:
            tick, number = heapq.heappop(self._by_use)
            key = self._keys.get(number)
            if key is None:
                self._queued.discard(number)
            elif tick != last_used[number]:
                heapq.heappush(self._by_use, (int(last_used[number]), number))
            elif key in self._active:
                held_back.append((tick, number))
            else:
                self._queued.discard(number)
                self.delete(key)
                found = True
        for entry in held_back:
            heapq.heappush(self._by_use, entry)
        return found

    def prior(self, *, count_limit: float) -> Prior:
        """What was learned, as starting values for other indexes: a cell counts as at most ``count_limit`` outcomes."""
        cells = self.table(at.X_CELLS)[: T_TOKEN * CELL_WIDTH].reshape(-1, CELL_WIDTH)
        probs = np.clip(cells[:, C_PROB] + np.float32(0.5), 0.002, 0.998)
        counts = np.minimum(cells[:, C_COUNT], np.float32(count_limit))
        return Prior(probs, counts, self.table(at.X_WEIGHTS)[:NUM_WEIGHTS].copy())

    def check_integrity(self) -> None:
        """Walk the whole index and raise AssertionError with the first broken invariant, in words."""
        check_arrays(dict(self.arrays()), self.header, list(self._keys))
        if self._keys != {number: key for key, number in self._numbers.items()}:
            raise AssertionError("the index is damaged: the two directories of responses differ")

    # --- persistence --------------------------------------------------------------------------------------------------

    def _used_items(self) -> dict[int, int]:
        x = self.header
        pages = int(x[at.X_NUM_PAGES])
        used = {field: pages for field in _PAGE_FIELDS}
        used |= {at.X_FIRST_PAGE: self._next_number, at.X_LAST_USED: self._next_number}
        used |= {at.X_TOKENS: pages * at.PAGE_SIZE, at.X_LINKS: pages * at.PAGE_SIZE * at.NUM_ORDERS}
        used[at.X_HEADS] = int(x[at.X_NUM_BUCKETS]) * at.NUM_ORDERS
        used |= _TABLE_SIZES
        return used

    def arrays(self) -> Iterator[tuple[str, Int32Array]]:
        """The used part of every array by name: views, valid until the next change."""
        for field, size in self._used_items().items():
            yield _ARRAY_NAMES[field], self._arrays[field][:size]

    def counters(self) -> dict[str, object]:
        """What is not an array: counters, and the keys of the responses with their sequence numbers."""
        return {
            "counters": [int(self.header[slot]) for slot in _COUNTERS],
            "next_number": self._next_number,
            "responses": [[key, number] for key, number in self._numbers.items()],
        }

    def restore(self, counters: Mapping[str, object], sections: Mapping[str, Section]) -> None:
        """Become the saved index: its arrays are mapped over the reserved memory, copy on write.

        Raises:
            ValueError: the saved index does not fit the bound of this one, or its tables are of another version.
            OSError: a section cannot be mapped.
        """
        values = dict(zip(_COUNTERS, counters["counters"], strict=True))  # type: ignore[call-overload]
        if values[at.X_NUM_PAGES] > self.header[at.X_MAX_PAGES]:
            raise ValueError(
                f"the saved index needs {values[at.X_NUM_PAGES] * BYTES_PER_PAGE} bytes, the bound is {self.max_bytes}"
            )
        for field in _TABLE_SIZES:
            saved, wanted = sections[_ARRAY_NAMES[field]].nbytes, self._arrays[field].nbytes
            if saved != wanted:
                raise ValueError(f"the saved {_ARRAY_NAMES[field]} are of another version: {saved} bytes, not {wanted}")
        for field, name in _ARRAY_NAMES.items():
            section = sections[name]
            overlay_file(self._arrays[field], section.file_descriptor, section.offset, section.nbytes)
        for slot, value in values.items():
            self.header[slot] = value
        self._next_number = int(counters["next_number"])  # type: ignore[call-overload]
        self._numbers = {key: number for key, number in counters["responses"]}  # type: ignore[attr-defined]
        self._keys = {number: key for key, number in self._numbers.items()}
        self._spare_numbers = [n for n in range(1, self._next_number) if n not in self._keys]
        last_used = self._arrays[at.X_LAST_USED]
        self._by_use = [(int(last_used[number]), number) for number in self._keys]
        heapq.heapify(self._by_use)
        self._queued = set(self._keys)
