"""Drafts with an off-the-shelf masked diffusion LM: a block of masks behind the text, unmasked in one pass.

No training, no states of the target: the model only has to share the target's tokens. With the chunk rule it goes on,
chunk after chunk, while it is sure (FailFast, arXiv 2512.20573); with any other rule it guesses one block. Requests are
read one by one and anew in each step: models of this kind have no cache that stays right when text is added.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.block_choice import chain_tree, chooser
from specdec.drafters.block_guesses import Chains, Choose
from specdec.drafters.block_length import Chances, ChunkLength, LengthRule
from specdec.drafters.masked_lm import MaskedLm
from specdec.drafters.token_map import TokenMap
from specdec.errors import ConfigError, UnsupportedError
from specdec.protocols import DrafterNeeds, Draws
from specdec.types import DraftTree, RequestState, StepEvent

__all__ = ["MaskedLmDrafter"]


class MaskedLmDrafter:
    """Chains from a masked LM (`specdec.protocols.Drafter`).

    Args:
        model: guesses masks.
        tokens: which of its tokens are which of the target's.
        rule: how much is sent; ``ChunkLength`` also says how far it guesses on.
        block: masks of a pass; with the chunk rule its ``size``.
        max_length: longest text that the model reads.
        draws: draw honestly for a rejection rule; None: for match.

    Raises:
        ConfigError: an option is outside its rule.
        UnsupportedError: a rejection rule and a length rule that anticipates.
    """

    def __init__(
        self,
        model: MaskedLm,
        tokens: TokenMap,
        *,
        rule: LengthRule,
        block: int = 10,
        max_length: int = 2048,
        draws: Draws | None = None,
    ) -> None:
        for name, value in (("block", block), ("max_length", max_length)):
            if value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if rule.mix:
            raise ConfigError("the length rule apd compares a Markov head with its absence; a masked LM has none")
        if draws is not None and rule.anticipates:
            raise UnsupportedError(
                f"{type(rule).__name__} decides on a token with a look at it or at later ones, so that only the match "
                "rule keeps the target's law"
            )
        self.needs = DrafterNeeds(needs_match=rule.anticipates, draws=draws)
        self._model, self._tokens, self.rule, self._draws = model, tokens, rule, draws
        self._block = rule.size if isinstance(rule, ChunkLength) else block
        self._max_length = max_length

    def start(self, states: Sequence[RequestState]) -> None:
        """Nothing is held of a request."""

    @torch.inference_mode()
    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        return [
            self._propose(state, budget * self.rule.may_draft([state])[0])
            for state, budget in zip(states, budgets, strict=True)
        ]

    def observe(self, events: Sequence[StepEvent]) -> None:
        self.rule.observe(events)

    def stop(self, request_ids: Sequence[str]) -> None:
        self.rule.stop(request_ids)

    def _propose(self, state: RequestState, budget: int) -> DraftTree:
        text = self._tokens.own(state.token_ids)
        room = min(budget, self._max_length - state.num_tokens)
        if text is None or room < 1:
            return DraftTree.root_only(int(state.token_ids[-1]))
        chains = self._guess(state, text, room)
        length = self.rule.lengths([state], chains, _chances(chains))[0]
        return chain_tree(0, state, chains, min(length, room), self._draws)

    def _guess(self, state: RequestState, text: list[int], room: int) -> Chains:
        """One pass, or as many as the chunk rule wants."""
        chains: Chains | None = None
        choose = chooser([state], self._draws)
        most = min(room, self.rule.most) if isinstance(self.rule, ChunkLength) else min(room, self._block)
        while True:
            done = 0 if chains is None else chains.token_ids.shape[1]
            count = min(self._block, most - done)
            drafted = [] if chains is None else self._tokens.own_ids[chains.token_ids[0]].tolist()
            ids = self._model.masked([*text, *drafted], count)
            laws = self._tokens.over_target(self._model.guesses(ids, len(text) + done, count)[0])
            new = _chosen(laws, choose, done)
            chains = new if chains is None else _joined(chains, new)
            is_sure = isinstance(self.rule, ChunkLength) and self.rule.likely(_chances(new)) == [count]
            if not is_sure or done + count >= most:
                return chains


def _chances(chains: Chains) -> Chances:
    """[1, K]: the laws' largest probabilities."""
    return np.asarray(1.0 / (1.0 + np.exp(-chains.confidences)))


def _chosen(laws: Tensor, choose: Choose, done: int) -> Chains:
    """A token from each of the independent laws [K, V] of places ``done + 1`` on."""
    chosen = [choose(law[None], done + k + 1) for k, law in enumerate(laws)]
    largest = (laws.max(dim=-1).values - laws.logsumexp(dim=-1)).double().exp()
    return Chains(
        np.stack([ids for ids, _ in chosen], axis=1),
        np.stack([values for _, values in chosen], axis=1),
        torch.logit(largest, eps=1e-6)[None].cpu().numpy(),
        np.ones((1, len(laws)), dtype=np.bool_),
        [law[None] for law in laws],
    )


def _joined(first: Chains, second: Chains) -> Chains:
    return Chains(
        np.concatenate((first.token_ids, second.token_ids), axis=1),
        np.concatenate((first.values, second.values), axis=1),
        np.concatenate((first.confidences, second.confidences), axis=1),
        np.concatenate((first.agrees, second.agrees), axis=1),
        [*first.laws, *second.laws],
    )
