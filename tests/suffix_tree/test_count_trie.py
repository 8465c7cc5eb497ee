from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from specdec.suffix_tree.count_trie import CountTrie

JIT = os.environ.get("NUMBA_DISABLE_JIT") != "1"  # interpreted kernels are slow: fewer examples
tokens = st.lists(st.integers(0, 3), max_size=30)


def naive_count(texts: list[list[int]], string: list[int]) -> int:
    n = len(string)
    return sum(text[i : i + n] == string for text in texts for i in range(len(text) - n + 1))


class TrieMachine(RuleBasedStateMachine):
    @initialize(depth=st.integers(1, 6))
    def begin(self, depth: int) -> None:
        self.trie = CountTrie(depth, 20_000)
        self.open: dict[int, np.ndarray] = {}
        self.texts: dict[int, list[int]] = {}

    @rule(name=st.integers(0, 4), new=tokens)
    def append(self, name: int, new: list[int]) -> None:
        if name in self.texts and name not in self.open:
            return
        windows = self.open.setdefault(name, self.trie.new_windows())
        assert self.trie.append(windows, np.array(new, np.int32))
        self.texts[name] = self.texts.get(name, []) + new

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.texts)))
        self.trie.remove(np.array(self.texts.pop(name), np.int32))
        self.open.clear()  # texts that were open can no longer grow: their windows are void

    @rule(string=st.lists(st.integers(0, 3), min_size=1, max_size=6))
    def count(self, string: list[int]) -> None:
        string = string[: self.trie.depth]
        assert self.trie.count(string) == naive_count(list(self.texts.values()), string)

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "trie"):
            self.trie.check_integrity()


TestTrieMachine = TrieMachine.TestCase
TestTrieMachine.settings = settings(
    max_examples=50 if JIT else 5, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_full_trie_stops_counting_and_stays_whole():
    trie = CountTrie(8, 100)
    assert not trie.append(trie.new_windows(), np.arange(1000, dtype=np.int32))
    assert trie.num_nodes <= 100
    trie.check_integrity()


def test_decay_halves_and_prunes():
    trie = CountTrie(4, 1000)
    trie.append(trie.new_windows(), np.array([1, 2, 1, 2, 1, 2, 1, 2, 9], np.int32))
    trie.decay()
    trie.check_integrity()
    assert trie.count([1, 2]) == 2
    assert trie.count([9]) == 0
    for _ in range(3):
        trie.decay()
    assert trie.num_nodes == 1


def test_a_million_equal_tokens_take_no_more_nodes_than_the_depth():
    trie = CountTrie(64, 1000)
    assert trie.append(trie.new_windows(), np.zeros(1_000_000, np.int32))
    assert trie.num_nodes == 65
    assert trie.count([0]) == 1_000_000


@pytest.mark.parametrize("options", [(0, 100), (2000, 100), (8, 1)])
def test_bad_bounds_are_named(options):
    with pytest.raises(ValueError, match="must be in"):
        CountTrie(*options)
