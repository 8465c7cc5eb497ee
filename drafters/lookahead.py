"""Trie lookahead: branches that followed the last tokens before, merged by prefix.

Source: PainlessInferenceAcceleration (Zhao et al. 2023, 2312.12728), hierarchical mode. Each request has a trie of its
own prompt and output, each tenant one of all its outputs; see ``specdec.suffix_tree.branches`` for what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec.drafters.store import RetrievalStore
from specdec.errors import ConfigError, InternalError
from specdec.protocols import DrafterNeeds
from specdec.suffix_tree.branch_memory import BranchMemory
from specdec.suffix_tree.branches import branch_outcomes, grow_branches
from specdec.suffix_tree.count_trie import CountTrie
from specdec.types import DraftTree, IntArray, RequestState, StepEvent

__all__ = ["LookaheadDrafter"]

_MAX_OWN_NODES = 1 << 22  # 128 MB at the very most, for prompts of 300 thousand tokens


@dataclass(slots=True, eq=False)
class _Live:
    state: RequestState
    memory: BranchMemory
    own: CountTrie
    windows: IntArray
    num_seen: int
    tree: IntArray | None = None  # [3, N]: the pending draft


class LookaheadDrafter:
    """Guesses from tries of the request's text and of its tenant's outputs (`specdec.protocols.Drafter`).

    Args:
        branch_length: longest branch below the root, in tokens.
        max_query: how many of the last tokens are looked up at most; shorter queries serve where longer ones fail.
        min_value: nodes whose path is accepted with less than this probability are not drafted, in [0, 1].
        store: where outputs are kept; a private one if None. It must have been made with the same branch length.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(
        self,
        *,
        branch_length: int = 12,
        max_query: int = 2,
        min_value: float = 0.03,
        store: RetrievalStore | None = None,
    ) -> None:
        for ok, name, rule, value in (
            (1 <= branch_length <= 64, "branch_length", "in [1, 64]", branch_length),
            (1 <= max_query <= 8, "max_query", "in [1, 8]", max_query),
            (0 <= min_value <= 1, "min_value", "in [0, 1]", min_value),
        ):
            if not ok:
                raise ConfigError(f"{name} must be {rule}, got {value}")
        self.needs = DrafterNeeds()
        self.store = store or RetrievalStore()
        self._depth = branch_length + max_query
        self._branch_length = branch_length
        self._max_query = max_query
        self._min_value = float(min_value)
        self._live: dict[str, _Live] = {}

    def start(self, states: Sequence[RequestState]) -> None:
        for state in states:
            with self.store.lock:
                memory = self.store.branches(state.request.tenant, self._depth)
                memory.open(state.request_id)
            longest = state.num_tokens + state.request.sampling.max_new_tokens
            own = CountTrie(self._depth, min(longest * self._depth + 2, _MAX_OWN_NODES))
            live = _Live(state, memory, own, own.new_windows(), 0)
            self._live[state.request_id] = live
            own.append(live.windows, state.token_ids)
            live.num_seen = state.num_tokens

    def _catch_up(self, live: _Live) -> IntArray:
        """Count the committed tokens that are new, judge the pending draft by them, and return all tokens."""
        token_ids = live.state.token_ids
        new_ids = token_ids[live.num_seen :]
        if len(new_ids):
            if live.tree is not None:
                branch_outcomes(live.tree, new_ids, live.memory.tries, live.memory.hits)
                live.memory.observed()
            live.own.append(live.windows, new_ids)
            live.memory.append(live.state.request_id, new_ids)
            live.num_seen = len(token_ids)
        live.tree = None
        return token_ids

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = []
        for state, budget in zip(states, budgets, strict=True):
            live = self._live.get(state.request_id)
            if live is None:
                raise InternalError(f"request {state.request_id!r} was not started")
            with self.store.lock:
                token_ids = self._catch_up(live)
                trees.append(self._draft(live, token_ids, int(budget)))
        return trees

    def _draft(self, live: _Live, token_ids: IntArray, budget: int) -> DraftTree:
        if budget < 1:
            return DraftTree.root_only(int(token_ids[-1]))
        tree = np.zeros((3, budget + 1), np.int32)
        values = np.empty(budget + 1, np.float32)
        best: tuple[IntArray, np.ndarray] | None = None
        rates = live.memory.rates
        for query in range(min(self._max_query, len(token_ids)), 0, -1):
            size = grow_branches(
                live.own.header, live.memory.trie.header, token_ids[-self._max_query :], query, budget,
                self._min_value, rates, tree, values,
            )  # fmt: skip
            if best is None or size > best[0].shape[1]:
                best = (tree[:, :size].copy(), values[:size].copy())
            if size > min(budget, self._branch_length):
                break  # the longer query found enough
        if best is None:
            raise InternalError("a request has no tokens")
        live.tree = best[0]
        return DraftTree(best[0][0], best[0][1], best[1])

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to do: what came of a draft shows in the tokens that the next ``propose`` or ``stop`` counts."""

    def stop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            live = self._live.pop(request_id, None)
            if live is not None:
                with self.store.lock:
                    self._catch_up(live)
                    live.memory.close(request_id)

    def warmup(self) -> None:
        """Compile everything, so that no request waits for it."""
        trie = CountTrie(4, 64)
        text = np.array([1, 2, 1, 2], np.int32)
        trie.append(trie.new_windows(), text)
        memory = BranchMemory(4, 64, 64)
        tree, values = np.zeros((3, 3), np.int32), np.zeros(3, np.float32)
        grow_branches(trie.header, memory.trie.header, text, 1, 2, 0.0, memory.rates, tree, values)
        branch_outcomes(tree, text, memory.tries, memory.hits)
