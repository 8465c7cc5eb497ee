"""Which queries of a flat batch belong to whom, and what each may see: what tree attention knows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["TreeBatch", "ancestor_words"]


@dataclass(frozen=True, slots=True, eq=False)
class TreeBatch:
    """One step's requests, one after the other.

    Args:
        cu_queries: [R + 1] int32 with a leading zero: request r owns queries from ``cu_queries[r]`` on.
        contexts: [R] int32: cached keys of each request.
        firsts: [R] int32: position of each request's first cached key; not 0 where a window forgot the others.
        slots: [R, L] int32: where a request's keys lie: its context, then its queries.
        positions: [T] int32: absolute position of every query.
        ancestors: [T, W] int32: bit i of a query's words: query i of the same request is itself or an ancestor of it.
        lengths: (queries, context) of every request, on the host: nobody has to wait for the device to know them.

    Raises:
        ValueError: the parts do not fit together.
    """

    cu_queries: Tensor
    contexts: Tensor
    firsts: Tensor
    slots: Tensor
    positions: Tensor
    ancestors: Tensor
    lengths: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        num_requests, num_queries = len(self.lengths), self.num_queries
        expected = {
            "cu_queries": (num_requests + 1,),
            "contexts": (num_requests,),
            "firsts": (num_requests,),
            "positions": (num_queries,),
        }
        for name, shape in expected.items():
            have = getattr(self, name)
            if tuple(have.shape) != shape or have.dtype != torch.int32:
                raise ValueError(f"{name} must be int32 of shape {shape}, got {have.dtype} {tuple(have.shape)}")
        longest = max((queries for queries, _ in self.lengths), default=0)
        if self.ancestors.dtype != torch.int32 or tuple(self.ancestors.shape) != (num_queries, -(-longest // 32)):
            raise ValueError(
                f"ancestors must be int32 of shape {(num_queries, -(-longest // 32))}, "
                f"got {self.ancestors.dtype} {tuple(self.ancestors.shape)}"
            )
        needed = max((queries + context for queries, context in self.lengths), default=0)
        if self.slots.dtype != torch.int32 or self.slots.shape[0] != num_requests or self.slots.shape[1] < needed:
            raise ValueError(
                f"slots must be int32 of shape ({num_requests}, at least {needed}), "
                f"got {self.slots.dtype} {tuple(self.slots.shape)}"
            )

    @property
    def num_queries(self) -> int:
        """T."""
        return sum(queries for queries, _ in self.lengths)

    def tiles(self, tokens: int) -> Tensor:
        """[tiles, 2] int32 on the device: request, and first of up to ``tokens`` queries within it."""
        rows = [(r, first) for r, (queries, _) in enumerate(self.lengths) for first in range(0, queries, tokens)]
        return torch.tensor(rows, dtype=torch.int32).to(self.slots.device)

    def check_slots(self, num_slots: int) -> None:
        """Refuse slots that lie outside the cache. On a GPU this is left to who made the table: it would have to wait.

        Raises:
            ValueError: naming the first such slot.
        """
        if self.slots.device.type != "cpu":
            return
        for row, (queries, context) in enumerate(self.lengths):
            used = self.slots[row, : queries + context]
            bad = used[(used < 0) | (used >= num_slots)]
            if len(bad):
                raise ValueError(f"slots must be in [0, {num_slots}), got {int(bad[0])} for request {row}")


def ancestor_words(matrices: Sequence[npt.NDArray[np.bool_]]) -> Tensor:
    """[T, W] int32 words from each request's [T_r, T_r] bool matrix ((i, j): j is i or an ancestor of i)."""
    longest = max((len(matrix) for matrix in matrices), default=0)
    num_words = -(-longest // 32)
    bits = np.zeros((sum(map(len, matrices)), 32 * num_words), dtype=np.bool_)
    start = 0
    for matrix in matrices:
        bits[start : start + len(matrix), : len(matrix)] = matrix
        start += len(matrix)
    packed = np.packbits(bits, axis=1, bitorder="little")
    return torch.from_numpy(np.ascontiguousarray(packed).view("<i4").astype(np.int32).reshape(len(bits), num_words))
