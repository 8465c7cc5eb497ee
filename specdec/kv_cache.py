"""The KV pool: page size 1, one slot per token, and a slot table per request.

A request owns slots, not a region: accepting a path is an edit of its table and no K/V moves. On a CPU, attention over
a *contiguous run* of slots needs no gather, so there the pool also tries to keep every request in one run: it places a
request where its expected length is free, closes the holes that a branching tree leaves by moving the few accepted
rows, and moves a request whose way is blocked. Contiguity is speed only: a scattered request is as right as any.

Layers whose mask forgets (sliding window, chunks) form groups of their own and give back slots that no later query can
see: in memory, too, such a layer keeps its window only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from specdec.errors import InternalError

__all__ = ["CallShape", "GroupKey", "KVGroup", "KVPool", "SlotAllocator", "SlotTable", "first_visible"]

MaskKind = Literal["full", "sliding", "chunked"]
GroupKey = tuple[MaskKind, int]  # (kind, window or chunk length; 0 for full)
TRASH_SLOT = 0  # never handed out: padding writes of captured graphs go there
_RELOCATE_GROWTH = 1.25  # a blocked request moves only to a run with room to grow, so moves cost O(1) per token


@dataclass(frozen=True, slots=True)
class CallShape:
    """Geometry of one attention call of the forward: heads and widths of its K and V."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


def first_visible(key: GroupKey, position: int) -> int:
    """The first position that a query at ``position``, or any later one, can still see under the group's mask."""
    kind, size = key
    if kind == "sliding":
        return max(0, position - size + 1)
    return (position // size) * size if kind == "chunked" else 0


class SlotAllocator:
    """Which slots are free, and which free runs are promised to whom.

    A claim is a soft promise: placement of newcomers avoids it, but a pool in need may use it.
    """

    def __init__(self, num_slots: int) -> None:
        self._free = np.ones(num_slots, dtype=np.bool_)
        self._unclaimed = np.ones(num_slots, dtype=np.bool_)
        self._free[TRASH_SLOT] = self._unclaimed[TRASH_SLOT] = False
        self.num_slots = num_slots
        self.num_free = num_slots - 1
        self._cursor = 1

    def take_run(self, start: int, count: int) -> bool:
        """Take ``[start, start + count)`` if every slot of it is free."""
        end = start + count
        if end > self.num_slots or not self._free[start:end].all():
            return False
        self._free[start:end] = False
        self.num_free -= count
        return True

    def take_any(self, count: int) -> npt.NDArray[np.int32]:
        """Take ``count`` slots wherever they are; the caller has compared ``num_free``."""
        order = np.flatnonzero(self._free[self._cursor :])[:count] + self._cursor
        if len(order) < count:
            order = np.concatenate((order, np.flatnonzero(self._free[: self._cursor])[: count - len(order)]))
        self._free[order] = False
        self.num_free -= count
        self._cursor = int(order[-1]) + 1 if count else self._cursor
        return order.astype(np.int32)

    def give(self, slots: npt.NDArray[np.int32] | slice) -> None:
        """Return slots."""
        self._free[slots] = True
        self.num_free += slots.stop - slots.start if isinstance(slots, slice) else len(slots)

    def find_run(self, wanted: int, least: int) -> tuple[int, int] | None:
        """(start, length) of a free run: the tightest unclaimed one of ``wanted``, else the largest of >= ``least``."""
        for available in (self._free & self._unclaimed, self._free):
            edges = np.flatnonzero(np.diff(available, prepend=False, append=False))
            starts, lengths = edges[::2], edges[1::2] - edges[::2]
            fitting = np.flatnonzero(lengths >= wanted)
            if len(fitting):
                best = fitting[lengths[fitting].argmin()]
                return int(starts[best]), wanted
        if len(lengths) and int(lengths.max()) >= least:
            best = lengths.argmax()
            return int(starts[best]), int(lengths[best])
        return None

    def claim(self, start: int, length: int) -> None:
        """Promise a run."""
        self._unclaimed[start : start + length] = False

    def unclaim(self, start: int, length: int) -> None:
        """Take a promise back."""
        self._unclaimed[start : start + length] = True


class SlotTable:
    """One request's slots in one group, for positions ``first ...``: cached ones, then the reserved ones of a step."""

    __slots__ = ("base", "claim", "first", "num_cached", "num_reserved", "retry_at", "slots")

    def __init__(self) -> None:
        self.slots = np.empty(64, dtype=np.int32)
        self.first = 0  # position of slots[0]
        self.num_cached = 0
        self.num_reserved = 0
        self.base = 0  # first slot if the table is one run of slots, else -1
        self.claim = (0, 0)
        self.retry_at = 0  # end position from which becoming one run is worth another try

    def __len__(self) -> int:
        return self.num_cached + self.num_reserved

    @property
    def is_run(self) -> bool:
        """True if the slots are consecutive, in order."""
        return self.base >= 0

    def append(self, slots: npt.NDArray[np.int32]) -> None:
        """Add reserved slots at the end."""
        end = len(self) + len(slots)
        if end > len(self.slots):
            grown = np.empty(2 * end, dtype=np.int32)
            grown[: len(self)] = self.slots[: len(self)]
            self.slots = grown
        self.slots[len(self) : end] = slots
        self.num_reserved += len(slots)


class KVGroup:
    """All attention calls that share one mask kind: their K/V storage and one slot table per request.

    Args:
        key: mask kind and size.
        calls: ordinal of each attention call in the forward -> its geometry.
        num_slots: tokens that the group can hold, the trash slot included.
        keep_runs: try to keep each request in one run of slots (CPU attention).
    """

    def __init__(
        self,
        key: GroupKey,
        calls: dict[int, CallShape],
        num_slots: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        keep_runs: bool,
    ) -> None:
        self.key = key
        self.allocator = SlotAllocator(num_slots)
        self.tables: dict[str, SlotTable] = {}
        self.keep_runs = keep_runs
        self.keys: dict[int, torch.Tensor] = {}  # call ordinal -> [num_slots, Hkv, Dk]
        self.values: dict[int, torch.Tensor] = {}  # call ordinal -> [num_slots, Hkv, Dv]
        # Calls of equal geometry share one storage, so that moving a row in all of them is one operation.
        self._storages: list[torch.Tensor] = []
        by_shape: dict[CallShape, list[int]] = {}
        for ordinal, shape in calls.items():
            by_shape.setdefault(shape, []).append(ordinal)
        for shape, ordinals in by_shape.items():
            # Zeros, not garbage: a masked NaN would still poison the product with the values.
            for target, width in ((self.keys, shape.key_dim), (self.values, shape.value_dim)):
                size = (len(ordinals), num_slots, shape.num_kv_heads, width)
                storage = torch.zeros(size, dtype=dtype, device=device)
                self._storages.append(storage)
                target.update(zip(ordinals, storage.unbind(0), strict=True))

    def reserve(self, request_id: str, count: int, expected_length: int) -> bool:
        """Add ``count`` reserved slots to the request's table, or change nothing and return False."""
        if self.allocator.num_free < count:
            return False
        table = self.tables.get(request_id)
        if table is None:
            table = self.tables[request_id] = SlotTable()
            self._place(table, max(expected_length, count), count)
        if table.is_run and self.allocator.take_run(table.base + len(table), count):
            start = table.base + len(table)
            table.append(np.arange(start, start + count, dtype=np.int32))
            return True
        if self.keep_runs and table.first + len(table) >= table.retry_at and self._relocate(table, count):
            return True
        table.append(self.allocator.take_any(count))
        table.base = -1
        return True

    def unreserve(self, request_id: str, count: int) -> None:
        """Give back the last ``count`` reserved slots."""
        table = self.tables[request_id]
        self.allocator.give(table.slots[len(table) - count : len(table)])
        table.num_reserved -= count

    def commit(self, request_id: str, kept: Sequence[int]) -> None:
        """Of the reserved slots keep those at indices ``kept`` (ascending), free the rest, forget what none can see."""
        table = self.tables[request_id]
        reserved = table.slots[table.num_cached : len(table)].copy()
        count = len(kept)
        if count and kept[-1] != count - 1:  # not the leading slots: a branch was accepted
            index = np.asarray(kept, dtype=np.int64)
            if table.is_run:
                self._move(reserved[index], reserved[:count])
            else:
                dropped = np.ones(len(reserved), dtype=np.bool_)
                dropped[index] = False
                reserved = np.concatenate((reserved[index], reserved[dropped]))
        self.allocator.give(reserved[count:])
        table.slots[table.num_cached : table.num_cached + count] = reserved[:count]
        table.num_cached += count
        table.num_reserved = 0
        if self.key[0] != "full":
            self._forget(table)

    def release(self, request_id: str) -> None:
        """Drop the request's table; unknown requests are none."""
        table = self.tables.pop(request_id, None)
        if table is not None:
            self.allocator.give(table.slots[: len(table)])
            self.allocator.unclaim(*table.claim)

    def _place(self, table: SlotTable, expected: int, least: int) -> None:
        run = self.allocator.find_run(expected, least) if self.keep_runs else None
        table.base = run[0] if run else -1
        table.claim = run or (0, 0)
        self.allocator.claim(*table.claim)

    def _relocate(self, table: SlotTable, count: int) -> bool:
        length = len(table)
        table.retry_at = table.first + int(length * _RELOCATE_GROWTH) + 1
        wanted = int((length + count) * _RELOCATE_GROWTH) + 1
        run = self.allocator.find_run(wanted, wanted)
        if run is None:
            return False
        self.allocator.unclaim(*table.claim)
        table.claim, table.base, table.retry_at = run, run[0], 0
        self.allocator.claim(*run)
        if not self.allocator.take_run(run[0], length + count):
            raise InternalError("a free run was not free")
        target = np.arange(run[0], run[0] + length, dtype=np.int32)
        old = table.slots[:length].copy()
        self._move(old, target)
        self.allocator.give(old)
        table.slots[:length] = target
        table.append(np.arange(run[0] + length, run[0] + length + count, dtype=np.int32))
        return True

    def _forget(self, table: SlotTable) -> None:
        start = first_visible(self.key, table.first + table.num_cached)
        drop = start - table.first
        if drop <= 0:
            return
        self.allocator.give(table.slots[:drop].copy())
        remaining = table.num_cached - drop
        table.slots[:remaining] = table.slots[drop : table.num_cached]
        table.num_cached = remaining
        table.first = start
        if table.is_run:
            table.base += drop

    def _move(self, source: npt.NDArray[np.int32], target: npt.NDArray[np.int32]) -> None:
        """Copy rows in every call's storage. Gather, then scatter: a target may be another row's source."""
        src, dst = torch.from_numpy(source.astype(np.int64)), torch.from_numpy(target.astype(np.int64))
        for storage in self._storages:
            storage[:, dst] = storage[:, src]


class KVPool:
    """The groups of a model, reserved, committed and released together.

    Args:
        shapes: for each attention call in forward order, (its mask group, its geometry).
        num_tokens: tokens that a full-attention group can hold over all requests.
        num_live_requests: most requests at a time; sizes the groups that forget.
        num_step_tokens: most query tokens of one step, likewise.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[GroupKey, CallShape]],
        num_tokens: int,
        *,
        num_live_requests: int,
        num_step_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        by_group: dict[GroupKey, dict[int, CallShape]] = {}
        for ordinal, (key, shape) in enumerate(shapes):
            by_group.setdefault(key, {})[ordinal] = shape
        self.num_tokens = num_tokens
        self.group_of_call = [key for key, _ in shapes]
        self.groups: dict[GroupKey, KVGroup] = {}
        for key, calls in by_group.items():
            # Twice the windows: a request that slides through its slots moves back only once per window.
            windows = 2 * num_live_requests * key[1] + num_step_tokens
            held = num_tokens if key[0] == "full" else min(num_tokens, windows)
            self.groups[key] = KVGroup(key, calls, held + 1, dtype=dtype, device=device, keep_runs=device.type == "cpu")

    @property
    def nbytes(self) -> int:
        """Bytes of all K/V storage."""
        storages = (s for g in self.groups.values() for s in (*g.keys.values(), *g.values.values()))
        return sum(s.nbytes for s in storages)

    @property
    def num_used(self) -> int:
        """Slots taken over all groups; 0 when no request is held."""
        return sum(g.allocator.num_slots - 1 - g.allocator.num_free for g in self.groups.values())

    @property
    def num_free(self) -> int:
        """Free slots of the group that holds whole contexts, or of the fullest one where all layers forget."""
        groups = [g for g in self.groups.values() if g.key[0] == "full"] or list(self.groups.values())
        return min(g.allocator.num_free for g in groups)

    def reserve(self, request_id: str, count: int, expected_length: int) -> bool:
        """Reserve ``count`` slots in every group, or change nothing and return False."""
        done: list[KVGroup] = []
        for group in self.groups.values():
            kind, size = group.key
            expected = expected_length if kind == "full" else min(expected_length, 2 * size)
            if not group.reserve(request_id, count, min(expected, group.allocator.num_slots - 1)):
                for earlier in done:
                    earlier.unreserve(request_id, count)
                return False
            done.append(group)
        return True

    def commit(self, request_id: str, kept: Sequence[int]) -> None:
        """Keep the reserved slots at indices ``kept`` in every group, free the rest."""
        for group in self.groups.values():
            group.commit(request_id, kept)

    def release(self, request_id: str) -> None:
        """Drop everything of a request."""
        for group in self.groups.values():
            group.release(request_id)
