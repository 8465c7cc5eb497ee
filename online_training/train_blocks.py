"""Block-diffusion heads: DFlash (arXiv 2602.06036, section 4) and DSpark (arXiv 2607.05147, section 4).

From each text some answered tokens are drawn as anchors. A block behind an anchor sees the target's states strictly
before it and learns the target's laws of the tokens that follow, every guess given the text's own tokens before it
(only the Markov and the confidence head look at those). Guesses behind the first token without a weight teach nothing.

A confidence head learns the acceptance rate of the same laws, 1 - TV, or, for greedy decoding, whether their likeliest
tokens agree; neither carries a gradient, its own loss reaches the whole head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from specdec.drafters.block_training import block_labels, forward_blocks, teacher_forced
from specdec.drafters.diffusion_export import published_form
from specdec.drafters.diffusion_files import stacked_weights
from specdec.drafters.diffusion_head import DiffusionConfig, DiffusionHead
from specdec.drafters.target_vocabulary import embed_and_project
from specdec.errors import ConfigError
from specdec.online_training.data import TrainBatch
from specdec.online_training.features import TargetFeatures
from specdec.online_training.losses import (
    acceptance_rates,
    confidence_losses,
    decay_weights,
    dpace_weights,
    row_losses,
)
from specdec.online_training.train_export import write_checkpoint
from specdec.online_training.train_module import BatchSums, DraftModule, install_weights, prefix_lengths

__all__ = ["BlockModule", "BlockOptions", "ConfidenceOf", "SlotWeights"]

SlotWeights = Literal["decay", "dpace"]
ConfidenceOf = Literal["drawn", "likeliest"]


@dataclass(frozen=True, slots=True)
class BlockOptions:
    """How a block-diffusion head is trained.

    Args:
        mix: names and factors of ``specdec.online_training.losses``.
        num_anchors: most blocks of a text and step; 512 in the published trainings.
        slot_weights: how guesses of a block are weighed: ``decay`` (DFlash) or ``dpace`` (D-PACE).
        decay: rate of ``decay``: guess k, from 0, weighs exp(-k / decay).
        confidence: factor of the confidence head's loss.
        confidence_of: what it tells the chance of: that a token drawn from the guess's law is accepted (``drawn``, as
            published), or that its likeliest token is the target's (``likeliest``: greedy decoding).

    Raises:
        ConfigError: a field is outside its rule.
    """

    mix: Mapping[str, float] = field(default_factory=lambda: {"cross_entropy": 0.1, "total_variation": 1.8})
    num_anchors: int = 512
    slot_weights: SlotWeights = "decay"
    decay: float = 4.0
    confidence: float = 1.0
    confidence_of: ConfidenceOf = "drawn"

    def __post_init__(self) -> None:
        if self.num_anchors < 1 or not self.decay > 0 or self.confidence < 0:
            raise ConfigError(f"num_anchors must be >= 1, decay > 0 and confidence >= 0, got {self}")
        if self.slot_weights not in ("decay", "dpace"):
            raise ConfigError(f"slot_weights must be decay or dpace, got {self.slot_weights!r}")
        if self.confidence_of not in ("drawn", "likeliest"):
            raise ConfigError(f"confidence_of must be drawn or likeliest, got {self.confidence_of!r}")


class BlockModule(DraftModule):
    """A DFlash or DSpark head in training; embedding and ``lm_head`` are the target's and stay as they are.

    Args:
        config: its shape.
        weights: by their published names.
        features: of the target.
        options: of the training.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        weights: Mapping[str, Tensor],
        features: TargetFeatures,
        *,
        options: BlockOptions | None = None,
    ) -> None:
        super().__init__()
        self.config, self.features, self.options = config, features, options or BlockOptions()
        install_weights(self, dict(weights))
        embed, project = embed_and_project(features.target, {})
        self.head = DiffusionHead(
            config,
            self._stacked(),
            embed=lambda ids: embed(ids).float(),
            project=lambda outputs: project(outputs.to(self._target_dtype())),
            target_ids=None,
        )

    def forward(self, batch: TrainBatch) -> BatchSums:
        assert batch.states is not None, "states must be filled"
        assert batch.last is not None, "states must be filled"
        # Whatever wraps this module may have put other tensors in the parameters' places.
        self.head.weights = self._stacked()
        anchors, weights = self._blocks(batch)
        rows = self.head.guessing_rows(forward_blocks(self.head, batch.states, batch.token_ids, anchors))
        laws, confidences = teacher_forced(self.head, rows, batch.token_ids, anchors)
        counts = weights > 0  # [B, A, K]
        example, block, guess = counts.nonzero().unbind(1)
        student = laws[counts].float()
        teacher = self.features.teacher_logits(batch.last[example, anchors[example, block] + guess])
        labels = block_labels(self.config, batch.token_ids, anchors)[counts]
        losses = row_losses(student, teacher, self.options.mix, labels=labels)
        agrees = student.detach().argmax(-1) == teacher.argmax(-1)
        if confidences is not None and self.options.confidence:
            is_greedy = self.options.confidence_of == "likeliest"
            rates = agrees.float() if is_greedy else acceptance_rates(student, teacher)
            losses = losses + self.options.confidence * confidence_losses(confidences[counts], rates)
        shares = self._shares(weights, student, labels)[counts]
        found = torch.zeros_like(counts)
        found[counts] = agrees
        whole = counts.all(-1)
        return BatchSums(
            # Without any guess the sum must still lead back to the weights.
            loss=(losses * shares).sum() + 0.0 * rows.sum(),
            weight=shares.sum(),
            hits=(weights * found).sum((0, 1)),
            tried=weights.sum((0, 1)),
            accepted=prefix_lengths(found[whole]).sum().float(),
            starts=whole.sum().float(),
        )

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        half = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
        stacked = stacked_weights(half, self.config.num_layers)
        said, published = published_form(self.config, stacked, vocab_size=self.features.vocab_size)
        write_checkpoint(folder, {**said, "dtype": "bfloat16"}, published)

    def _stacked(self) -> dict[str, Tensor]:
        return stacked_weights(dict(self.named_parameters()), self.config.num_layers)

    def _target_dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.features.target.dtype
        return dtype

    def _blocks(self, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """Anchors [B, A] int64, ascending, and weights [B, A, K] of their guesses, 0 from the first that has none.

        Anchors are answered tokens before answered tokens; which ones follows from the batch's seed alone.
        """
        length, device = batch.token_ids.shape[1], batch.token_ids.device
        counts = batch.weights > 0
        fit = torch.zeros_like(counts)
        fit[:, 1:-1] = counts[:, 1:-1] & counts[:, 2:]
        most = max(1, min(self.options.num_anchors, int(fit.sum(1).max())))
        drawn = torch.rand(fit.shape, generator=torch.Generator().manual_seed(batch.seed)).to(device)
        chosen = torch.where(fit, drawn, -1.0).topk(most, dim=1)
        anchors, order = chosen.indices.sort(dim=1)
        places = anchors[..., None] + 1 + torch.arange(self.config.num_guesses, device=device)
        weights = batch.weights.gather(1, places.flatten(1).clamp_max(length - 1)).view(places.shape)
        is_anchor = chosen.values.gather(1, order) >= 0
        weights = weights * (places < length) * is_anchor[..., None]
        return anchors, weights * (weights > 0).cumprod(-1)

    def _shares(self, weights: Tensor, student: Tensor, labels: Tensor) -> Tensor:
        """[B, A, K]: what every guess counts for in the loss.

        Args:
            weights: [B, A, K], 0: not a guess.
            student: [N, V] logits of the N guesses.
            labels: [N] int64.
        """
        if self.options.slot_weights == "decay":
            return weights * decay_weights(weights.shape[-1], self.options.decay, device=weights.device)
        counts = weights > 0
        probs = torch.zeros_like(weights)
        chosen = student.detach().gather(1, labels[:, None])[:, 0]
        probs[counts] = torch.exp(chosen - student.detach().logsumexp(-1))
        return weights * dpace_weights(probs, counts=counts)
