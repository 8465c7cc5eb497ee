"""The slot tables' copies on the device: every step sends what the host's tables have that these do not know yet.

The host owns the truth. Accepting a path is an edit of a host table; the few cells that changed ride along with the
next step's upload, and one scatter writes them for all requests and groups. A copy's row belongs to whoever needs it: a
request that is not in a step may lose its row to one that is, and is sent anew when it comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.errors import InternalError
from specdec.kv_cache import GroupKey, KVPool
from specdec.kv_slots import SlotTable

__all__ = ["DeviceTables"]


class DeviceTables:
    """Copies of the tables of a pool's groups.

    Args:
        pool: whose.
        num_rows: requests that have a copy at a time; at least as many as one step has.
        num_columns: most tokens of a request, drafts included.
        device: where they lie.
    """

    def __init__(self, pool: KVPool, num_rows: int, num_columns: int, device: torch.device) -> None:
        self.device = device
        self._pool = pool
        # One more row, whose first cell takes what a step of fixed size has to write although it has nothing to say.
        self._cells = torch.zeros(len(pool.groups), num_rows + 1, num_columns, dtype=torch.int32, device=device)
        if self._cells.numel() >= 2**31:
            raise InternalError(f"slot tables of {self._cells.numel()} cells cannot be addressed by int32")
        self._group_of = {key: group for group, key in enumerate(pool.groups)}
        self._rows: OrderedDict[str, int] = OrderedDict()  # the one that was not needed for longest comes first
        self._copied: dict[str, SlotTable] = {}  # the table whose copy a request's row holds, of the first group
        self._free = list(range(num_rows))

    @property
    def num_columns(self) -> int:
        """Most tokens of a request."""
        return int(self._cells.shape[2])

    @property
    def trash_place(self) -> int:
        """A cell that belongs to nobody."""
        return (self._cells.shape[1] - 1) * self.num_columns

    def of(self, key: GroupKey) -> Tensor:
        """[rows, columns] int32: the copies of one group; a slot stands in the column of its token's position."""
        return self._cells[self._group_of[key]]

    def row_of(self, request_id: str) -> int:
        """The request's row; it has one while a step that it is in runs."""
        return self._rows[request_id]

    def edits(self, request_ids: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Give these requests rows; what has to be written so that the copies equal their tables.

        Returns:
            Flat places [n] int64 and slots [n] int32; the tables count as sent.

        Raises:
            InternalError: a request is longer than a row, or there are more requests than rows.
        """
        self._give_rows(request_ids)
        places: list[npt.NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
        slots: list[npt.NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
        _, num_rows, num_columns = self._cells.shape
        for group, tables in enumerate(group.tables for group in self._pool.groups.values()):
            for request_id in request_ids:
                table = tables[request_id]
                start, end = max(table.num_sent, table.first), table.first + len(table)
                if end > num_columns:
                    raise InternalError(f"request {request_id!r} has {end} tokens, the device's tables {num_columns}")
                offset = (group * num_rows + self._rows[request_id]) * num_columns
                places.append(np.arange(offset + start, offset + end))
                slots.append(table.slots[start - table.first : len(table)])
                table.num_sent = end
        return np.concatenate(places), np.concatenate(slots)

    def write(self, places: Tensor, slots: Tensor) -> None:
        """Write cells: int32 places and slots that lie on the device."""
        self._cells.view(-1).index_copy_(0, places.long(), slots)

    def _give_rows(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if request_id in self._rows:
                self._rows.move_to_end(request_id)
        groups = list(self._pool.groups.values())
        for request_id in request_ids:
            if request_id not in self._rows:
                self._rows[request_id] = self._free.pop() if self._free else self._taken_row(set(request_ids))
            table = groups[0].tables[request_id]
            if self._copied.get(request_id) is not table:  # a new row, or tables that came from another request
                self._copied[request_id] = table
                for group in groups:
                    group.tables[request_id].num_sent = 0

    def _taken_row(self, needed: set[str]) -> int:
        oldest, row = self._rows.popitem(last=False)
        if oldest in needed:
            raise InternalError(f"a step of {len(needed)} requests needs more slot tables than the device has")
        del self._copied[oldest]
        return row
