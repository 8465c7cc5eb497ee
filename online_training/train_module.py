"""What every drafter in training offers to the loop, and the sums that its metrics are made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from specdec.online_training.data import TrainBatch

__all__ = ["BatchSums", "DraftModule", "install_weights", "prefix_lengths"]


@dataclass(frozen=True, slots=True, eq=False)
class BatchSums:
    """Sums over the rows of a batch: means are made over all micro-batches and devices of a step.

    Args:
        loss: scalar; its gradient is what the step follows.
        weight: scalar, what the loss is divided by.
        hits: [K], how often the drafter's likeliest token was the target's, by depth; weighted.
        tried: [K], the weights of those rows.
        accepted: scalar: over all starts, how many tokens of a greedy draft would have been accepted.
        starts: scalar: starts whose whole draft could be judged.
    """

    loss: Tensor
    weight: Tensor
    hits: Tensor
    tried: Tensor
    accepted: Tensor
    starts: Tensor


class DraftModule(nn.Module, ABC):
    """A drafter in training: its parameters, its loss and its checkpoint.

    ``forward`` takes a batch whose states are filled, and returns ``BatchSums``.
    """

    @abstractmethod
    def forward(self, batch: TrainBatch) -> BatchSums:
        """Loss and metrics of one batch."""

    @abstractmethod
    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write ``weights`` (by parameter name, on the CPU) as a checkpoint that loads as a drafter."""


def install_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Make every tensor a trainable float32 parameter under its dotted name, in nested modules."""
    for name, weight in weights.items():
        *parents, leaf = name.split(".")
        place = module
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.register_parameter(leaf, nn.Parameter(weight.detach().float().clone()))


def prefix_lengths(hits: Tensor) -> Tensor:
    """[N]: how many leading entries of each row [N, K] of booleans are true: accepted tokens of a greedy draft."""
    return hits.to(torch.int64).cumprod(dim=1).sum(dim=1)
