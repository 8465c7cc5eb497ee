"""Which queries of a flat batch belong to whom, and what each may see: what tree attention knows of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["TreeBatch", "ancestor_words", "path_table"]


@dataclass(frozen=True, slots=True, eq=False)
class TreeBatch:
    """One step's requests, one after the other. A request's keys are its cached ones, then those of its tree.

    A tree key is a query, or was one in an earlier forward of the same step: a drafter grows its tree by levels. Rows
    of fixed buffers that nobody fills belong to requests of no queries, and tokens behind ``cu_queries[-1]`` to nobody.

    Args:
        cu_queries: [R + 1] int32 with a leading zero: request r owns queries from ``cu_queries[r]`` on.
        cu_keys: [R + 1] int32, likewise for the tree keys; the queries are the last of them.
        contexts: [R] int32: cached tokens of each request, which is the column of its first tree key.
        firsts: [R] int32: position of each request's first cached key; not 0 where a window forgot the others.
        rows: [R] int32: each request's row of ``slots``.
        slots: [rows, L] int32: a cached key's slot stands in the column of its position, tree key i's in column
            ``contexts[r] + i``.
        positions: [K] int32 or longer: absolute position of every tree key.
        ancestors: [T, W] int32: bit i of a query's words: tree key i of the same request is itself or an ancestor.
        max_columns: no request has keys from this column on; bounds the work where the device's numbers are unknown.
        paths: [T, P] int32, for strict attention: which tree key is each query's ancestor at depth 0, 1, ...

    Raises:
        ValueError: the parts do not fit together.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    contexts: Tensor
    firsts: Tensor
    rows: Tensor
    slots: Tensor
    positions: Tensor
    ancestors: Tensor
    max_columns: int
    paths: Tensor | None = None

    def __post_init__(self) -> None:
        num_requests, num_queries = len(self.contexts), len(self.ancestors)
        expected = {
            "cu_queries": (num_requests + 1,),
            "cu_keys": (num_requests + 1,),
            "contexts": (num_requests,),
            "firsts": (num_requests,),
            "rows": (num_requests,),
            "positions": (len(self.positions),),
            "slots": tuple(self.slots.shape[:2]),
            "ancestors": (num_queries, self.ancestors.shape[-1]),
        }
        for name, shape in expected.items():
            have = getattr(self, name)
            if tuple(have.shape) != shape or have.dtype != torch.int32:
                raise ValueError(f"{name} must be int32 of shape {shape}, got {have.dtype} {tuple(have.shape)}")
        if len(self.positions) < num_queries:
            raise ValueError(f"positions must hold at least {num_queries} tree keys, got {len(self.positions)}")
        if not 1 <= self.max_columns <= self.slots.shape[1]:
            raise ValueError(f"max_columns must be in [1, {self.slots.shape[1]}], got {self.max_columns}")
        if self.paths is not None and (self.paths.dtype != torch.int32 or len(self.paths) != num_queries):
            raise ValueError(
                f"paths must be int32 with {num_queries} rows, got {self.paths.dtype} {tuple(self.paths.shape)}"
            )

    @property
    def num_queries(self) -> int:
        """T, fillers included."""
        return len(self.ancestors)

    @property
    def num_requests(self) -> int:
        """R, fillers included."""
        return len(self.contexts)

    def num_tiles(self, tokens: int) -> int:
        """A bound of how many tiles of up to ``tokens`` queries of one request there are, whatever the device holds."""
        return min(self.num_queries, self.num_queries // tokens + self.num_requests)

    def sizes(self) -> list[tuple[int, int, int, int]]:
        """(queries, tree keys, first column, columns before the tree) of every request; waits for the device."""
        queries, keys = np.diff(self.cu_queries.tolist()), np.diff(self.cu_keys.tolist())
        return list(zip(queries.tolist(), keys.tolist(), self.firsts.tolist(), self.contexts.tolist(), strict=True))

    def check(self, num_slots: int) -> None:
        """Refuse slots outside the cache and trees wider than their words.

        On a GPU this is left to who made the batch: looking would be waiting.

        Raises:
            ValueError: naming the first such value.
        """
        if self.slots.device.type != "cpu":
            return
        for (queries, keys, first, context), row in zip(self.sizes(), self.rows.tolist(), strict=True):
            if queries > keys or keys > 32 * self.ancestors.shape[1] or context + keys > self.max_columns:
                raise ValueError(
                    f"a request has {queries} queries, {keys} tree keys and {context} cached tokens, but the batch is "
                    f"for {32 * self.ancestors.shape[1]} tree keys and {self.max_columns} columns"
                )
            if not 0 <= row < len(self.slots):
                raise ValueError(f"rows must be in [0, {len(self.slots)}), got {row}")
            used = self.slots[row, first : context + keys]
            bad = used[(used < 0) | (used >= num_slots)]
            if len(bad) and queries:
                raise ValueError(f"slots must be in [0, {num_slots}), got {int(bad[0])} in row {row}")


def ancestor_words(matrices: Sequence[npt.NDArray[np.bool_]], num_words: int | None = None) -> npt.NDArray[np.int32]:
    """[T, W] int32 words from each request's [T_r, K_r] bool matrix ((i, j): tree key j is query i or an ancestor).

    Args:
        matrices: one per request.
        num_words: W; None: as few as the widest matrix needs.
    """
    if num_words is None:
        num_words = -(-max((matrix.shape[1] for matrix in matrices), default=0) // 32)
    bits = np.zeros((sum(map(len, matrices)), 32 * num_words), dtype=np.bool_)
    start = 0
    for matrix in matrices:
        bits[start : start + len(matrix), : matrix.shape[1]] = matrix
        start += len(matrix)
    packed = np.packbits(bits, axis=1, bitorder="little")
    return np.ascontiguousarray(packed).view("<i4").astype(np.int32).reshape(len(bits), num_words)


def path_table(matrices: Sequence[npt.NDArray[np.bool_]], length: int) -> npt.NDArray[np.int32]:
    """[T, length] int32 from the same matrices: each query's ancestors among the tree keys, root first, itself last."""
    table = np.zeros((sum(map(len, matrices)), length), dtype=np.int32)
    start = 0
    for matrix in matrices:
        query, key = np.nonzero(matrix)
        ends = np.cumsum(matrix.sum(1))
        depth = np.arange(len(query)) - np.concatenate([[0], ends[:-1]])[query]
        table[start + query, depth] = key
        start += len(matrix)
    return table
