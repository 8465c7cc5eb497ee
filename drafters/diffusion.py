"""Drafts with a block-diffusion head: one denoising pass per step gives a chain or a tree (DFlash, DSpark, DDTree).

Under the match rule a guess is chosen with the target's own noise at its place, as draft models choose theirs, so that
head and target choose the same token as often as their laws allow. Under a rejection rule the chain is drawn honestly,
token after token, and states its laws.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.drafters.block_guesses import BlockGuesses, Chains, Choose
from specdec.drafters.block_length import FixedLength, LengthRule
from specdec.drafters.block_scorer import BlockScorer
from specdec.drafters.diffusion_head import DiffusionHead
from specdec.drafters.draws import draft_laws, draw_children
from specdec.drafters.levels import best_children
from specdec.drafters.tree_search import SearchLimits, TreeSearch
from specdec.errors import ConfigError, UnsupportedError
from specdec.protocols import DrafterNeeds, Draws
from specdec.types import DraftTree, RequestState, StepEvent

__all__ = ["DiffusionDrafter"]


class DiffusionDrafter:
    """Drafts with a DFlash or DSpark head (`specdec.protocols.Drafter`).

    Args:
        head: its weights and arithmetic.
        vocab_size: of the target.
        rule: how much of a block is sent.
        top_k: children per node; 1: a chain. From 2 on the tree is the best one within the budget (OPT-Tree's rule,
            arXiv 2406.17276), of the likeliest ``top_k`` tokens per node, as deep as ``rule`` says.
        draws: draw an honest chain for a rejection rule; None: for match.
        kv_tokens: rows that the head's cache holds over all requests.
        max_requests: most requests at a time.

    Raises:
        ConfigError: an option is outside its rule.
        UnsupportedError: a rejection rule, and a length rule or a tree that it cannot judge.
    """

    def __init__(
        self,
        head: DiffusionHead,
        *,
        vocab_size: int,
        rule: LengthRule | None = None,
        top_k: int = 1,
        draws: Draws | None = None,
        kv_tokens: int = 65_536,
        max_requests: int = 64,
    ) -> None:
        for name, value in (("top_k", top_k), ("kv_tokens", kv_tokens), ("max_requests", max_requests)):
            if value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        self.rule = rule or FixedLength()
        if draws is not None and self.rule.anticipates:
            raise UnsupportedError(
                f"{type(self.rule).__name__} decides on a token with a look at it or at later ones, so that only the "
                "match rule keeps the target's law"
            )
        if draws is not None and top_k > 1:
            raise UnsupportedError("trees of a diffusion head are chosen, not drawn: they need the match rule")
        self.head = head
        self.needs = DrafterNeeds(
            hidden_layers=head.config.hidden_layers, needs_match=self.rule.anticipates or top_k > 1, draws=draws
        )
        self._vocab_size, self._top_k, self._draws = vocab_size, top_k, draws
        self._scorer = BlockScorer(head, kv_tokens=kv_tokens, max_requests=max_requests)

    @property
    def num_used(self) -> int:
        """Cache slots taken; 0 when no request is held."""
        return self._scorer.num_used

    def start(self, states: Sequence[RequestState]) -> None:
        """Nothing: a prompt is read when the target has."""

    @torch.inference_mode()
    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = [DraftTree.root_only(int(state.token_ids[-1])) for state in states]
        served = self._scorer.read(states, budgets)
        rows = self._scorer.guess([states[row] for row in served])
        served = served[: len(rows)]
        if served:
            guessed = self._guess([states[row] for row in served], [budgets[row] for row in served], rows)
            for row, tree in zip(served, guessed, strict=True):
                trees[row] = tree
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        self.rule.observe(events)

    def stop(self, request_ids: Sequence[str]) -> None:
        self._scorer.release(request_ids)
        self.rule.stop(request_ids)

    def _guess(self, states: Sequence[RequestState], budgets: Sequence[int], rows: Tensor) -> list[DraftTree]:
        guesses = BlockGuesses(self.head, states, rows, self._vocab_size, mix=self.rule.mix)
        chains = guesses.chains(_by_noise(states) if self._draws is None else _by_draw(states, self._draws))
        lengths = [
            min(length, budget) for length, budget in zip(self.rule.lengths(states, chains), budgets, strict=True)
        ]
        if self._top_k == 1:
            return [self._chain(row, state, chains, lengths[row]) for row, state in enumerate(states)]
        # A root without room for a draft still needs a search, which must stay empty.
        searches = [
            TreeSearch(int(state.token_ids[-1]), budget if length else 0, SearchLimits(self._top_k, budget, length))
            for state, budget, length in zip(states, budgets, lengths, strict=True)
        ]
        return guesses.trees(searches, self._top_k)

    def _chain(self, row: int, state: RequestState, chains: Chains, length: int) -> DraftTree:
        tree = DraftTree.chain(int(state.token_ids[-1]), chains.token_ids[row, :length].astype(np.int32))
        tree.values = np.concatenate([[1.0], chains.values[row, :length].cumprod()]).astype(np.float32)
        if self._draws is not None:
            laws = [draft_laws(law[row : row + 1], state.request.sampling)[0].cpu() for law in chains.laws[:length]]
            tree.draft_probs = torch.stack([*laws, torch.zeros(self._vocab_size, dtype=torch.float64)])
        return tree


def _by_noise(states: Sequence[RequestState]) -> Choose:
    """What the target would choose with these scores: its noise is known."""

    def choose(logits: Tensor, depth: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        ids, log_probs = best_children(logits, states, [depth] * len(states), 1)
        return ids[:, 0], np.exp(log_probs[:, 0])

    return choose


def _by_draw(states: Sequence[RequestState], draws: Draws) -> Choose:
    """An honest draw from the law, with noise of the drafter's own."""

    def choose(logits: Tensor, depth: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        ids, chances = [], []
        for state, row in zip(states, logits, strict=True):
            law = draft_laws(row[None], state.request.sampling)[0]
            key = {"seed": state.request.sampling.seed, "position": state.num_tokens, "node": depth - 1}
            ids += draw_children(law, 1, draws=draws, **key)
            chances.append(float(law[ids[-1]]))
        return np.array(ids, dtype=np.int64), np.array(chances)

    return choose
