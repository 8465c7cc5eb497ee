"""The processors that look at the scores alone: temperature, truncations, normalisation.

Each kind repeats the float operations of its ``transformers`` class over all rows at once, with one parameter per
row, so that each row has the bits that the class gives it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from specdec.processors import cpu
from specdec.processors.base import Op, ban_, divide_, edit
from specdec.processors.nodes import NodeBatch

__all__ = [
    "EpsilonCutoff",
    "EtaCutoff",
    "MinP",
    "Normalize",
    "RemoveInvalid",
    "Temperature",
    "TopK",
    "TopP",
    "TypicalP",
]


class _Warper(Op):
    """A kind with one number per request; ``_warp`` edits a block [n, V] given the numbers [n, 1]."""

    __slots__ = ("value",)
    rank: ClassVar[int]

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value

    @classmethod
    def apply(cls, ops: Sequence[_Warper], requests: Sequence[int], nodes: NodeBatch, scores: Tensor) -> None:
        values = nodes.per_row([op.value for op in ops], requests)
        edit(scores, nodes.rows(requests), lambda block: cls._warp(block, values))

    @staticmethod
    def _warp(block: Tensor, values: Tensor) -> None:
        raise NotImplementedError


class Temperature(_Warper):
    """Scores divided by the temperature."""

    __slots__ = ()
    rank = 60

    @staticmethod
    def _warp(block: Tensor, values: Tensor) -> None:
        divide_(block, values)


class TopK(_Warper):
    """Only scores at least as large as the k-th largest stay."""

    __slots__ = ()
    rank = 62

    @staticmethod
    def _warp(block: Tensor, values: Tensor) -> None:
        if block.is_cpu:
            cpu.keep_top_k(block.numpy(), values.long().clamp_(max=block.shape[-1]).flatten().numpy())
        else:
            TopK.warp_torch(block, values)

    @staticmethod
    def warp_torch(block: Tensor, values: Tensor) -> None:
        """The same in torch operations, for any device."""
        k = values.long().clamp_(max=block.shape[-1])
        largest = torch.topk(block, int(k.max()), dim=-1).values
        ban_(block, block < largest.gather(-1, k - 1))


class TopP(_Warper):
    """The least likely tokens go whose total probability is at most 1 - p; ``value`` is 1 - p."""

    __slots__ = ()
    rank = 63

    @staticmethod
    def _warp(block: Tensor, values: Tensor) -> None:
        if block.is_cpu:
            cpu.keep_top_p(block.numpy(), block.softmax(dim=-1).numpy(), values.flatten().numpy())
        else:
            TopP.warp_torch(block, values)

    @staticmethod
    def warp_torch(block: Tensor, values: Tensor) -> None:
        """The same in torch operations, for any device."""
        # Stable, unlike in transformers: which of several equal scores stay must depend on the row alone.
        ordered, order = torch.sort(block, dim=-1, stable=True)
        removed = ordered.softmax(dim=-1).cumsum(dim=-1) <= values
        removed[:, -1] = False
        ban_(block, removed.scatter(1, order, removed))


class MinP(_Warper):
    """Tokens go that are less likely than a share of the most likely one."""

    __slots__ = ()
    rank = 64

    @staticmethod
    def _warp(block: Tensor, values: Tensor) -> None:
        probs = block.softmax(dim=-1)
        ban_(block, probs < values * probs.amax(dim=-1, keepdim=True))


class TypicalP(_Warper):
    """Tokens stay whose surprise is closest to the entropy, up to a total mass.

    Source: Meister et al., "Locally typical sampling", TACL 2023, equation 8.
    """

    __slots__ = ()
    rank = 65

    @staticmethod
    def _warp(block: Tensor, values: Tensor) -> None:
        log_probs = block.log_softmax(dim=-1)
        terms = log_probs * log_probs.exp()
        # Row by row: the order of a sum over many columns depends on the number of rows of the tensor.
        entropy = torch.stack([-row.nansum(-1, keepdim=True) for row in terms.unbind()])  # [n, 1]
        surprise = (-log_probs - entropy).abs()
        distance, order = torch.sort(surprise, dim=-1, stable=True)
        mass = block.gather(-1, order).softmax(dim=-1).cumsum(dim=-1)
        last = (mass < values).sum(dim=1, keepdim=True).clamp_(max=block.shape[-1] - 1)
        ban_(block, surprise > distance.gather(1, last))


class EpsilonCutoff(_Warper):
    """Tokens go that are less likely than epsilon; the most likely one stays.

    Source: Hewitt et al., "Truncation sampling as language model desmoothing", 2022, section 3.1.
    """

    __slots__ = ()
    rank = 66

    @staticmethod
    def _warp(block: Tensor, values: Tensor) -> None:
        _cut_below(block, values)


class EtaCutoff(_Warper):
    """Tokens go that are less likely than min(epsilon, sqrt(epsilon) exp(-entropy)); the most likely one stays.

    Source: Hewitt et al. 2022, section 3.2.
    """

    __slots__ = ()
    rank = 67

    @staticmethod
    def _warp(block: Tensor, values: Tensor) -> None:
        entropy = torch.stack([_entropy(row) for row in block.unbind()])  # [n, 1]; row by row as in TypicalP
        _cut_below(block, torch.minimum(values, values.sqrt() * torch.exp(-entropy)))


class RemoveInvalid(_Warper):
    """NaN becomes 0, infinities the largest finite numbers."""

    __slots__ = ()
    rank = 40
    can_revive = True

    @staticmethod
    def _warp(block: Tensor, values: Tensor) -> None:
        torch.nan_to_num_(block, nan=0.0)


class Normalize(_Warper):
    """Scores become log-probabilities."""

    __slots__ = ()
    rank = 70

    @staticmethod
    def _warp(block: Tensor, values: Tensor) -> None:
        block.copy_(block.log_softmax(dim=-1))


def _cut_below(block: Tensor, threshold: Tensor) -> None:
    removed = block.softmax(dim=-1) < threshold
    removed &= block < block.amax(dim=-1, keepdim=True)
    ban_(block, removed)


def _entropy(row: Tensor) -> Tensor:
    """[1]: the entropy of one row [V], with the operations of ``torch.distributions.Categorical``."""
    logits = row - row.logsumexp(dim=-1, keepdim=True)
    terms = logits.clamp(min=torch.finfo(logits.dtype).min) * logits.softmax(dim=-1)
    return -terms.sum(-1, keepdim=True)
