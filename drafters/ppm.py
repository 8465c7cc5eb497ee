"""Prediction by partial matching as a drafter: the likeliest continuations under a law blended over context lengths.

Where nothing longer than two or three tokens matches, a copy of one earlier place is a poor guess. A blended law says
which tokens usually come next, with their chances, so it has second and third guesses where the first is unsure.
Sources: see ``specdec.suffix_tree.ppm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec.drafters.store import RetrievalStore
from specdec.errors import ConfigError, InternalError
from specdec.protocols import DrafterNeeds
from specdec.suffix_tree.branch_memory import BranchMemory
from specdec.suffix_tree.count_trie import CountTrie
from specdec.suffix_tree.ppm import MAX_ORDER, grow_likeliest, learn_escapes
from specdec.types import DraftTree, IntArray, RequestState, StepEvent

__all__ = ["PpmDrafter"]

_DEPTH = MAX_ORDER + 1  # strings that are counted: a context and what followed
_MAX_OWN_NODES = 1 << 22  # 128 MB at the very most


@dataclass(slots=True, eq=False)
class _Live:
    state: RequestState
    memory: BranchMemory
    own: CountTrie
    windows: IntArray
    num_seen: int


class PpmDrafter:
    """Guesses by a blended law of the next token (`specdec.protocols.Drafter`).

    Args:
        max_depth: longest path below the root, in tokens, from 1 to 256.
        min_value: nodes whose path has a smaller chance are not drafted, in [0, 1].
        store: where outputs are kept; a private one if None. Several drafters and engines may share a store.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(self, *, max_depth: int = 16, min_value: float = 0.05, store: RetrievalStore | None = None) -> None:
        if not 1 <= max_depth <= 256:
            raise ConfigError(f"max_depth must be in [1, 256], got {max_depth}")
        if not 0 <= min_value <= 1:
            raise ConfigError(f"min_value must be in [0, 1], got {min_value}")
        self.needs = DrafterNeeds()
        self.store = store or RetrievalStore()
        self._max_depth = max_depth
        self._min_value = float(min_value)
        self._live: dict[str, _Live] = {}

    def start(self, states: Sequence[RequestState]) -> None:
        for state in states:
            with self.store.lock:
                memory = self.store.contexts(state.request.tenant)
                memory.open(state.request_id)
            longest = state.num_tokens + state.request.sampling.max_new_tokens
            own = CountTrie(_DEPTH, min(longest * _DEPTH + 2, _MAX_OWN_NODES))
            live = _Live(state, memory, own, own.new_windows(), state.num_tokens)
            self._live[state.request_id] = live
            own.append(live.windows, state.token_ids)

    def _catch_up(self, live: _Live) -> IntArray:
        """Learn from the committed tokens that are new, count them, and return all tokens."""
        token_ids, memory = live.state.token_ids, live.memory
        new_ids = token_ids[live.num_seen :]
        if len(new_ids):
            learn_escapes(live.own.header, memory.trie.header, token_ids, live.num_seen, memory.tries, memory.hits)
            memory.observed()
            live.own.append(live.windows, new_ids)
            memory.append(live.state.request_id, new_ids)
            live.num_seen = len(token_ids)
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
        tree = np.empty((2, budget + 1), np.int32)
        values = np.empty(budget + 1, np.float32)
        size = grow_likeliest(
            live.own.header, live.memory.trie.header, token_ids, budget, self._max_depth, self._min_value,
            live.memory.rates, tree, values,
        )  # fmt: skip
        return DraftTree(tree[0, :size], tree[1, :size], values[:size])

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
        own, text = CountTrie(_DEPTH, 64), np.array([1, 2, 1, 2], np.int32)
        own.append(own.new_windows(), text)
        memory = RetrievalStore().contexts("")
        learn_escapes(own.header, memory.trie.header, text, 3, memory.tries, memory.hits)
        tree, values = np.empty((2, 3), np.int32), np.empty(3, np.float32)
        grow_likeliest(own.header, memory.trie.header, text, 2, 2, 0.0, memory.rates, tree, values)
