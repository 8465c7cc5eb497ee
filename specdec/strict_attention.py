"""Attention on a CPU whose result for a query has the same bits, whatever else is computed in the same step.

A matrix product rounds by its shape and by where a term stands in its sums. So here every query is computed in the same
shape and with every key in the same place: the keys of its own path lie in the order of their positions from a multiple
of 512 on, as they would if the path had been decoded one token at a time; queries come in blocks of 16 rows, filled up
with rows that nobody reads. torch's fused attention goes through the keys in blocks of 512, and a block that is masked
as a whole changes nothing, so how long the row of keys is does not matter either.

Every leaf of a tree costs a gather of its keys and an attention call of its own; a chain is one leaf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from specdec.kv_slots import SlotTable
from specdec.query_layout import QueryLayout

__all__ = ["StrictKeys", "paths_of"]

_KEY_BLOCK: Final = 512  # torch's fused attention on a CPU works through the keys in blocks of so many
_ROW_BLOCK: Final = 16
_MAX_QUERIES: Final = 64  # of one call: bounds the mask, and a prompt's early tokens need not skip its late ones


class _Piece(NamedTuple):
    """Some queries of one path, and the keys up to the last of them."""

    tokens: torch.Tensor  # [m] int64: which of the request's query tokens
    slots: torch.Tensor  # [n] int64, n a multiple of 512
    mask: torch.Tensor  # additive [blocks, 1, 16, n]


class StrictKeys:
    """One request's keys of one group, path by path.

    Args:
        kind: ("full", 0), ("sliding", window) or ("chunked", length).
        table: the request's slots; those of the step's query tokens come last.
        layout: the request's query tokens.
        num_groups: G, query heads per KV head.
        dtype: of the mask.
    """

    def __init__(
        self, kind: tuple[str, int], table: SlotTable, layout: QueryLayout, num_groups: int, dtype: torch.dtype
    ) -> None:
        self._pieces: list[_Piece] = []
        for path, owned in paths_of(layout.ancestors):
            for first in range(0, len(owned), _MAX_QUERIES):
                places = owned[first : first + _MAX_QUERIES]
                self._pieces.append(_piece(kind, table, layout.num_cached, path, places, num_groups, dtype))

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """[Hkv, G, T, D] from query [Hkv, G, T, D] and the pool's keys and values [slots, Hkv, D]."""
        out = torch.empty_like(query)
        num_heads, num_groups, _, width = query.shape
        for tokens, slots, mask in self._pieces:
            num_blocks = len(mask)
            rows = query.index_select(2, tokens).flatten(1, 2)  # [Hkv, G * m, D]
            num_rows = rows.shape[1]
            rows = pad(rows, (0, 0, 0, num_blocks * _ROW_BLOCK - num_rows))
            k, v = (
                x.index_select(0, slots).transpose(0, 1)[None].expand(num_blocks, -1, -1, -1) for x in (keys, values)
            )
            blocks = rows.unflatten(1, (num_blocks, _ROW_BLOCK)).transpose(0, 1)
            result = scaled_dot_product_attention(blocks, k, v, attn_mask=mask, scale=scale)  # [blocks, Hkv, 16, D]
            result = result.transpose(0, 1).reshape(num_heads, -1, width)[:, :num_rows]
            out.index_copy_(2, tokens, result.unflatten(1, (num_groups, len(tokens))))
        return out


def paths_of(ancestors: npt.NDArray[np.bool_]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """The root-to-leaf paths of a step's query tokens, which have their ancestors before them.

    Args:
        ancestors: [T, T] bool: (i, j) is True if j is i or an ancestor of i.

    Yields:
        A path [L] int64, root first, and the places [m] int64 on it whose tokens no earlier path had.
    """
    is_leaf = ancestors.sum(axis=0) == 1
    done = np.zeros(len(ancestors), dtype=np.bool_)
    for leaf in np.flatnonzero(is_leaf):
        path = np.flatnonzero(ancestors[leaf])
        places = np.flatnonzero(~done[path])
        done[path] = True
        yield path, places


def _piece(
    kind: tuple[str, int],
    table: SlotTable,
    num_cached: int,
    path: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    num_groups: int,
    dtype: torch.dtype,
) -> _Piece:
    positions = num_cached + places  # [m], absolute: a path's tokens follow one another
    name, size = kind
    lows = np.zeros_like(positions)
    if name != "full":
        lows = np.maximum(positions - (size - 1), 0) if name == "sliding" else positions // size * size
    start = int(lows.min()) // _KEY_BLOCK * _KEY_BLOCK
    end = -(-(int(positions[-1]) + 1) // _KEY_BLOCK) * _KEY_BLOCK
    # Masked keys may be any that are finite, for their weight is zero: the request's own first one will do.
    slots = np.full(end - start, table.slots[0], dtype=np.int64)
    context = table.slots[max(start - table.first, 0) : num_cached - table.first]
    first = max(table.first, start)
    slots[first - start : first - start + len(context)] = context
    skipped = max(start - num_cached, 0)  # tokens of this very step that a window has already left behind
    own = table.slots[num_cached - table.first + path[skipped : places[-1] + 1]]
    slots[num_cached + skipped - start :][: len(own)] = own
    columns = np.arange(start, end)
    hidden = (columns > positions[:, None]) | (columns < lows[:, None])  # [m, n]
    rows = np.tile(hidden, (num_groups, 1))
    num_blocks = -(-len(rows) // _ROW_BLOCK)
    mask = torch.zeros(num_blocks * _ROW_BLOCK, end - start, dtype=dtype)  # rows that nobody reads see everything
    mask[: len(rows)].masked_fill_(torch.from_numpy(rows), float("-inf"))
    return _Piece(
        torch.from_numpy(path[places]), torch.from_numpy(slots), mask.view(num_blocks, 1, _ROW_BLOCK, end - start)
    )
