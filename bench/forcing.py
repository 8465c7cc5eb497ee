"""Replay: a logits processor that makes any model say what was recorded, at the real cost of its forwards.

The recorded token's score is raised above all others; no score is ever set to minus infinity. That is on purpose:
transformers' prompt lookup asks the processors which of its candidates are forbidden, and an answer by minus infinity
would tell the peer the future for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from specdec.errors import ConfigError
from specdec.processors import NodeBatch, Op
from specdec.types import IntArray

__all__ = ["ForcedResponse"]

# Far above any logit of a real model, and below the largest float16 even when divided by a temperature of 0.5.
_RAISED = 3e4


class ForcedResponse:
    """Raises the recorded token at every position of the answer; callable as transformers calls its processors.

    A function of (input_ids, scores) alone: the place in the answer is the number of tokens behind the prompt. So it
    works wherever a processor does: in ``generate``, for each candidate of prompt lookup, and for each node of a tree.

    Args:
        responses: the recorded answer of each row, [G] int32 each.
        prompt_length: tokens in front of the answers, padding included.

    Raises:
        ConfigError: no response.
    """

    def __init__(self, responses: Sequence[IntArray], prompt_length: int) -> None:
        if not responses:
            raise ConfigError("a forced response needs at least one row, got none")
        self.responses = [np.asarray(response, dtype=np.int64) for response in responses]
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] scores with one token per row raised; behind the end of an answer a row is left as it is.

        Effects: edits ``scores`` in place; transformers and the engine hand out copies.
        """
        place = input_ids.shape[1] - self.prompt_length
        for row in range(scores.shape[0]):
            # Candidates of one sequence come as several rows of it.
            response = self.responses[row if len(self.responses) == scores.shape[0] else 0]
            if 0 <= place < len(response):
                scores[row, int(response[place])] = _RAISED
        return scores

    def tree_op(self, context: Any) -> Op:
        """The same for all nodes of a tree at once: what a node costs must not depend on the length of its prefix."""
        return _ForcedNodes(self.responses[0], self.prompt_length)


class _ForcedNodes(Op):
    """The vectorised form (`specdec.processors.base.Op`)."""

    __slots__ = ("_prompt_length", "_response")
    rank: ClassVar[int] = 50  # with the user's own processors

    def __init__(self, response: np.ndarray[Any, np.dtype[np.int64]], prompt_length: int) -> None:
        super().__init__()
        self._response = response
        self._prompt_length = prompt_length

    @classmethod
    def apply(cls, ops: Sequence[_ForcedNodes], requests: Sequence[int], nodes: NodeBatch, scores: Tensor) -> None:
        rows, token_ids = [], []
        for op, request in zip(ops, requests, strict=True):
            span = nodes.span(request)
            places = nodes.prefix_lengths[span] - op._prompt_length
            is_inside = (places >= 0) & (places < len(op._response))
            rows.append(np.arange(span.start, span.stop)[is_inside])
            token_ids.append(op._response[places[is_inside]])
        chosen, raised = np.concatenate(rows), np.concatenate(token_ids)
        if scores.is_cpu and scores.dtype == torch.float32:
            scores.numpy()[chosen, raised] = _RAISED
        else:
            scores[torch.from_numpy(chosen).to(scores.device), torch.from_numpy(raised).to(scores.device)] = _RAISED
