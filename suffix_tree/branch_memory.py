"""One tenant's memory for drafters that count strings: the trie of its outputs, the texts in it, outcomes by class."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from specdec.suffix_tree.branches import BRANCH_CELLS
from specdec.suffix_tree.count_trie import CountTrie
from specdec.suffix_tree.memory import Int32Array, address_of

__all__ = ["BranchMemory"]

_PRIOR_TRIES = 8.0
_KEPT = np.float32(0.999)  # of older outcomes, per observed draft: half after 700


def _prior_rates() -> np.ndarray:
    """[BRANCH_CELLS] float32: a child with a larger share of its siblings' counts is likelier to be accepted."""
    share = (np.arange(10) + 0.5) / 10
    counts = np.array([0.5, 0.65, 0.8, 0.9])
    cells = np.tile((counts[:, None] * share[None, :]).ravel(), 2 * BRANCH_CELLS // (2 * 40))
    return cells.astype(np.float32)


class BranchMemory:
    """Outputs of one tenant, counted; texts can be forgotten, and old counts decay when the trie is crowded.

    Args:
        depth: longest string that is counted.
        max_nodes: bound of the trie.
        max_tokens: texts kept for forgetting, in tokens; the oldest are uncounted beyond it.
        prior: [classes] float32: rates before anything was observed; None: those of lookahead's cells.
    """

    def __init__(self, depth: int, max_nodes: int, max_tokens: int, prior: np.ndarray | None = None) -> None:
        self.trie = CountTrie(depth, max_nodes)
        self.max_tokens = max_tokens
        self._prior = _prior_rates() if prior is None else prior
        self.tries = np.zeros(len(self._prior), np.float32)
        self.hits = np.zeros(len(self._prior), np.float32)
        self._texts: dict[Hashable, list[Int32Array]] = {}  # oldest first
        self._windows: dict[Hashable, Int32Array] = {}
        self._num_tokens = 0

    @property
    def rates(self) -> np.ndarray:
        """[classes] float32: how often each class was right, as measured so far."""
        return (self.hits + _PRIOR_TRIES * self._prior) / (self.tries + _PRIOR_TRIES)

    @property
    def nbytes(self) -> int:
        """Bytes of the trie and the texts."""
        return self.trie.nbytes + 4 * self._num_tokens

    @property
    def keys(self) -> list[Hashable]:
        """Texts that are counted, oldest first."""
        return list(self._texts)

    def open(self, key: Hashable) -> None:
        """Begin a text; an earlier one under the key is forgotten."""
        if key in self._texts:
            self.forget(key)
        self._texts[key] = []
        self._windows[key] = self.trie.new_windows()

    def append(self, key: Hashable, tokens: Int32Array) -> None:
        """Count more tokens of an open text; of a text that was forgotten meanwhile nothing is kept."""
        if key not in self._windows or len(tokens) == 0:
            return
        self._texts[key].append(np.array(tokens, np.int32))
        self._num_tokens += len(tokens)
        self.trie.append(self._windows[key], self._texts[key][-1])
        if self.trie.is_crowded:
            self.trie.decay(least=1)
        while self._num_tokens > self.max_tokens and len(self._texts) > 1:
            oldest = next(iter(self._texts))
            if oldest == key:  # the live text itself is the oldest: let it grow
                break
            self.forget(oldest)

    def close(self, key: Hashable) -> None:
        """The text is complete."""
        self._windows.pop(key, None)

    def forget(self, key: Hashable) -> bool:
        """Uncount a text; strings that only it contained are gone. False if it is unknown."""
        pieces = self._texts.pop(key, None)
        self._windows.pop(key, None)
        if pieces is None:
            return False
        if pieces:
            text = np.concatenate(pieces)
            self._num_tokens -= len(text)
            self.trie.remove(text)
        return True

    def observed(self) -> None:
        """One more draft was judged: older outcomes count a little less."""
        self.tries *= _KEPT
        self.hits *= _KEPT

    # --- persistence --------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, np.ndarray]:
        """What must be saved, by name."""
        texts = [np.concatenate([np.empty(0, np.int32), *pieces]) for pieces in self._texts.values()]
        return {
            "lengths": np.array([len(text) for text in texts], np.int64),
            "texts": np.concatenate([np.empty(0, np.int32), *texts]),
            "tries": self.tries,
            "hits": self.hits,
        }

    def restore(self, keys: list[Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Become the saved memory: the texts are counted again, which is exact and quick."""
        self.tries[:] = arrays["tries"]
        self.hits[:] = arrays["hits"]
        stops = np.cumsum(arrays["lengths"])
        for key, stop, length in zip(keys, stops.tolist(), arrays["lengths"].tolist(), strict=True):
            self.open(key)
            self.append(key, arrays["texts"][stop - length : stop])
            self.close(key)

    @property
    def address(self) -> int:
        """Where the trie's header lies."""
        return address_of(self.trie.header)
