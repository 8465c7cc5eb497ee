"""The processors that depend on which tokens the prefix holds: penalties, and no token twice.

The committed tokens are counted as they are committed; the draft tokens on the path of a node are added per step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.processors import cpu
from specdec.processors.base import Op, ban_, divide_, edit
from specdec.processors.nodes import Index, NodeBatch
from specdec.types import IntArray

__all__ = ["NoRepeatToken", "OutputPenalty", "RepetitionPenalty"]


class _SeenTokens(Op):
    """A kind that needs to know which tokens a prefix holds.

    Args:
        seen_ids: [n] the tokens that count as seen already.
        vocab_size: V.
        device: of the scores.
    """

    __slots__ = ("_seen",)

    def __init__(self, seen_ids: IntArray, vocab_size: int, device: torch.device) -> None:
        super().__init__()
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.commit(seen_ids.astype(np.int64))

    def commit(self, ids: Index) -> None:
        # A prompt may hold ids that the model cannot predict: its input vocabulary may be the larger one.
        ids = ids[ids < len(self._seen)]
        if self._seen.is_cpu:
            self._seen.numpy()[ids] = True
        else:
            self._seen[torch.from_numpy(ids).to(self._seen.device)] = True

    @property
    def seen_table(self) -> Tensor:
        """[V] bool: the committed tokens; it follows them."""
        return self._seen

    @staticmethod
    def seen(ops: Sequence[_SeenTokens], requests: Sequence[int], nodes: NodeBatch) -> Tensor:
        """[n, V] bool: for each row of ``requests``, the tokens in its prefix."""
        seen = torch.stack([op._seen for op in ops])[nodes.local_request(requests)]
        seen[nodes.path_tokens(requests)] = True
        return seen


class NoRepeatToken(_SeenTokens):
    """Every token of the prefix is banned: ``no_repeat_ngram_size`` = 1."""

    __slots__ = ()
    rank = 21

    @classmethod
    def apply(cls, ops: Sequence[NoRepeatToken], requests: Sequence[int], nodes: NodeBatch, scores: Tensor) -> None:
        seen = cls.seen(ops, requests, nodes)
        edit(scores, nodes.rows(requests), lambda block: ban_(block, seen))


class RepetitionPenalty(_SeenTokens):
    """Scores of tokens in the prefix are divided by the penalty if positive, multiplied if negative.

    Args:
        penalty: above 0; 1 changes nothing.
        seen_ids: [n] the tokens that count as seen already.
        vocab_size: V.
        device: of the scores.

    Source: Keskar et al., "CTRL", 2019, section 4.1; the rule for negative scores is that of transformers.
    """

    __slots__ = ("penalty",)
    rank = 10

    def __init__(self, penalty: float, seen_ids: IntArray, vocab_size: int, device: torch.device) -> None:
        super().__init__(seen_ids, vocab_size, device)
        self.penalty = penalty

    @classmethod
    def apply(cls, ops: Sequence[RepetitionPenalty], requests: Sequence[int], nodes: NodeBatch, scores: Tensor) -> None:
        if not scores.is_cpu:
            cls.apply_torch(ops, requests, nodes, scores)
            return
        rows = scores.numpy()
        for op, request in zip(ops, requests, strict=True):
            tree, penalty = nodes.trees[request], np.float32(op.penalty)
            seen = op._seen.numpy()
            cpu.penalise_repeated(rows[nodes.span(request)], seen, tree.token_ids, tree.parents, penalty)

    @classmethod
    def apply_torch(
        cls, ops: Sequence[RepetitionPenalty], requests: Sequence[int], nodes: NodeBatch, scores: Tensor
    ) -> None:
        """``apply`` in torch operations over [n, V], for any device."""
        seen = cls.seen(ops, requests, nodes)
        penalty = nodes.per_row([op.penalty for op in ops], requests)

        def penalise(block: Tensor) -> None:
            lowered = torch.where(block < 0, block * penalty, divide_(block.clone(), penalty))
            torch.where(seen, lowered, block, out=block)

        edit(scores, nodes.rows(requests), penalise)


class OutputPenalty(Op):
    """Presence and frequency penalties: ``score -= frequency * count + presence * (count > 0)``, over the output only.

    Args:
        presence: penalty of a token that was written at all.
        frequency: penalty per time that it was written.
        output_ids: [n] the tokens that count as written already.
        vocab_size: V.
        device: of the scores.

    ``counts`` is [V] float32 and follows the committed tokens.

    Source: the OpenAI API reference, "frequency and presence penalties".
    """

    __slots__ = ("counts", "frequency", "presence")
    rank = 11

    def __init__(
        self, presence: float, frequency: float, output_ids: IntArray, vocab_size: int, device: torch.device
    ) -> None:
        super().__init__()
        self.presence, self.frequency = presence, frequency
        self.counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self.commit(output_ids.astype(np.int64))

    def commit(self, ids: Index) -> None:
        ids = ids[ids < len(self.counts)]
        if self.counts.is_cpu:
            np.add.at(self.counts.numpy(), ids, np.float32(1))
        else:
            index = torch.from_numpy(ids).to(self.counts.device)
            self.counts.index_add_(0, index, torch.ones_like(index, dtype=torch.float32))

    @classmethod
    def apply(cls, ops: Sequence[OutputPenalty], requests: Sequence[int], nodes: NodeBatch, scores: Tensor) -> None:
        if not scores.is_cpu:
            cls.apply_torch(ops, requests, nodes, scores)
            return
        rows = scores.numpy()
        for op, request in zip(ops, requests, strict=True):
            tree, counts = nodes.trees[request], op.counts.numpy()
            frequency, presence = np.float32(op.frequency), np.float32(op.presence)
            cpu.subtract_counts(rows[nodes.span(request)], counts, tree.token_ids, tree.parents, frequency, presence)

    @classmethod
    def apply_torch(
        cls, ops: Sequence[OutputPenalty], requests: Sequence[int], nodes: NodeBatch, scores: Tensor
    ) -> None:
        """``apply`` in torch operations over [n, V], for any device."""
        counts = torch.stack([op.counts for op in ops])[nodes.local_request(requests)]  # [n, V]
        pairs = nodes.path_tokens(requests)
        counts.index_put_(pairs, torch.ones(len(pairs[0]), device=scores.device), accumulate=True)
        frequency = nodes.per_row([op.frequency for op in ops], requests)
        presence = nodes.per_row([op.presence for op in ops], requests)
        edit(scores, nodes.rows(requests), lambda block: _subtract(block, frequency * counts, presence * (counts > 0)))


def _subtract(block: Tensor, first: Tensor, second: Tensor) -> None:
    block.sub_(first).sub_(second)
