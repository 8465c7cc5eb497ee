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

from specdec.drafters.block_choice import chain_tree, chooser
from specdec.drafters.block_guesses import BlockGuesses
from specdec.drafters.block_length import FixedLength, LengthRule
from specdec.drafters.block_scorer import BlockScorer
from specdec.drafters.calibration import CalibrationLog, Temperatures
from specdec.drafters.diffusion_head import DiffusionHead
from specdec.drafters.tree_search import SearchLimits, TreeSearch
from specdec.errors import ConfigError, UnsupportedError
from specdec.kernels.launch import Backend
from specdec.protocols import DrafterNeeds, Draws
from specdec.types import DraftTree, RequestState, StepEvent

__all__ = ["DiffusionDrafter"]


class DiffusionDrafter:
    """Drafts with a DFlash or DSpark head (`specdec.protocols.Drafter`).

    Args:
        head: its weights and arithmetic.
        vocab_size: of the target.
        rule: how much of a block is sent.
        temperatures: that make the head's confidences true.
        top_k: children per node; 1: a chain. From 2 on the tree is the best one within the budget (OPT-Tree's rule,
            arXiv 2406.17276), of the likeliest ``top_k`` tokens per node, as deep as ``rule`` says.
        draws: draw an honest chain for a rejection rule; None: for match.
        kv_tokens: rows that the head's cache holds over all requests.
        max_requests: most requests at a time.
        kernels: who attends; see ``BlockScorer``.
        graphs: likewise.

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
        temperatures: Temperatures | None = None,
        top_k: int = 1,
        draws: Draws | None = None,
        kv_tokens: int = 65_536,
        max_requests: int = 64,
        kernels: Backend = "auto",
        graphs: bool = True,
    ) -> None:
        for name, value in (("top_k", top_k), ("kv_tokens", kv_tokens), ("max_requests", max_requests)):
            if value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        self.rule = rule or FixedLength()
        if self.rule.mix and head.config.markov == "none":
            raise ConfigError("the length rule apd compares a Markov head with its absence; this head has none")
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
        self._temperatures = temperatures or Temperatures()
        self.log: CalibrationLog | None = None  # set one to collect rounds for ``Temperatures``
        self._confidences: dict[str, npt.NDArray[np.float64]] = {}  # of the newest drafts, for the log
        self._scorer = BlockScorer(head, kv_tokens=kv_tokens, max_requests=max_requests, kernels=kernels, graphs=graphs)

    @property
    def num_used(self) -> int:
        """Cache slots taken; 0 when no request is held."""
        return self._scorer.num_used

    def start(self, states: Sequence[RequestState]) -> None:
        """Nothing: a prompt is read when the target has."""

    @torch.inference_mode()
    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = [DraftTree.root_only(int(state.token_ids[-1])) for state in states]
        wanted = [budget * may for budget, may in zip(budgets, self.rule.may_draft(states), strict=True)]
        served = self._scorer.read(states, wanted)
        if not served:
            return trees
        rows = self._scorer.guess([states[row] for row in served])
        served = served[: len(rows)]
        if served:
            guessed = self._guess([states[row] for row in served], [budgets[row] for row in served], rows)
            for row, tree in zip(served, guessed, strict=True):
                trees[row] = tree
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        self.rule.observe(events)
        for event in events:
            logits = self._confidences.pop(event.state.request_id, None)
            if self.log is not None and logits is not None and event.tree.num_draft_tokens:
                self.log.add(logits, event.tree.num_draft_tokens, event.result.num_accepted)

    def stop(self, request_ids: Sequence[str]) -> None:
        self._scorer.release(request_ids)
        self.rule.stop(request_ids)
        for request_id in request_ids:
            self._confidences.pop(request_id, None)

    def _guess(self, states: Sequence[RequestState], budgets: Sequence[int], rows: Tensor) -> list[DraftTree]:
        guesses = BlockGuesses(self.head, states, rows, self._vocab_size, mix=self.rule.mix)
        chains = guesses.chains(chooser(states, self._draws))
        chances = self._temperatures.chances(chains.confidences)
        wanted = self.rule.lengths(states, chains, chances)
        lengths = [min(length, budget) for length, budget in zip(wanted, budgets, strict=True)]
        if self.log is not None and self._top_k == 1:
            self._confidences = dict(zip((state.request_id for state in states), chains.confidences, strict=True))
        if self._top_k == 1:
            return [chain_tree(row, state, chains, lengths[row], self._draws) for row, state in enumerate(states)]
        # A root without room for a draft still needs a search, which must stay empty.
        searches = [
            TreeSearch(int(state.token_ids[-1]), budget if length else 0, SearchLimits(self._top_k, budget, length))
            for state, budget, length in zip(states, budgets, lengths, strict=True)
        ]
        return guesses.trees(searches, self._top_k)
