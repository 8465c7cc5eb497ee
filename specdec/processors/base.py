"""What a compiled processor is, and how the processors of many requests are run over many nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.errors import RequestError
from specdec.processors import cpu
from specdec.processors.nodes import Index, NodeBatch
from specdec.types import LogitsProcessor

__all__ = ["Op", "PerNode", "ban_", "divide_", "edit", "run"]


class Op:
    """One processor of one request, applied to all nodes of all requests that have one of its kind at once.

    ``rank`` is the place of the kind in the order of ``transformers``. It decides which kind is applied next to the
    batch, so that each kind of the usual order is applied once; the order within a request is always its own.

    ``expires_at``: prefix length from which on the processor changes nothing any more; it is dropped then.
    """

    __slots__ = ("expires_at",)
    rank: ClassVar[int]
    can_revive: ClassVar[bool] = False  # may it make a token possible whose score is -inf?
    expires_at: int | None

    def __init__(self) -> None:
        self.expires_at = None

    @classmethod
    def apply(cls, ops: Sequence[Any], requests: Sequence[int], nodes: NodeBatch, scores: Tensor) -> None:
        """Process the rows of ``requests`` (ascending), whose processors of this kind are ``ops``.

        Effects: edits ``scores`` [T, V] float32 in place, no other rows than those of ``requests``.
        """
        raise NotImplementedError

    def commit(self, ids: Index) -> None:
        """Follow the committed tokens [n] int64, before they are appended."""


def run(pipelines: Sequence[Sequence[Op]], nodes: NodeBatch, scores: Tensor) -> None:
    """Apply the processors of every request to its nodes, each request's in its own order.

    Effects: edits ``scores`` [T, V] float32 in place.
    """
    position = [0] * len(pipelines)
    pending = [request for request, ops in enumerate(pipelines) if ops]
    while pending:
        heads = {request: pipelines[request][position[request]] for request in pending}
        kind = type(min(heads.values(), key=lambda op: op.rank))
        chosen = [request for request in pending if type(heads[request]) is kind]
        kind.apply([heads[request] for request in chosen], chosen, nodes, scores)
        for request in chosen:
            position[request] += 1
        pending = [request for request in pending if position[request] < len(pipelines[request])]


def edit(scores: Tensor, rows: slice | Tensor, change: Callable[[Tensor], object]) -> None:
    """Run an in-place change on some rows of ``scores``, by a view where the rows are neighbours."""
    block = scores[rows]
    change(block)
    if not isinstance(rows, slice):
        scores[rows] = block


def ban_(scores: Tensor, banned: Tensor) -> None:
    """``scores[banned] = -inf``, in place."""
    if scores.is_cpu:
        cpu.ban(scores.numpy(), banned.numpy())
    else:
        scores.masked_fill_(banned, -float("inf"))


def divide_(scores: Tensor, divisor: Tensor) -> Tensor:
    """``scores /= divisor`` with the rounding of torch's division by a Python number, which transformers uses.

    On CUDA that is a multiplication by the reciprocal. The divisors are tensors here, so that a request's bits do not
    depend on whether its neighbours have the same parameter.
    """
    return scores.mul_(divisor.reciprocal()) if scores.is_cuda else scores.div_(divisor)


class PerNode(Op):
    """Any processor that is a pure function of (prefix, scores), called once per node with the node's true prefix.

    Nodes below a token that an ancestor's scores make impossible are passed over, unless a later processor might make
    it possible again: plain decoding never shows a processor such a prefix, and one that enforces a grammar may
    rightly fail on it.
    """

    __slots__ = ("_processor", "passes_over_impossible")
    rank = 50
    can_revive = True

    def __init__(self, processor: LogitsProcessor) -> None:
        super().__init__()
        self._processor = processor
        self.passes_over_impossible = False

    @classmethod
    def apply(cls, ops: Sequence[PerNode], requests: Sequence[int], nodes: NodeBatch, scores: Tensor) -> None:
        for op, request in zip(ops, requests, strict=True):
            span = nodes.span(request)
            impossible: set[int] = set()
            for row in range(span.start, span.stop):
                above = int(nodes.parent_rows[row])
                if op.passes_over_impossible and above >= 0:
                    token = int(nodes.token_ids[row])
                    if above in impossible or float(scores[above, token]) == -float("inf"):
                        impossible.add(row)
                        continue
                try:
                    scores[row] = op._call(nodes.prefix_ids(row), scores[row : row + 1].clone())
                except Exception as error:
                    error.add_note(f"raised by a logits processor of request {nodes.states[request].request_id!r}")
                    raise

    def _call(self, prefix_ids: Tensor, scores: Tensor) -> Tensor:
        result = self._processor(prefix_ids, scores)
        if not isinstance(result, torch.Tensor) or result.shape != scores.shape:
            raise RequestError(
                f"a logits processor must return scores of shape {tuple(scores.shape)}, "
                f"{type(self._processor).__name__} returned {getattr(result, 'shape', result)}"
            )
        return result[0]
