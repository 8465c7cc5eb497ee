"""Live requests: one row of addresses and one set of buffers each.

A request's own text lies in contiguous buffers that double. Their memory belongs to the request and goes with it, so
finishing a request frees three arrays and touches nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree import _layout as at
from specdec.suffix_tree.index import SuffixIndex
from specdec.suffix_tree.memory import Int32Array, Int64Array, address_of
from specdec.suffix_tree.steps import begin_request

__all__ = ["UNKNOWN_REACH", "Live", "LiveTable", "as_tokens"]

_START_TOKEN = -2  # before every text: equals no token
_FIRST_SLOTS = 64
UNKNOWN_REACH = 1 << 30  # of a request that was not searched for yet
_CHUNK = 1 << 14  # list items converted at a time, so that other threads get the GIL in between


@dataclass(slots=True, eq=False)
class Live:
    """A live request: its row and the memory that the row points to."""

    slot: int
    tenant: str
    index: SuffixIndex
    key: Hashable | None  # of the cached response
    tokens: Int32Array
    links: Int32Array
    heads: Int32Array
    record: Int32Array
    draft: Int32Array  # [MAX_DRAFT, RECORD_WIDTH]: the record's nodes
    values: npt.NDArray[np.float32]  # [MAX_DRAFT]
    row: Int64Array  # [ROW_SLOTS], see ``_layout``
    address: int  # of the row
    count: int = 0  # nodes of the draft that `SuffixCache.advance` made last

    @property
    def text(self) -> Int32Array:
        """Prompt and output so far: a view, valid until the next call for the request."""
        return self.tokens[1 : int(self.row[at.R_LENGTH])]


def as_tokens(token_ids: Sequence[int] | Int32Array) -> Int32Array:
    """Token ids as a contiguous int32 array; a long list is converted piece by piece, so that no thread stalls.

    Raises:
        ValueError: not one-dimensional, not integers, or negative.
    """
    if isinstance(token_ids, np.ndarray):
        if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
            raise ValueError(f"token ids must be a 1-d array of integers, got {token_ids.dtype} {token_ids.shape}")
        tokens = np.ascontiguousarray(token_ids, dtype=np.int32)
    else:
        tokens = np.empty(len(token_ids), np.int32)
        for start in range(0, len(token_ids), _CHUNK):
            tokens[start : start + _CHUNK] = token_ids[start : start + _CHUNK]
    if len(tokens) and tokens.min() < 0:
        raise ValueError(f"token ids must be at least 0, got {tokens.min()}")
    return tokens


class LiveTable:
    """Rows and buffers of live requests; rows are given out and taken back, and their number doubles when needed."""

    def __init__(self) -> None:
        self.rows = np.zeros((_FIRST_SLOTS, at.ROW_SLOTS), np.int64)
        self._free_slots = list(range(_FIRST_SLOTS))[::-1]
        self._lives: dict[int, Live] = {}
        self._scratch = np.zeros(at.SCRATCH_SIZE, np.int32)

    def add(self, tenant: str, index: SuffixIndex, shared: SuffixIndex | None, prompt: Int32Array, number: int) -> Live:
        """Take up a request: index its prompt and open its cached response if ``number`` is not 0."""
        if not self._free_slots:
            slots = len(self.rows)
            self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
            self._free_slots = list(range(slots, 2 * slots))[::-1]
            for other in self._lives.values():
                other.row = self.rows[other.slot]
                other.address = address_of(other.row)
        capacity = len(prompt) + (len(prompt) >> 2) + 256
        num_buckets = 1 << max(8, capacity.bit_length() - 1)
        slot = self._free_slots.pop()
        record = np.empty(at.RECORD_SIZE, np.int32)
        live = self._lives[slot] = Live(
            slot, tenant, index, None,
            np.empty(capacity + 2, np.int32), np.empty((capacity + 2) * at.NUM_ORDERS, np.int32),
            np.zeros(num_buckets * at.NUM_ORDERS, np.int32), record,
            record[: at.D_VALUES].reshape(at.MAX_DRAFT, at.RECORD_WIDTH),
            record[at.D_VALUES :].view(np.float32), self.rows[slot], address_of(self.rows[slot]),
        )  # fmt: skip
        live.tokens[0] = _START_TOKEN
        live.tokens[1] = at.WIPED
        row = live.row
        row[:] = 0
        row[at.R_LENGTH] = 1
        row[at.R_INDEX] = index.address
        row[at.R_SHARED] = 0 if shared is None else shared.address
        row[at.R_SEQUENCE] = number
        row[at.R_REACH] = row[at.R_REACH_CACHED] = UNKNOWN_REACH
        row[at.R_DRAFT] = address_of(live.record)
        row[at.R_SCRATCH] = address_of(self._scratch)
        self._point_row(live)
        if number:
            index.make_room(1)
        begin_request(row, prompt)
        return live

    def _point_row(self, live: Live) -> None:
        row = live.row
        row[at.R_TOKENS] = address_of(live.tokens)
        row[at.R_LINKS] = address_of(live.links)
        row[at.R_HEADS] = address_of(live.heads)
        row[at.R_CAPACITY] = len(live.tokens) - 1
        row[at.R_BUCKET_MASK] = len(live.heads) // at.NUM_ORDERS - 1

    def _grow(self, live: Live, num_tokens: int) -> None:
        """Double the request's buffers until ``num_tokens`` more fit; every bucket is split into two equal ones."""
        capacity = len(live.tokens) - 2
        used = len(live.text)
        wanted = max(2 * capacity, used + num_tokens)
        tokens = np.empty(wanted + 2, np.int32)
        tokens[: used + 2] = live.tokens[: used + 2]
        links = np.empty((wanted + 2) * at.NUM_ORDERS, np.int32)
        links[: (used + 1) * at.NUM_ORDERS] = live.links[: (used + 1) * at.NUM_ORDERS]
        while len(live.heads) < (wanted >> 1) * at.NUM_ORDERS:
            live.heads = np.concatenate([live.heads, live.heads])
        live.tokens, live.links = tokens, links
        self._point_row(live)

    def release(self, live: Live) -> None:
        """Take a row back; the buffers go with the last reference to ``live``."""
        del self._lives[live.slot]
        live.row[:] = 0
        self._free_slots.append(live.slot)

    def make_room(self, batch: Sequence[Live], lengths: Sequence[int]) -> None:
        """Make room for ``lengths[i]`` more tokens in request i's buffers and, as far as possible, in its index."""
        pages: dict[SuffixIndex, int] = {}
        for live, length in zip(batch, lengths, strict=True):
            row = live.row
            if row[at.R_LENGTH] + length > row[at.R_CAPACITY]:
                self._grow(live, length)
            pages[live.index] = pages.get(live.index, 0) + (length >> at.PAGE_BITS) + 1
            row[at.R_ROOM_MADE] = 1
        for index, count in pages.items():
            index.make_room(count)
