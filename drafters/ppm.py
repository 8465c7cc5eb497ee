"""Prediction by partial matching as a drafter: the likeliest continuations under a law blended over context lengths.

Where nothing longer than two or three tokens matches, a copy of one earlier place is a poor guess. A blended law says
which tokens usually come next, with their chances, so it has second and third guesses where the first is unsure.
Sources: see ``specdec.suffix_tree.ppm``.
"""

from __future__ import annotations

import numpy as np

from specdec.drafters.store import RetrievalStore
from specdec.drafters.trie_drafter import LiveText, TrieDrafter
from specdec.errors import ConfigError
from specdec.suffix_tree.branch_memory import BranchMemory
from specdec.suffix_tree.count_trie import CountTrie
from specdec.suffix_tree.ppm import MAX_ORDER, grow_likeliest, learn_escapes
from specdec.types import DraftTree, IntArray

__all__ = ["PpmDrafter"]

_DEPTH = MAX_ORDER + 1  # strings that are counted: a context and what followed


class PpmDrafter(TrieDrafter):
    """Guesses by a blended law of the next token (`specdec.protocols.Drafter`).

    Args:
        max_depth: longest path below the root, in tokens, from 1 to 256.
        min_value: nodes whose path has a smaller chance are not drafted, in [0, 1].
        as_tree: draft trees; False: the likeliest token at each place only.
        store: where outputs are kept; a private one if None. Several drafters and engines may share a store.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(
        self,
        *,
        max_depth: int = 16,
        min_value: float = 0.05,
        as_tree: bool = True,
        store: RetrievalStore | None = None,
    ) -> None:
        if not 1 <= max_depth <= 256:
            raise ConfigError(f"max_depth must be in [1, 256], got {max_depth}")
        if not 0 <= min_value <= 1:
            raise ConfigError(f"min_value must be in [0, 1], got {min_value}")
        super().__init__(store, _DEPTH)
        self._max_depth = max_depth
        self.min_value = float(min_value)
        self._as_tree = as_tree

    def _memory(self, tenant: str) -> BranchMemory:
        return self.store.contexts(tenant)

    def _judge(self, live: LiveText, token_ids: IntArray) -> None:
        memory = live.memory
        learn_escapes(live.own.header, memory.trie.header, token_ids, live.num_seen, memory.tries, memory.hits)
        memory.observed()

    def _draft(self, live: LiveText, token_ids: IntArray, budget: int) -> DraftTree:
        tree = np.empty((2, budget + 1), np.int32)
        values = np.empty(budget + 1, np.float32)
        size = grow_likeliest(
            live.own.header, live.memory.trie.header, token_ids, budget, self._max_depth, self.min_value,
            self._as_tree, live.memory.rates, tree, values,
        )  # fmt: skip
        return DraftTree(tree[0, :size], tree[1, :size], values[:size])

    def warmup(self) -> None:
        """Compile everything, so that no request waits for it."""
        own, text = CountTrie(_DEPTH, 64), np.array([1, 2, 1, 2], np.int32)
        own.append(own.new_windows(), text)
        memory = RetrievalStore().contexts("")
        learn_escapes(own.header, memory.trie.header, text, 3, memory.tries, memory.hits)
        tree, values = np.empty((2, 3), np.int32), np.empty(3, np.float32)
        grow_likeliest(own.header, memory.trie.header, text, 2, 2, 0.0, True, memory.rates, tree, values)
