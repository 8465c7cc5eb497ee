"""From a target to a drafter that learns online: with random weights, or those of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from specdec.drafters.eagle_files import read_files
from specdec.drafters.lm_loading import load_model
from specdec.errors import ConfigError, UnsupportedError
from specdec.online_training.counterfactual import CounterfactualEagle
from specdec.online_training.features import TargetFeatures
from specdec.online_training.module_learner import LearnerOptions, ModuleLearner
from specdec.online_training.train_eagle import EagleOptions
from specdec.online_training.train_lm import LmModule, LmOptions, first_layers
from specdec.online_training.train_loop import Trainer
from specdec.online_training.train_start import new_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["OnlinePlan", "build_learner"]


@dataclass(frozen=True, slots=True)
class OnlinePlan:
    """Which drafter learns.

    Args:
        kind: ``eagle3``, or ``lm``: a draft model of the target's first layers.
        init: a checkpoint to begin from; None: see ``start``.
        start: ``random``: every weight of an EAGLE head is random but its ``lm_head``, which is the target's;
            ``copying``: a head that copies, see ``specdec.online_training.train_start``. A draft model of ``random``
            weights keeps the target's embedding, last norm and head.
        layers: whose states a new head reads; None: 0, N // 2, N - 1.
        depth: levels that a head is unrolled in training.
        num_layers: of a new draft model.
        learner: how it learns.
        seed: of random weights.
    """

    kind: Literal["eagle3", "lm"] = "eagle3"
    init: Path | None = None
    start: Literal["random", "copying"] = "random"
    layers: tuple[int, ...] | None = None
    depth: int = 4
    num_layers: int = 1
    learner: LearnerOptions = field(default_factory=LearnerOptions)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("eagle3", "lm"):
            raise ConfigError(f"kind must be eagle3 or lm, got {self.kind!r}")
        if self.start not in ("random", "copying"):
            raise ConfigError(f"start must be random or copying, got {self.start!r}")


def build_learner(
    plan: OnlinePlan, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> ModuleLearner:
    """The learner, on the target's device.

    Raises:
        ConfigError: the plan does not fit the target.
        LoadError: the checkpoint cannot be read or does not fit the target.
        UnsupportedError: it is of a kind that does not learn.
    """
    options = plan.learner
    length = getattr(target.config.get_text_config(), "max_position_embeddings", None) or options.max_length
    options = replace(options, max_length=min(options.max_length, int(length)))
    num_layers = int(target.config.get_text_config().num_hidden_layers)
    if plan.kind == "lm":
        features = TargetFeatures(target, ())
        module = LmModule(_draft_model(plan, target), features, options=LmOptions(plan.depth), tokenizer=tokenizer)
        trainer = Trainer(module.to(target.device), features, ModuleLearner.plan(options))
        return ModuleLearner(trainer, kind="lm", last_layer=num_layers, options=options)
    head = _eagle(plan, target, num_layers)
    trainer = Trainer(head.to(target.device), head.features, ModuleLearner.plan(options))
    return ModuleLearner(trainer, kind="eagle", last_layer=num_layers, options=options)


def _draft_model(plan: OnlinePlan, target: PreTrainedModel) -> PreTrainedModel:
    if plan.init is not None:
        return load_model(plan.init, target)
    small = first_layers(target, plan.num_layers)
    if plan.start == "random":
        generator = torch.Generator().manual_seed(plan.seed)
        for name, weight in small.named_parameters():
            if ".layers." in name:
                weight.data.copy_(_drawn(weight, generator) if weight.ndim == 2 else torch.ones_like(weight))
    return small


def _eagle(plan: OnlinePlan, target: PreTrainedModel, num_layers: int) -> CounterfactualEagle:
    text = target.config.get_text_config()
    ids: Tensor | None = None
    if plan.init is not None:
        files = read_files(plan.init)
        if files.version != 3 or "embed_tokens.weight" in files.weights:
            raise UnsupportedError(f"{plan.init}: only EAGLE-3 heads that use the target's embedding learn online")
        config, ids = files.head_config(text), files.target_ids(int(text.vocab_size))
        weights = {name: weight for name, weight in files.weights.items() if name not in ("d2t", "t2d")}
    else:
        layers = plan.layers or (0, num_layers // 2, max(num_layers - 1, 0))
        if not all(0 <= layer <= num_layers for layer in layers):
            raise ConfigError(f"layers must be in 0..{num_layers}, got {layers}")
        config, weights = new_head(target, layers=layers, seed=plan.seed)
        if plan.start == "random":
            weights = _random(weights, plan.seed)
    features = TargetFeatures(target, config.hidden_layers)
    on_device = {name: weight.to(target.device) for name, weight in weights.items()}
    ids = None if ids is None else ids.to(target.device)
    return CounterfactualEagle(config, on_device, features, target_ids=ids, options=EagleOptions(plan.depth))


def _random(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """All matrices drawn anew but ``lm_head``, norms at 1; what is added to the residual stream is small at first."""
    generator = torch.Generator().manual_seed(seed)
    made = dict(weights)
    for name, weight in weights.items():
        if weight.ndim == 1:
            made[name] = torch.ones_like(weight)
        elif name != "lm_head.weight":
            is_added = name.endswith(("o_proj.weight", "down_proj.weight"))
            made[name] = _drawn(weight, generator) * (0.3 if is_added else 1.0)
    return made


def _drawn(weight: Tensor, generator: torch.Generator) -> Tensor:
    drawn: Tensor = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
    return drawn
