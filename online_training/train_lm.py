"""Draft models: a small causal LM learns its target's law on its target's answers (DistillSpec, arXiv 2310.08461)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.errors import ConfigError, UnsupportedError
from specdec.online_training.data import TrainBatch
from specdec.online_training.features import TargetFeatures
from specdec.online_training.losses import row_losses
from specdec.online_training.train_module import BatchSums, DraftModule, prefix_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LmModule", "LmOptions", "first_layers"]


@dataclass(frozen=True, slots=True)
class LmOptions:
    """How a draft model is trained.

    Args:
        depth: K, drafted tokens that the simulated acceptance length looks ahead.
        mix: names and factors of ``specdec.online_training.losses``.
    """

    depth: int = 4
    mix: Mapping[str, float] = field(default_factory=lambda: {"forward_kl": 1.0})

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ConfigError(f"depth must be >= 1, got {self.depth}")


class LmModule(DraftModule):
    """A draft model in training.

    Args:
        model: any causal LM over the target's tokens; trained in float32.
        features: of the target.
        options: of the training.
        tokenizer: written beside the exported model; None: the reader must know that the tokens are the target's.

    Raises:
        UnsupportedError: the two have vocabularies of different sizes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        features: TargetFeatures,
        *,
        options: LmOptions | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        own = int(model.config.get_text_config().vocab_size)
        if own != features.vocab_size:
            raise UnsupportedError(f"the draft model has {own} tokens, the target {features.vocab_size}")
        self.model = model.float().requires_grad_(True)
        self.options = options or LmOptions()
        self._features, self._tokenizer = features, tokenizer

    def forward(self, batch: TrainBatch) -> BatchSums:
        assert batch.last is not None, "states must be filled"
        example, place = (batch.weights[:, 1:] > 0).nonzero().unbind(1)  # row t predicts token t + 1
        body: Any = self.model.base_model
        hidden = body(input_ids=batch.token_ids, use_cache=False).last_hidden_state[example, place]
        head: Any = self.model.get_output_embeddings()
        student = head(hidden).float()
        teacher = self._features.teacher_logits(batch.last[example, place])
        weights = batch.weights[example, place + 1]
        hits = student.detach().argmax(-1) == teacher.argmax(-1)
        runs = _windows(hits, batch, self.options.depth)
        return BatchSums(
            loss=(row_losses(student, teacher, self.options.mix) * weights).sum(),
            weight=weights.sum(),
            hits=(weights * hits).sum()[None],
            tried=weights.sum()[None],
            accepted=prefix_lengths(runs).sum().float(),
            starts=torch.tensor(float(len(runs)), device=hits.device),
        )

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        config = type(self.model.config)(**{**self.model.config.to_dict(), "dtype": "bfloat16"})
        copy: Any = type(self.model)(config).to(torch.bfloat16)
        own = {
            name.removeprefix(
                "model.",
            ): weight
            for name, weight in weights.items()
        }
        copy.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in own.items()}, strict=False)
        copy.generation_config = self.model.generation_config
        copy.save_pretrained(folder)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)


def _windows(hits: Tensor, batch: TrainBatch, depth: int) -> Tensor:
    """[N, depth]: for every place whose next ``depth`` tokens all count, whether each of them was guessed."""
    table = torch.zeros_like(batch.weights, dtype=torch.bool)
    counts = batch.weights[:, 1:] > 0
    table[:, :-1][counts] = hits
    if table.shape[1] - 1 < depth:
        return hits.new_zeros(0, depth)
    windows, whole = table[:, :-1].unfold(1, depth, 1), counts.unfold(1, depth, 1).all(-1)
    return windows[whole]


def first_layers(target: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A model of the target's first layers, with its embedding, last norm and head: the start of a small draft model.

    Raises:
        ConfigError: the target has no such number of layers.
    """
    most = int(target.config.get_text_config().num_hidden_layers)
    if not 1 <= num_layers <= most:
        raise ConfigError(f"a draft model can take 1 to {most} layers of this target, got {num_layers}")
    values = {**target.config.to_dict(), "num_hidden_layers": num_layers}
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:num_layers]
    small: Any = type(target)(type(target.config)(**values)).to(target.dtype)
    names = small.state_dict().keys()
    small.load_state_dict({name: value for name, value in target.state_dict().items() if name in names})
    small.generation_config = target.generation_config
    return small
