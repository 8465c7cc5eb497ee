"""Drafters that learn from served requests, with whatever loss their module has.

The objective over the positions of a request, with p the target's law and q the drafter's:

    sum_i W_i KL(p_i || q_i) / sum_i W_i  +  counterfactual * mean over D of KL_top(p || q)

Accepted and first-rejected positions both have the true text before them; W_i is 1, and 1 + ``rejected_weight`` where a
draft token was rejected first (after OSD, Liu et al. 2023, arXiv 2310.07177, which learns there alone). D are the draft
tokens behind a rejection: their context holds a wrong token, so only laws that were kept when they were verified can
teach there (Aurora's discard term, arXiv 2602.06932). A confidence head's loss belongs to its module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.errors import ConfigError
from specdec.online_training.counterfactual import CounterfactualEagle, branches_of
from specdec.online_training.data import TrainBatch
from specdec.online_training.learner import LearnReport
from specdec.online_training.records import TraceRecord
from specdec.online_training.train_loop import Trainer, TrainPlan
from specdec.online_training.train_module import DraftModule
from specdec.online_training.version_weights import read_weights
from specdec.readings import HiddenStates

__all__ = ["LearnerOptions", "ModuleLearner", "batch_of"]


@dataclass(frozen=True, slots=True)
class LearnerOptions:
    """How a drafter learns online.

    Args:
        learning_rate: of AdamW, constant; 1e-5 to go on from a trained drafter, 1e-4 and more from random weights.
        muon_lr: above 0: hidden matrices learn by Muon at this rate, the rest by AdamW.
        clip: largest norm of the gradient.
        ema: decay of the mean of weights that is published.
        rejected_weight: beta: how much more a first-rejected position counts.
        counterfactual: lambda: factor of the rows behind a rejection; 0: off.
        max_length: tokens of a request that are read, the last ones.
        prompt_weight: of positions in the prompt; the target's law is known there too.
    """

    learning_rate: float = 1e-4
    muon_lr: float = 0.0
    clip: float = 0.5
    ema: float = 0.999
    rejected_weight: float = 1.0
    counterfactual: float = 0.0
    max_length: int = 2048
    prompt_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.ema < 1 or self.max_length < 4:
            raise ConfigError(f"ema must be in [0, 1) and max_length >= 4, got {self.ema} and {self.max_length}")
        for name in ("rejected_weight", "counterfactual", "prompt_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be >= 0, got {getattr(self, name)}")


def batch_of(
    records: Sequence[TraceRecord], options: LearnerOptions, layers: tuple[int, ...], last_layer: int
) -> TrainBatch:
    """Requests as a batch: weights by what became of each position, states where all of them were kept.

    Args:
        records: at least one.
        options: see ``LearnerOptions``.
        layers: whose states the drafter reads.
        last_layer: the one that the target's head reads.
    """
    cuts = [_cut(record, options.max_length, (*layers, last_layer)) for record in records]
    width = max(len(cut.token_ids) for cut in cuts)
    token_ids, weights = torch.zeros(len(cuts), width, dtype=torch.int64), torch.zeros(len(cuts), width)
    for row, (record, cut) in enumerate(zip(records, cuts, strict=True)):
        length = len(cut.token_ids)
        token_ids[row, :length] = torch.from_numpy(cut.token_ids.astype(np.int64))
        table = np.full(cut.start + length, options.prompt_weight, dtype=np.float32)
        table[record.num_prompt_tokens :] = 1.0
        rejected = record.rounds.first_rejected
        table[rejected[rejected < len(table)]] *= 1.0 + options.rejected_weight
        weights[row, :length] = torch.from_numpy(table[cut.start :] / record.inclusion)
    if any(cut.states is None for cut in cuts):
        return TrainBatch(token_ids, weights)
    found = [cut.states for cut in cuts if cut.states is not None]
    size = found[0].shape[1] // (len(layers) + 1)
    states = torch.zeros(len(cuts), width, found[0].shape[1])
    for row, rows in enumerate(found):
        states[row, : len(rows)] = rows[:width].float()
    return TrainBatch(token_ids, weights, states[..., :-size] if layers else None, states[..., -size:])


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    """The part of a request that is read: from ``start`` on, with states if they cover it."""

    start: int
    token_ids: Any
    states: Tensor | None


def _cut(record: TraceRecord, max_length: int, layers: tuple[int, ...]) -> _Cut:
    start, text, features = max(0, len(record.token_ids) - max_length), record.token_ids, record.features
    if features is None or not set(layers) <= set(features.layers):
        return _Cut(start, text[start:], None)
    first = max(start, features.start)
    rows = HiddenStates(features.layers, features.tensors["aux_hidden"]).of(layers)[first - features.start :]
    # The last token's state is never cached; nothing that is taught reads it.
    return _Cut(first, text[first : first + len(rows) + 1], rows)


class ModuleLearner:
    """A ``DraftModule`` that learns request by request, and the moving mean of its weights.

    Args:
        module: in training, with ``features`` of its target.
        trainer: steps it.
        kind: how its exports are loaded.
        options: see ``LearnerOptions``.
        last_layer: index of the target's last states.
    """

    def __init__(self, trainer: Trainer, *, kind: str, last_layer: int, options: LearnerOptions | None = None) -> None:
        self.kind, self.options, self._trainer = kind, options or LearnerOptions(), trainer
        self._module: DraftModule = trainer.module
        self._last_layer = last_layer
        self._ema = trainer.weights()
        self._num_averaged = 0

    @staticmethod
    def plan(options: LearnerOptions) -> TrainPlan:
        """The trainer's plan: a constant rate without end."""
        return TrainPlan(
            total_steps=2**31,
            learning_rate=options.learning_rate,
            schedule="constant",
            warmup=0.0,
            clip=options.clip,
            muon_lr=options.muon_lr,
        )

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self._trainer.step

    def learn(self, records: Sequence[TraceRecord]) -> LearnReport:
        batch = batch_of(records, self.options, self._trainer.features.layers, self._last_layer)
        self._teach_counterfactuals(records)
        report = self._trainer.train_step([batch])
        self._average()
        return LearnReport(report.loss, report.acceptance_length, int((batch.weights > 0).sum()))

    def judge(self, records: Sequence[TraceRecord], weights: Mapping[str, Tensor] | None = None) -> float:
        own = self._trainer.weights()
        self._put(weights or self._ema)
        try:
            plain = LearnerOptions(rejected_weight=0.0, max_length=self.options.max_length)
            batches = [batch_of([record], plain, self._trainer.features.layers, self._last_layer) for record in records]
            return self._trainer.evaluate(batches).acceptance_length
        finally:
            self._put(own)

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in self._ema.items()}

    def export(self, folder: Path) -> None:
        self._module.export(self.weights(), folder)

    def reset(self, folder: Path, *, rate: float) -> None:
        read = {name: weight.float() for name, weight in read_weights(self.kind, folder).items()}
        own = self._trainer.weights()
        prefix = "model." if self.kind == "lm" else ""
        self._put({name: read.get(name, read.get(name.removeprefix(prefix), own[name])) for name in own})
        plan, step = self._trainer.plan, self._trainer.step
        slower = replace(plan, learning_rate=plan.learning_rate * rate, muon_lr=plan.muon_lr * rate)
        self._trainer = Trainer(self._module, self._trainer.features, slower)  # its moments were of other weights
        self._trainer.step = step
        self._ema, self._num_averaged = self._trainer.weights(), 0

    def state(self) -> dict[str, Any]:
        return {"trainer": self._trainer.state(), "ema": self._ema, "num_averaged": self._num_averaged}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._trainer.load_state(state["trainer"])
        self._ema = {name: weight.clone() for name, weight in state["ema"].items()}
        self._num_averaged = int(state["num_averaged"])

    def _average(self) -> None:
        """The mean follows fast at first: random weights must not weigh on it for a thousand steps."""
        self._num_averaged += 1
        decay = min(self.options.ema, self._num_averaged / (self._num_averaged + 10))
        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                self._ema[name].lerp_(parameter.detach().float().cpu(), 1 - decay)

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._module.named_parameters():
                parameter.copy_(weights[name])

    def _teach_counterfactuals(self, records: Sequence[TraceRecord]) -> None:
        """Hand the rows behind rejections to a module that can learn from them."""
        if isinstance(self._module, CounterfactualEagle) and self.options.counterfactual:
            wanted = (*self._trainer.features.layers, self._last_layer)
            starts = [_cut(record, self.options.max_length, wanted).start for record in records]
            self._module.factor, self._module.branches = self.options.counterfactual, branches_of(records, starts)
