"""What a step tells the device, in one block of int32 and one copy: the same layout for a step of any size.

Two sizes of the same step differ in filling only. Filled-up tokens belong to no request, write their K/V into the trash
slot, and nobody reads what becomes of them; so a captured graph of a fixed size runs any smaller step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.device_tables import DeviceTables
from specdec.errors import InternalError
from specdec.kernels.tree_batch import TreeBatch, ancestor_words, path_table
from specdec.kv_cache import GroupKey, KVPool
from specdec.query_layout import QueryLayout

__all__ = ["BUCKETS", "Outputs", "Step", "StepBuffers", "StepSizes"]

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # tokens of a step for which buffers are kept

_ALIGNMENT = 4  # of every part, in int32: 16 bytes, or the compiler would make kernels for unaligned pointers
_WORD_BITS = 32


class Outputs(NamedTuple):
    """Of a forward.

    Args:
        logits: [L, V].
        hidden: [T, ...] states, if somebody reads them.
        best: [L, 2, K] float64: ids and log-probabilities of the likeliest tokens, where a drafter had them found.
    """

    logits: Tensor
    hidden: Tensor | None = None
    best: Tensor | None = None


@dataclass(frozen=True, slots=True)
class StepSizes:
    """How much a step's buffers hold.

    Args:
        num_tokens: T.
        num_requests: R.
        num_keys: K: queries, and tree nodes of earlier forwards of the step.
        num_edits: cells of the slot tables that the device does not know yet.
        num_logits: rows of logits.
        num_words: words of ancestor bits of one query.
        path_length: longest path of a query, for strict attention; 0: none.
    """

    num_tokens: int
    num_requests: int
    num_keys: int
    num_edits: int
    num_logits: int
    num_words: int
    path_length: int = 0

    def fit_in(self, other: StepSizes) -> bool:
        """True if buffers of size ``other`` can hold this."""
        return all(getattr(self, name) <= getattr(other, name) for name in self.__dataclass_fields__)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step as the host knows it.

    Args:
        layouts: the requests in flat order.
        input_ids: [T].
        positions: [T] absolute.
        logit_rows: [L] indices in the flat row.
        states: [T, W] on the device: what a head reads of every token besides its id.
    """

    layouts: Sequence[QueryLayout]
    input_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    logit_rows: npt.NDArray[np.int64]
    states: Tensor | None = None

    def sizes(self, num_edits: int, *, has_paths: bool) -> StepSizes:
        """The least that holds it."""
        widths = [layout.ancestors.shape[1] for layout in self.layouts]
        longest = max(int(layout.ancestors.sum(1).max()) for layout in self.layouts) if has_paths else 0
        return StepSizes(
            len(self.input_ids), len(self.layouts), sum(widths), num_edits, len(self.logit_rows),
            -(-max(widths) // _WORD_BITS), longest,
        )  # fmt: skip


class StepBuffers:
    """The block of numbers of one step, on the host and on the device.

    Args:
        sizes: what it holds.
        pool: whose tables it describes.
        tables: the device's copies of them.
        state_width: W of a step's states, which lie in ``states`` [T, W] in the pool's dtype; 0: it has none.
    """

    def __init__(self, sizes: StepSizes, pool: KVPool, tables: DeviceTables, *, state_width: int = 0) -> None:
        self.sizes = sizes
        self.states: Tensor | None = None
        if state_width:
            self.states = torch.zeros(sizes.num_tokens, state_width, dtype=pool.dtype, device=tables.device)
        self.pool = pool
        self.tables = tables
        num_groups = len(pool.groups)
        tokens, requests = sizes.num_tokens, sizes.num_requests
        shapes: dict[str, tuple[int, ...]] = {
            "input_ids": (tokens,), "positions": (tokens,), "logit_rows": (sizes.num_logits,),
            "slots": (num_groups, tokens), "cu_queries": (requests + 1,), "cu_keys": (requests + 1,),
            "contexts": (requests,), "firsts": (num_groups, requests), "rows": (requests,),
            "key_positions": (max(sizes.num_keys, tokens),), "ancestors": (tokens, sizes.num_words),
            "paths": (tokens, sizes.path_length), "edit_places": (sizes.num_edits,), "edit_slots": (sizes.num_edits,),
        }  # fmt: skip
        starts = [0]
        for shape in shapes.values():
            starts.append(-(-(starts[-1] + int(np.prod(shape))) // _ALIGNMENT) * _ALIGNMENT)
        is_cuda = tables.device.type == "cuda"
        self._host = torch.zeros(starts[-1], dtype=torch.int32, pin_memory=is_cuda)
        self._device = torch.zeros(starts[-1], dtype=torch.int32, device=tables.device)
        self._sent = torch.cuda.Event() if is_cuda else None
        self._views = {}
        self.device: dict[str, Tensor] = {}
        for (name, shape), start in zip(shapes.items(), starts, strict=False):
            part = slice(start, start + int(np.prod(shape)))
            self._views[name] = self._host[part].view(shape).numpy()
            self.device[name] = self._device[part].view(shape)
        self.fill_up()

    def fill_up(self) -> None:
        """Make all of it filling: a step of no requests."""
        for view in self._views.values():
            view.fill(0)
        self._views["edit_places"].fill(self.tables.trash_place)

    def put(self, step: Step, edits: tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]) -> None:
        """Write a step and the cells that its tables have more than the device's, and send it all.

        Raises:
            InternalError: it does not fit.
        """
        if (step.states is None) != (self.states is None):
            raise InternalError("a step's states must come with buffers for them")
        if not step.sizes(len(edits[0]), has_paths=self.sizes.path_length > 0).fit_in(self.sizes):
            raise InternalError("a step was put into buffers that are too small for it")
        if self._sent is not None:
            self._sent.synchronize()  # the last copy may still read
        self.fill_up()
        for name, values in self._values(step, edits):
            view = self._views[name]
            view[tuple(slice(0, size) for size in values.shape)] = values
        counts = self._views["cu_queries"], self._views["cu_keys"]
        for cumulated in counts:
            cumulated[len(step.layouts) + 1 :] = cumulated[len(step.layouts)]
        self._device.copy_(self._host, non_blocking=True)
        if self.states is not None and step.states is not None:
            self.states[: len(step.states)].copy_(step.states)  # on the device; fillers read what lay there before
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self.tables.device))

    def _values(
        self, step: Step, edits: tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]
    ) -> Iterator[tuple[str, npt.NDArray[np.integer]]]:
        layouts = step.layouts
        yield "input_ids", step.input_ids
        yield "positions", step.positions
        yield "logit_rows", step.logit_rows
        yield "cu_queries", np.cumsum([0, *(layout.num_tokens for layout in layouts)])
        yield "cu_keys", np.cumsum([0, *(layout.num_earlier + layout.num_tokens for layout in layouts)])
        yield "contexts", np.array([layout.num_cached for layout in layouts])
        yield "rows", np.array([self.tables.row_of(layout.request_id) for layout in layouts])
        yield "key_positions", np.concatenate([layout.positions for layout in layouts])
        yield "ancestors", ancestor_words([layout.ancestors for layout in layouts], self.sizes.num_words)
        if self.sizes.path_length:
            yield "paths", path_table([layout.ancestors for layout in layouts], self.sizes.path_length)
        tables = [[group.tables[layout.request_id] for layout in layouts] for group in self.pool.groups.values()]
        yield "firsts", np.array([[table.first for table in row] for row in tables])
        yield (
            "slots",
            np.stack([
                np.concatenate([
                    table.reserved[layout.num_earlier :] for table, layout in zip(row, layouts, strict=True)
                ])
                for row in tables
            ]),
        )  # fmt: skip
        yield "edit_places", edits[0]
        yield "edit_slots", edits[1]

    def slots(self) -> dict[GroupKey, Tensor]:
        """[T] int64 on the device for each group: where the step's K/V go."""
        slots = self.device["slots"].long()
        return dict(zip(self.pool.groups, slots.unbind(0), strict=True))

    def batches(self, max_columns: int) -> dict[GroupKey, TreeBatch]:
        """Who sees what, for each group, as views of what was sent.

        Args:
            max_columns: no request of the step has more tokens than this.
        """
        on = self.device
        return {
            key: TreeBatch(
                cu_queries=on["cu_queries"], cu_keys=on["cu_keys"], contexts=on["contexts"],
                firsts=on["firsts"][group], rows=on["rows"], slots=self.tables.of(key), positions=on["key_positions"],
                ancestors=on["ancestors"], max_columns=max_columns,
                paths=on["paths"] if self.sizes.path_length else None,
            )
            for group, key in enumerate(self.pool.groups)
        }  # fmt: skip
