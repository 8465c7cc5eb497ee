"""The KV pool: page size 1, one slot per token, and a slot table per request.

A request owns slots, not a region: accepting a path is an edit of its table and no K/V moves. On a CPU, attention over
a *contiguous run* of slots needs no gather, so there the pool also tries to keep every request in one run: it places a
request where its expected length is free, closes the holes that a branching tree leaves by moving the few accepted
rows, and moves a request whose way is blocked. Contiguity is speed only: a scattered request is as right as any.

Layers whose mask forgets (sliding window, chunks) form groups of their own and give back slots that no later query can
see: in memory, too, such a layer keeps its window only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch

from specdec.errors import InternalError
from specdec.kv_slots import SlotAllocator, SlotTable
from specdec.types import IntArray

__all__ = ["CallShape", "GroupKey", "KVGroup", "KVPool", "Keep", "first_visible"]

MaskKind = Literal["full", "sliding", "chunked"]
GroupKey = tuple[MaskKind, int]  # (kind, window or chunk length; 0 for full)
_RELOCATE_GROWTH = 1.25  # a blocked request moves only to a run with room to grow, so moves cost O(1) per token


@dataclass(frozen=True, slots=True)
class CallShape:
    """Geometry of one attention call of the forward: heads and widths of its K and V."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


class Keep(NamedTuple):
    """Which of a request's reserved slots stay.

    Args:
        request_id: whose.
        num_leading: how many are kept from the first on.
        others: ascending indices among the reserved slots, all >= ``num_leading``; kept, too.
    """

    request_id: str
    num_leading: int
    others: IntArray


def first_visible(key: GroupKey, position: int) -> int:
    """The first position that a query at ``position``, or any later one, can still see under the group's mask."""
    kind, size = key
    if kind == "sliding":
        return max(0, position - size + 1)
    return (position // size) * size if kind == "chunked" else 0


class KVGroup:
    """All attention calls that share one mask kind: their K/V storage and one slot table per request.

    Args:
        key: mask kind and size.
        calls: ordinal of each attention call in the forward -> its geometry.
        num_slots: tokens that the group can hold, the trash slot included.
        devices: ordinal -> where the call's K and V lie.
        keep_runs: try to keep each request in one run of slots (CPU attention).
    """

    def __init__(
        self,
        key: GroupKey,
        calls: dict[int, CallShape],
        num_slots: int,
        *,
        dtype: torch.dtype,
        devices: Mapping[int, torch.device],
        keep_runs: bool,
    ) -> None:
        self.key = key
        self.allocator = SlotAllocator(num_slots)
        self.tables: dict[str, SlotTable] = {}
        self.keep_runs = keep_runs
        self.keys: dict[int, torch.Tensor] = {}  # call ordinal -> [num_slots, Hkv, Dk]
        self.values: dict[int, torch.Tensor] = {}  # call ordinal -> [num_slots, Hkv, Dv]
        # Rows of equal width share one storage, so that moving a token in all of them is one operation.
        self._storages: list[torch.Tensor] = []
        by_width: dict[tuple[int, int, torch.device], list[tuple[dict[int, torch.Tensor], int]]] = {}
        for ordinal, shape in calls.items():
            for rows, width in ((self.keys, shape.key_dim), (self.values, shape.value_dim)):
                by_width.setdefault((shape.num_kv_heads, width, devices[ordinal]), []).append((rows, ordinal))
        for (num_heads, width, device), owners in by_width.items():
            # Zeros, not garbage: a masked NaN would still poison the product with the values.
            storage = torch.zeros(len(owners), num_slots, num_heads, width, dtype=dtype, device=device)
            self._storages.append(storage)
            for (rows, ordinal), part in zip(owners, storage.unbind(0), strict=True):
                rows[ordinal] = part

    def reserve(self, request_id: str, count: int, expected_length: int) -> None:
        """Add ``count`` reserved slots to the request's table; there must be as many free ones.

        Args:
            request_id: whose.
            count: slots.
            expected_length: how long a run a newcomer is likely to need.
        """
        table = self.tables.get(request_id)
        if table is None:
            table = self.tables[request_id] = SlotTable()
            self._place(table, max(expected_length, count), count)
        if table.is_run and self.allocator.take_run(table.base + len(table), count):
            start = table.base + len(table)
            table.append(np.arange(start, start + count, dtype=np.int32))
            return
        if self.keep_runs and table.first + len(table) >= table.retry_at and self._relocate(table, count):
            return
        table.append(self.allocator.take_any(count))
        table.base = -1

    def commit(self, keeps: Sequence[Keep]) -> None:
        """Of each request's reserved slots keep some and free the rest, and those that no later query can see.

        Rows of all requests move in one operation.
        """
        moves = [move for keep in keeps if (move := self._keep(keep)) is not None]
        if moves:
            self._move(np.concatenate([source for source, _ in moves]), np.concatenate([target for _, target in moves]))

    def _keep(self, keep: Keep) -> tuple[IntArray, IntArray] | None:
        """Edit one table; the rows that have to move, as (source, target) slots."""
        table = self.tables[keep.request_id]
        table.num_sent = min(table.num_sent, table.first + table.num_cached + keep.num_leading)
        reserved = table.reserved.copy()
        first, others = keep.num_leading, keep.others
        count = first + len(others)
        move = None
        if len(others) and others[-1] != count - 1:  # not the leading slots: a branch was accepted
            if table.is_run:
                move = reserved[others], reserved[first:count].copy()
            else:
                dropped = np.ones(len(reserved), dtype=np.bool_)
                dropped[:first] = False
                dropped[others] = False
                reserved = np.concatenate((reserved[:first], reserved[others], reserved[dropped]))
        self.allocator.give(reserved[count:])
        table.slots[table.num_cached : table.num_cached + count] = reserved[:count]
        table.num_cached += count
        table.num_reserved = 0
        if self.key[0] != "full":
            gone = first_visible(self.key, table.first + table.num_cached) - table.first
            if gone > 0:
                self.allocator.give(table.forget(gone))
        return move

    def release(self, request_id: str) -> None:
        """Drop the request's table; unknown requests are none."""
        table = self.tables.pop(request_id, None)
        if table is not None:
            self.allocator.give(table.slots[: len(table)])
            self.allocator.unclaim(*table.claim)

    def has_run(self, expected_length: int) -> bool:
        """True if a newcomer would get a run of its own, or would not care."""
        return not self.keep_runs or self.allocator.has_run(_run_length(self, expected_length))

    def expect(self, request_id: str, expected_length: int) -> None:
        """A request in one run is likely to grow to so many tokens: promise it what comes behind; 0 takes that back."""
        table = self.tables[request_id]
        self.allocator.unclaim(*table.claim)
        room = self.allocator.num_slots - table.base
        is_growing = table.is_run and self.keep_runs and expected_length > 0
        table.claim = (table.base, min(_run_length(self, expected_length), room)) if is_growing else (0, 0)
        self.allocator.claim(*table.claim)

    def holds(self, request_id: str, length: int) -> bool:
        """True if the cached slots include every position that a query at position ``length`` or later can see."""
        table = self.tables.get(request_id)
        if table is None or table.num_reserved:
            return False
        return table.first <= first_visible(self.key, length) and length <= table.first + table.num_cached

    def copy_prefix(self, source_id: str, request_id: str, length: int, expected_length: int) -> None:
        """Give a newcomer a copy of another request's first ``length`` positions, as far as they can still be seen."""
        source = self.tables[source_id]
        first = first_visible(self.key, length)
        rows = source.slots[first - source.first : length - source.first].copy()
        self.reserve(request_id, len(rows), max(expected_length, len(rows)))
        table = self.tables[request_id]
        self._move(rows, table.reserved)
        table.first = first
        table.num_cached, table.num_reserved = len(rows), 0

    def cut(self, request_id: str, length: int) -> None:
        """Drop the cached positions from ``length`` on."""
        table = self.tables[request_id]
        count = length - table.first
        self.allocator.give(table.slots[count : table.num_cached])
        table.num_cached = count
        table.num_sent = min(table.num_sent, length)

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
        table.num_sent = 0
        table.append(np.arange(run[0] + length, run[0] + length + count, dtype=np.int32))
        return True

    def _move(self, source: IntArray, target: IntArray) -> None:
        """Copy rows in every call's storage. Gather, then scatter: a target may be another row's source."""
        places = torch.from_numpy(np.stack((source, target)).astype(np.int64))
        on = {device: places.to(device) for device in {storage.device for storage in self._storages}}
        for storage in self._storages:
            src, dst = on[storage.device]
            storage.index_copy_(1, dst, storage.index_select(1, src))


class KVPool:
    """The groups of a model, reserved, committed and released together.

    Args:
        shapes: for each attention call in forward order, (its mask group, its geometry).
        num_tokens: tokens that a full-attention group can hold over all requests.
        num_live_requests: most requests at a time; sizes the groups that forget.
        num_step_tokens: most query tokens of one step, likewise.
        device: of a model's inputs, and of all K and V unless ``devices`` says otherwise.
        devices: where the K and V of each call lie.
        keep_runs: try to keep each request in one run of slots; None: on a CPU, whose attention then reads in place.
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
        devices: Sequence[torch.device] | None = None,
        keep_runs: bool | None = None,
    ) -> None:
        by_group: dict[GroupKey, dict[int, CallShape]] = {}
        for ordinal, (key, shape) in enumerate(shapes):
            by_group.setdefault(key, {})[ordinal] = shape
        self.num_tokens, self.dtype, self.device = num_tokens, dtype, device
        self.group_of_call = [key for key, _ in shapes]
        self.device_of_call = list(devices) if devices is not None else [device] * len(shapes)
        self.groups: dict[GroupKey, KVGroup] = {}
        for key, calls in by_group.items():
            # Twice the windows: a request that slides through its slots moves back only once per window.
            windows = 2 * num_live_requests * key[1] + num_step_tokens
            held = num_tokens if key[0] == "full" else min(num_tokens, windows)
            runs = device.type == "cpu" if keep_runs is None else keep_runs
            places = {ordinal: self.device_of_call[ordinal] for ordinal in calls}
            self.groups[key] = KVGroup(key, calls, held + 1, dtype=dtype, devices=places, keep_runs=runs)

    def __contains__(self, request_id: str) -> bool:
        """True if a request holds anything."""
        return any(request_id in group.tables for group in self.groups.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all K/V storage."""
        storages = (s for g in self.groups.values() for s in (*g.keys.values(), *g.values.values()))
        return sum(s.nbytes for s in storages)

    @property
    def num_used(self) -> int:
        """Slots taken over all groups; 0 when no request is held."""
        return sum(group.allocator.num_taken for group in self.groups.values())

    @property
    def num_free(self) -> int:
        """Free slots of the group that holds whole contexts, or of the fullest one where all layers forget."""
        groups = [g for g in self.groups.values() if g.key[0] == "full"] or list(self.groups.values())
        return min(g.allocator.num_free for g in groups)

    def reserve(self, request_id: str, count: int, expected_length: int) -> bool:
        """Reserve ``count`` slots in every group, or change nothing and return False."""
        if any(group.allocator.num_free < count for group in self.groups.values()):
            return False
        for group in self.groups.values():
            group.reserve(request_id, count, _run_length(group, expected_length))
        return True

    def has_run(self, expected_length: int) -> bool:
        """True if a request of ``expected_length`` tokens would be placed in one run, wherever runs matter."""
        return all(group.has_run(expected_length) for group in self.groups.values())

    def expect(self, request_id: str, expected_length: int) -> None:
        """How long a request that holds something will be; 0: it will not grow."""
        for group in self.groups.values():
            group.expect(request_id, expected_length)

    def holds(self, request_id: str, length: int) -> bool:
        """True if what a query at position ``length`` or later can see is cached, and nothing is reserved."""
        return all(group.holds(request_id, length) for group in self.groups.values())

    def copy_prefix(self, source_id: str, request_id: str, length: int, expected_length: int) -> bool:
        """Copy the K/V of ``length`` leading positions, which the source ``holds``, to a request that holds nothing.

        Returns:
            False if there is no room, and then nothing has changed.
        """
        for group in self.groups.values():
            if group.allocator.num_free < length - first_visible(group.key, length):
                return False
        for group in self.groups.values():
            group.copy_prefix(source_id, request_id, length, _run_length(group, expected_length))
        return True

    def rename(self, request_id: str, name: str) -> None:
        """Everything of a request belongs to ``name`` from now on."""
        for group in self.groups.values():
            group.tables[name] = group.tables.pop(request_id)

    def cut(self, request_id: str, length: int) -> None:
        """Drop a request's cached positions from ``length`` on; it ``holds`` those before."""
        for group in self.groups.values():
            group.cut(request_id, length)

    def commit(self, keeps: Sequence[Keep]) -> None:
        """Keep some of the reserved slots of each request, in every group, and free the rest."""
        for group in self.groups.values():
            group.commit(keeps)

    def release(self, request_id: str) -> None:
        """Drop everything of a request."""
        for group in self.groups.values():
            group.release(request_id)


def _run_length(group: KVGroup, expected_length: int) -> int:
    """How long a run a request of ``expected_length`` tokens needs in a group."""
    kind, size = group.key
    expected = expected_length if kind == "full" else min(expected_length, 2 * size)
    return min(expected, group.allocator.num_slots - 1)
