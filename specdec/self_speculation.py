"""Lossless self-speculation of a masked diffusion LM: the same text as unmasking one token per pass, in fewer passes.

Stepwise decoding fills, in each step, the mask whose best token is the most probable. One pass tells not only that
choice but, by the same order, a guess of the next ones. The next pass takes all states along the guess at once, a batch
of texts with one, two, ... of the guessed tokens filled in; each state's own choice is then known, and as far as the
choices are the guessed ones they are kept (after Gao et al. 2025, arXiv 2510.04147, with a chain as the hierarchy).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specdec.drafters.masked_lm import MaskedLm
from specdec.errors import ConfigError

__all__ = ["SelfSpeculation", "SelfSpeculationOutput"]


@dataclass(frozen=True, slots=True)
class SelfSpeculationOutput:
    """New tokens and how many passes they took.

    Args:
        token_ids: what was written, without the prompt.
        num_passes: batched passes of the model; one per token without speculation.
        lossless: the text is that of stepwise decoding, up to near-ties of the batched arithmetic.
    """

    token_ids: list[int]
    num_passes: int
    lossless: Literal[True] = True


class SelfSpeculation:
    """Greedy decoding of a masked LM in order of confidence, block after block.

    Args:
        model: the masked LM.
        length: tokens guessed ahead per pass, and so the batch less one; 0: stepwise decoding.
        block: masks that stand behind the text at a time.

    Raises:
        ConfigError: an option is outside its rule.
    """

    lossless: Literal[True] = True

    def __init__(self, model: MaskedLm, *, length: int = 4, block: int = 32) -> None:
        for name, value, least in (("length", length, 0), ("block", block, 1)):
            if value < least:
                raise ConfigError(f"{name} must be >= {least}, got {value}")
        self._model, self._length, self._block = model, length, block

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], num_new_tokens: int) -> SelfSpeculationOutput:
        """Write ``num_new_tokens`` tokens behind a prompt of one or more."""
        text, num_passes = [int(token) for token in prompt_ids], 0
        end = len(text) + num_new_tokens
        while len(text) < end:
            first, num = len(text), min(self._block, end - len(text))
            ids = self._model.masked(text, num)[0]
            guess: list[tuple[int, int]] = []  # (place, token) of the next steps
            while bool((ids[first:] == self._model.mask_token_id).any()):
                ids, guess = self._pass(ids, first, num, guess)
                num_passes += 1
            text = ids.tolist()
        return SelfSpeculationOutput(text[len(prompt_ids) :], num_passes)

    def _pass(
        self, ids: Tensor, first: int, num: int, guess: list[tuple[int, int]]
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Check a guess in one batched pass; the text with all steps that are certain now, and the next guess."""
        states = ids.repeat(len(guess) + 1, 1)
        for step, (place, token) in enumerate(guess):
            states[step + 1 :, place] = token
        laws = self._model.guesses(states, first, num).log_softmax(dim=-1)
        for step in range(len(guess) + 1):
            order = _in_order(laws[step], states[step, first:] == self._model.mask_token_id, first)
            if not order:
                return states[step], []
            if step == len(guess) or order[0] != guess[step]:
                break
        found = states[step].clone()
        found[order[0][0]] = order[0][1]
        return found, order[1 : 1 + self._length]


def _in_order(laws: Tensor, is_masked: Tensor, first: int) -> list[tuple[int, int]]:
    """(place, token) of all masks by the probability of their best token, the most probable first."""
    best = laws.max(dim=-1)
    scores = torch.where(is_masked, best.values, -torch.inf)
    ranked = scores.argsort(descending=True, stable=True)[: int(is_masked.sum())]
    return [(first + int(place), int(best.indices[place])) for place in ranked]
