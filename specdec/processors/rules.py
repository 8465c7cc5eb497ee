"""The processors by rule: biased and banned sequences, and tokens banned or forced at given prefix lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.processors.base import Op, edit
from specdec.processors.nodes import NodeBatch

__all__ = ["Ban", "Force", "SequenceBias"]


class SequenceBias(Op):
    """A bias is added to the last token of a sequence where the prefix ends with the tokens before it.

    Args:
        biases: sequence of token ids -> bias; sequences of one token are biased everywhere. Bad words have -inf.
        device: of the scores.
    """

    __slots__ = ("_columns", "_everywhere", "_groups", "_reach")
    rank = 0

    def __init__(self, biases: Mapping[tuple[int, ...], float], device: torch.device) -> None:
        super().__init__()
        columns = sorted({sequence[-1] for sequence in biases})
        column_of = {token_id: column for column, token_id in enumerate(columns)}
        self._columns = torch.tensor(columns, device=device)
        self._everywhere = np.zeros(len(columns), dtype=np.float32)
        by_length: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for sequence, bias in biases.items():
            if len(sequence) == 1:
                self._everywhere[column_of[sequence[0]]] = bias
            else:
                by_length.setdefault(len(sequence) - 1, []).append((sequence, bias))
        self._reach = max(by_length, default=0)
        self._groups = [
            (
                np.array([sequence[:-1] for sequence, _ in group], dtype=np.int64),  # [m, length]
                np.array([column_of[sequence[-1]] for sequence, _ in group]),  # [m]
                np.array([bias for _, bias in group], dtype=np.float32),  # [m]
            )
            for group in by_length.values()
        ]

    def everywhere(self, vocab_size: int) -> Tensor | None:
        """[V] float32: the bias of every token, or None if the bias of some depends on the prefix."""
        if self._reach:
            return None
        bias = torch.zeros(vocab_size, dtype=torch.float32, device=self._columns.device)
        return bias.index_copy_(0, self._columns, torch.from_numpy(self._everywhere).to(bias.device))

    @classmethod
    def apply(cls, ops: Sequence[SequenceBias], requests: Sequence[int], nodes: NodeBatch, scores: Tensor) -> None:
        for op, request in zip(ops, requests, strict=True):
            bias = np.tile(op._everywhere, (nodes.sizes[request], 1))  # [N, columns]
            if op._reach:
                tails = nodes.tails(request, op._reach)
                for prefixes, columns, values in op._groups:
                    ends = tails[:, None, -prefixes.shape[1] :]
                    node, sequence = np.nonzero((ends == prefixes).all(axis=-1))
                    np.add.at(bias, (node, columns[sequence]), values[sequence])  # in order, as transformers adds
            scores[nodes.span(request)].index_add_(1, op._columns, torch.from_numpy(bias).to(scores.device))


class Ban(Op):
    """Some tokens are impossible while the prefix length is in [start, stop): suppressed tokens, minimal lengths.

    Args:
        token_ids: [n] ids below V.
        start: first prefix length at which they are banned.
        stop: first prefix length at which they are not any more, or None.
        device: of the scores.
    """

    __slots__ = ("_ids", "_start", "_stop")
    rank = 30

    def __init__(self, token_ids: Sequence[int], start: int, stop: int | None, device: torch.device) -> None:
        super().__init__()
        self._ids = torch.tensor(sorted(set(token_ids)), dtype=torch.int64, device=device)
        self._start = start
        self._stop = self.expires_at = stop

    def _fill(self, block: Tensor) -> None:
        block.index_fill_(1, self._ids, -float("inf"))

    @classmethod
    def apply(cls, ops: Sequence[Ban], requests: Sequence[int], nodes: NodeBatch, scores: Tensor) -> None:
        for op, request in zip(ops, requests, strict=True):
            for rows in _rows_between(nodes, request, op._start, op._stop):
                edit(scores, rows, op._fill)


class Force(Op):
    """At one prefix length only some tokens are possible, all with score 0: a forced first or last token.

    Args:
        token_ids: [n] ids below V.
        at: the prefix length.
        device: of the scores.
    """

    __slots__ = ("_at", "_ids")
    rank = 35
    can_revive = True

    def __init__(self, token_ids: Sequence[int], at: int, device: torch.device) -> None:
        super().__init__()
        self._ids = torch.tensor(sorted(set(token_ids)), dtype=torch.int64, device=device)
        self._at = at
        self.expires_at = at + 1

    def _fill(self, block: Tensor) -> None:
        block.fill_(-float("inf")).index_fill_(1, self._ids, 0.0)

    @classmethod
    def apply(cls, ops: Sequence[Force], requests: Sequence[int], nodes: NodeBatch, scores: Tensor) -> None:
        for op, request in zip(ops, requests, strict=True):
            for rows in _rows_between(nodes, request, op._at, op._at + 1):
                edit(scores, rows, op._fill)


def _rows_between(nodes: NodeBatch, request: int, start: int, stop: int | None) -> list[slice | Tensor]:
    """The rows of a request whose prefix length is in [start, stop): none, a slice of all of them, or an index."""
    span = nodes.span(request)
    lengths = nodes.prefix_lengths[span]
    inside = lengths >= start
    if stop is not None:
        inside &= lengths < stop
    if inside.all():
        return [span]
    return [torch.from_numpy(np.flatnonzero(inside) + span.start).to(nodes.device)] if inside.any() else []
