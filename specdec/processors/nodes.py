"""The nodes of a batch of trees, as logits processors see them: each with its own true prefix.

A node's prefix is the request's committed tokens followed by the draft tokens on the path to the node. The last
committed token is the root itself, so the root adds nothing. Everything is made on demand and once per step, by array
operations over all nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.types import DraftTree, IntArray, RequestState

__all__ = ["Index", "NodeBatch"]

Index: TypeAlias = npt.NDArray[np.int64]


class NodeBatch:
    """All nodes of the trees of one step, in the order of the logits rows.

    Args:
        states: [R] the requests; their committed tokens end with the root of their tree.
        trees: [R] one tree each.
        device: of the scores.
    """

    def __init__(self, states: Sequence[RequestState], trees: Sequence[DraftTree], device: torch.device) -> None:
        self.states = states
        self.trees = trees
        self.device = device
        self.sizes = [len(tree) for tree in trees]
        self.starts = [0]
        for size in self.sizes:
            self.starts.append(self.starts[-1] + size)

    def part(self, requests: Sequence[int]) -> NodeBatch:
        """The nodes of some of the requests, in the given order."""
        if len(requests) == len(self.states):
            return self
        states, trees = [self.states[request] for request in requests], [self.trees[request] for request in requests]
        return NodeBatch(states, trees, self.device)

    @property
    def num_nodes(self) -> int:
        """T: rows of the scores."""
        return self.starts[-1]

    def span(self, request: int) -> slice:
        """The rows of one request."""
        return slice(self.starts[request], self.starts[request + 1])

    def rows(self, requests: Sequence[int]) -> slice | Tensor:
        """The rows of several requests in ascending order: a slice if they are neighbours, else an index on device."""
        first, last = requests[0], requests[-1]
        if last - first == len(requests) - 1:
            return slice(self.starts[first], self.starts[last + 1])
        spans = [np.arange(self.starts[request], self.starts[request + 1]) for request in requests]
        return torch.from_numpy(np.concatenate(spans)).to(self.device)

    def per_row(self, values: Sequence[float], requests: Sequence[int]) -> Tensor:
        """[n, 1] float32: the value of each request, repeated for its rows."""
        if len(values) == 1:
            return torch.full((self.sizes[requests[0]], 1), values[0], dtype=torch.float32, device=self.device)
        repeated = np.repeat(np.array(values, dtype=np.float32), [self.sizes[request] for request in requests])
        return torch.from_numpy(repeated[:, None]).to(self.device)

    def local_request(self, requests: Sequence[int]) -> Tensor:
        """[n] int64: for each row of ``requests``, which of them it belongs to."""
        repeated = np.repeat(np.arange(len(requests)), [self.sizes[request] for request in requests])
        return torch.from_numpy(repeated).to(self.device)

    @cached_property
    def request_of_row(self) -> Index:
        """[T] int64: index into ``states``."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @cached_property
    def token_ids(self) -> IntArray:
        """[T] int32: the token of each node."""
        return np.concatenate([tree.token_ids for tree in self.trees])

    @cached_property
    def parent_rows(self) -> Index:
        """[T] int64: the row of each node's parent, -1 for roots."""
        parents = np.concatenate([tree.parents for tree in self.trees]).astype(np.int64)
        offsets = np.repeat(np.array(self.starts[:-1], dtype=np.int64), self.sizes)
        return np.where(parents < 0, -1, parents + offsets)

    @cached_property
    def _path(self) -> tuple[Index, Index, Index]:
        """Depth of each node [T], and (row, ancestor row) for every node on its path, itself included, root excluded.

        The pairs go from the nodes upwards, one level of the batch at a time.
        """
        depths = np.zeros(self.num_nodes, dtype=np.int64)
        rows, ancestors = [], []
        row = np.flatnonzero(self.parent_rows >= 0)
        ancestor = row
        while len(row):
            depths[row] += 1
            rows.append(row)
            ancestors.append(ancestor)
            above = self.parent_rows[ancestor]
            inner = self.parent_rows[above] >= 0
            row, ancestor = row[inner], above[inner]
        empty = np.empty(0, dtype=np.int64)
        return depths, np.concatenate([empty, *rows]), np.concatenate([empty, *ancestors])

    @property
    def depths(self) -> Index:
        """[T] int64: distance of each node from its root."""
        return self._path[0]

    @cached_property
    def prefix_lengths(self) -> Index:
        """[T] int64: tokens before the one that the row predicts; also that token's absolute position."""
        committed = np.array([state.num_tokens for state in self.states], dtype=np.int64)
        return np.repeat(committed, self.sizes) + self.depths

    def path_tokens(self, requests: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(row, token) for every draft token on the path of every node, as two int64 tensors on the device.

        Rows count within the rows of ``requests``. A token that is twice on a path comes twice.
        """
        _, rows, ancestors = self._path
        tokens = self.token_ids[ancestors].astype(np.int64)
        if len(requests) < len(self.sizes):
            local = np.full(self.num_nodes, -1, dtype=np.int64)
            wanted = np.isin(self.request_of_row, np.asarray(requests))
            local[wanted] = np.arange(int(wanted.sum()))
            rows = local[rows]
            tokens, rows = tokens[rows >= 0], rows[rows >= 0]
        return torch.from_numpy(rows).to(self.device), torch.from_numpy(tokens).to(self.device)

    def tails(self, request: int, length: int) -> Index:
        """[N, length] int64: the last tokens of the prefix of each node of a request; -1 before the prefix begins."""
        span = self.span(request)
        committed = self.states[request].token_ids[-length:]
        # The committed tail behind `length` paddings: reading it at any distance from its end stays inside.
        source = np.concatenate([np.full(length, -1, dtype=np.int64), committed])
        tails = np.empty((self.sizes[request], length), dtype=np.int64)
        row = np.arange(span.start, span.stop)
        in_context = np.ones(len(row), dtype=np.int64)  # distance from the end of the committed tokens
        for column in range(length - 1, -1, -1):
            is_draft = self.parent_rows[row] >= 0
            tails[:, column] = np.where(is_draft, self.token_ids[row], source[-in_context])
            in_context = np.where(is_draft, in_context, in_context + 1)
            row = np.where(is_draft, self.parent_rows[row], row)
        return tails

    def prefix_ids(self, row: int) -> Tensor:
        """[1, S] int64 on the device: the whole prefix of one node, in fresh memory."""
        state = self.states[int(self.request_of_row[row])]
        path: list[Any] = []
        while (above := int(self.parent_rows[row])) >= 0:
            path.append(self.token_ids[row])
            row = above
        ids = np.concatenate([state.token_ids, np.array(path[::-1], dtype=np.int32)]).astype(np.int64)
        return torch.from_numpy(ids[None]).to(self.device)
