"""Trie lookahead: branches that followed the last tokens before, merged by prefix.

Source: PainlessInferenceAcceleration (Zhao et al. 2023, 2312.12728), hierarchical mode. Each request has a trie of its
own prompt and output, each tenant one of all its outputs; see ``specdec.suffix_tree.branches`` for what differs.
"""

from __future__ import annotations

import numpy as np

from specdec.drafters.store import RetrievalStore
from specdec.drafters.trie_drafter import LiveText, TrieDrafter
from specdec.errors import ConfigError, InternalError
from specdec.suffix_tree.branch_memory import BranchMemory
from specdec.suffix_tree.branches import branch_outcomes, grow_branches
from specdec.suffix_tree.count_trie import CountTrie
from specdec.types import DraftTree, IntArray

__all__ = ["LookaheadDrafter"]


class LookaheadDrafter(TrieDrafter):
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
        super().__init__(store, branch_length + max_query)
        self._branch_length = branch_length
        self._max_query = max_query
        self.min_value = float(min_value)

    def _memory(self, tenant: str) -> BranchMemory:
        return self.store.branches(tenant, self._depth)

    def _judge(self, live: LiveText, token_ids: IntArray) -> None:
        if live.tree is not None:
            branch_outcomes(live.tree, token_ids[live.num_seen :], live.memory.tries, live.memory.hits)
            live.memory.observed()

    def _draft(self, live: LiveText, token_ids: IntArray, budget: int) -> DraftTree:
        tree = np.zeros((3, budget + 1), np.int32)
        values = np.empty(budget + 1, np.float32)
        best: tuple[IntArray, np.ndarray] | None = None
        rates = live.memory.rates
        for query in range(min(self._max_query, len(token_ids)), 0, -1):
            size = grow_branches(
                live.own.header, live.memory.trie.header, token_ids[-self._max_query :], query, budget,
                self.min_value, rates, tree, values,
            )  # fmt: skip
            if best is None or size > best[0].shape[1]:
                best = (tree[:, :size].copy(), values[:size].copy())
            if size > min(budget, self._branch_length):
                break  # the longer query found enough
        if best is None:
            raise InternalError("a request has no tokens")
        live.tree = best[0]
        return DraftTree(best[0][0], best[0][1], best[1])

    def warmup(self) -> None:
        """Compile everything, so that no request waits for it."""
        trie = CountTrie(4, 64)
        text = np.array([1, 2, 1, 2], np.int32)
        trie.append(trie.new_windows(), text)
        memory = BranchMemory(4, 64, 64)
        tree, values = np.zeros((3, 3), np.int32), np.zeros(3, np.float32)
        grow_branches(trie.header, memory.trie.header, text, 1, 2, 0.0, memory.rates, tree, values)
        branch_outcomes(tree, text, memory.tries, memory.hits)
