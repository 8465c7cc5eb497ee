"""A smaller language model guesses: chains and trees, all requests of a batch together, level by level.

Under the match rule the draft is not drawn at random: where the target will add noise keyed by (seed, position) to its
scores, the drafter adds the same noise to its own, so both choose the same token wherever their laws agree well enough
(Gumbel coupling; Daliri et al. 2024, arXiv 2408.07978). Children are then the best of the noisy scores, and a node's
value is their softmax. At temperature 0 the noise is absent.

Under a rejection rule (``draws``) it draws honestly, in a shape fixed before the first draw, and states its laws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.draft_costs import DraftCosts
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.draws import draft_laws, draw_children
from specdec.drafters.growing import Growth
from specdec.drafters.levels import search_trees
from specdec.drafters.tree_search import SearchLimits, TreeSearch
from specdec.errors import ConfigError, InternalError
from specdec.protocols import DrafterNeeds, Draws
from specdec.types import DraftTree, RequestState, StepEvent

__all__ = ["LmDrafter"]


class LmDrafter:
    """Drafts with a causal LM that shares the target's tokenizer (`specdec.protocols.Drafter`).

    Args:
        model: holds the draft model's cache.
        vocab_size: of the target; draft tokens stay below it.
        top_k: children per node, >= 1; 1 with ``width`` 1 is a chain.
        width: nodes expanded per level, >= 1.
        depth: longest path, >= 1; the budget limits the number of nodes.
        min_gain: stop growing once a level adds no more than this to the expected acceptance length; about the cost of
            a draft level in target steps (OPT-Tree). 0: grow to the full depth. "auto": the measured costs decide, and
            the first few steps grow to the full depth.
        draws: draw honestly for a rejection rule; None: for match, with the target's own noise.
        fan_out: with ``draws``: children per node by level; the last one holds for all deeper levels.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(
        self,
        model: DraftModel,
        *,
        vocab_size: int,
        top_k: int = 2,
        width: int = 2,
        depth: int = 8,
        min_gain: float | str = "auto",
        draws: Draws | None = None,
        fan_out: tuple[int, ...] = (2, 1),
    ) -> None:
        for name, value in (("top_k", top_k), ("width", width), ("depth", depth), *(("fan_out", n) for n in fan_out)):
            if value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if min_gain != "auto" and (isinstance(min_gain, str) or not min_gain >= 0):
            raise ConfigError(f"min_gain must be auto or >= 0, got {min_gain}")
        self.needs = DrafterNeeds(draws=draws)
        self.model = model
        self._vocab_size = min(vocab_size, model.vocab_size)
        self._target_vocab_size = vocab_size
        self._limits = SearchLimits(top_k, width, depth, None if isinstance(min_gain, str) else min_gain or None)
        self._costs = DraftCosts() if min_gain == "auto" else None
        self._draws = draws
        self._fan_out = (1,) if draws == "chain" else fan_out or (1,)

    @property
    def named_weights(self) -> Mapping[str, Tensor]:
        """The draft model's own tensors by their names in a checkpoint; what is copied into them holds at once."""
        self.model.unpack()  # what is copied into a packed form's dense copy would be lost
        weights: Mapping[str, Tensor] = self.model.hf_model.state_dict()
        return weights

    def start(self, states: Sequence[RequestState]) -> None:
        """Nothing: a prompt is read with the request's first draft."""

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = [DraftTree.root_only(int(state.token_ids[-1])) for state in states]
        wanted = [row for row, budget in enumerate(budgets) if budget > 0]
        if not wanted:
            return trees
        ids = [states[row].request_id for row in wanted]
        served, logits = self.model.read(ids, [states[row].token_ids for row in wanted])
        rows = [wanted[index] for index in served]
        grow = self._searched if self._draws is None else self._drawn
        grown = grow([states[row] for row in rows], [budgets[row] for row in rows], logits[:, : self._vocab_size])
        self.model.drop([states[row].request_id for row in rows])
        for row, tree in zip(rows, grown, strict=True):
            trees[row] = tree
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Learn what a step costs."""
        if self._costs is not None:
            self._costs.observe(events)

    def rewind(self, request_id: str, num_tokens: int) -> None:
        """Forget a request's text from ``num_tokens`` on: it was shown in advance and did not come true."""
        self.model.rewind(request_id, num_tokens)

    def stop(self, request_ids: Sequence[str]) -> None:
        self.model.release(request_ids)

    def _searched(self, states: Sequence[RequestState], budgets: Sequence[int], logits: Tensor) -> list[DraftTree]:
        """Trees of the best nodes by value, for the match rule."""
        searches = [
            TreeSearch(int(state.token_ids[-1]), budget, self._room(state))
            for state, budget in zip(states, budgets, strict=True)
        ]

        num_levels = 0

        def grow(growths: Sequence[Growth], _: object) -> Tensor | None:
            nonlocal num_levels
            num_levels += 1
            new = self.model.grow(growths)
            return None if new is None else new[:, : self._vocab_size]

        begin = perf_counter()
        trees = search_trees(states, searches, logits, self._limits.top_k, grow)
        if self._costs is not None:
            self._costs.searched(perf_counter() - begin, num_levels)
        return trees

    def _room(self, state: RequestState) -> SearchLimits:
        """The limits, with a depth that the draft model's context still holds."""
        depth = max(1, min(self._limits.depth, self.model.max_length - state.num_tokens))
        costs = self._costs.costs if self._costs is not None else None
        return replace(self._limits, depth=depth, costs=costs)

    def _drawn(self, states: Sequence[RequestState], budgets: Sequence[int], logits: Tensor) -> list[DraftTree]:
        """Trees of a fixed shape, drawn from stated laws, for the rejection rules."""
        drawn = [
            _DrawnTree(state, self._room(state).depth, budget, self._target_vocab_size)
            for state, budget in zip(states, budgets, strict=True)
        ]
        growing = list(range(len(states)))
        sizes = [1] * len(states)
        for level in range(self._limits.depth):
            fan_out = self._fan_out[min(level, len(self._fan_out) - 1)]
            growths, start = [], 0
            for one in list(growing):
                rows = logits[start : start + sizes[one]]
                start += sizes[one]
                growth = drawn[one].draw(rows, fan_out, self._draws or "chain")
                if growth is None:
                    growing.remove(one)
                else:
                    growths.append(growth)
                    sizes[one] = len(growth.token_ids)
            new = self.model.grow(growths) if growths else None
            if new is None:
                break
            logits = new[:, : self._vocab_size]
        return [one.tree() for one in drawn]


class _DrawnTree:
    """One request's tree while its nodes are drawn level by level."""

    def __init__(self, state: RequestState, depth: int, budget: int, vocab_size: int) -> None:
        self._state, self._depth, self._budget, self._vocab_size = state, depth, budget, vocab_size
        self._token_ids, self._parents = [int(state.token_ids[-1])], [-1]
        self._laws: dict[int, Tensor] = {}
        self._level = [0]

    def draw(self, logits: Tensor, fan_out: int, draws: Draws) -> Growth | None:
        """Draw the children of the newest level from its logits [W, V]; what to score next, None: nothing."""
        sampling = self._state.request.sampling
        if len(logits) != len(self._level):
            raise InternalError(f"{len(self._level)} nodes were grown, {len(logits)} were scored")
        laws = draft_laws(logits, sampling)
        level: list[int] = []
        for node, law in zip(self._level, laws, strict=True):
            self._laws[node] = law
            count = min(fan_out, self._budget + 1 - len(self._parents))
            key = {"seed": sampling.seed, "position": self._state.num_tokens, "node": node}
            for token_id in draw_children(law, count, draws=draws, **key):
                level.append(len(self._parents))
                self._token_ids.append(token_id)
                self._parents.append(node)
        self._level, self._depth = level, self._depth - 1
        if not level or self._depth < 1 or len(self._parents) > self._budget:
            return None
        ids = np.array([self._token_ids[node] for node in level], dtype=np.int32)
        # The scorer counts nodes without the root.
        return Growth(self._state.request_id, ids, np.array([self._parents[n] - 1 for n in level], dtype=np.int32))

    def tree(self) -> DraftTree:
        """The tree with a row of draft law per node; nodes that were not expanded have a row of zeros."""
        rows = torch.zeros(len(self._parents), self._vocab_size, dtype=torch.float64)
        for node, law in self._laws.items():
            rows[node, : len(law)] = law.cpu()
        nodes = np.array(self._token_ids, dtype=np.int32), np.array(self._parents, dtype=np.int32)
        return DraftTree(*nodes, draft_probs=rows)
