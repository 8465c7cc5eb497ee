"""How tokens are chosen in a check, once for the engine and once, on its own, by transformers' processors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.rng import gumbel
from specdec.types import SamplingParams

__all__ = ["GREEDY", "LAWS", "SAMPLED", "Setting"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One way of choosing tokens; the fields mean what they mean in ``SamplingParams``."""

    name: str
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def sampling(self, *, seed: int, max_new_tokens: int, stop_token_ids: tuple[int, ...]) -> SamplingParams:
        """What the engine is asked for."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=max_new_tokens,
            stop_token_ids=stop_token_ids,
            seed=seed,
        )

    def scores(self, prefix_ids: Tensor, logits: Tensor) -> Tensor:
        """[R, V] float32: logits [R, V] after transformers' own processors, in its order; prefixes are [R, S] int64."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        scores: Tensor = processors(prefix_ids, logits.to(torch.float32, copy=True))
        return scores

    def keyed_scores(self, prefix_ids: Tensor, logits: Tensor, *, seed: int) -> Tensor:
        """[V] float32: scores whose argmax is the token after ``prefix_ids`` [S], from its logits [V]."""
        scores = self.scores(prefix_ids[None], logits[None])[0]
        if self.temperature == 0:
            return scores
        noise = gumbel([seed], [len(prefix_ids)], len(scores), device=scores.device)[0]
        return scores + noise


GREEDY: Final = Setting("greedy", temperature=0.0)
SAMPLED: Final = (
    Setting("temperature 1", temperature=1.0),
    Setting(
        "temperature 0.7, top-k 50, top-p 0.9, repetition penalty 1.1",
        temperature=0.7,
        top_k=50,
        top_p=0.9,
        repetition_penalty=1.1,
    ),
)
# For comparing laws. The second has at most 8 tokens per position, so that also a model without preferences has
# continuations that come often enough to be counted.
LAWS: Final = (
    SAMPLED[0],
    Setting(
        "temperature 0.9, top-k 8, top-p 0.95, repetition penalty 1.1",
        temperature=0.9,
        top_k=8,
        top_p=0.95,
        repetition_penalty=1.1,
    ),
)
