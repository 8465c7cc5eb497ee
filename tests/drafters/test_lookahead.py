from __future__ import annotations

import numpy as np
import pytest

from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.store import RetrievalStore
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import ConfigError, InternalError, RequestError
from specdec.types import Request, RequestState, SamplingParams


def state_of(name: str, prompt: list[int], tenant: str = "") -> RequestState:
    return RequestState(Request(name, np.array(prompt, np.int32), SamplingParams(max_new_tokens=50), tenant))


def paths(drafter: LookaheadDrafter, state: RequestState, budget: int) -> set[tuple[int, ...]]:
    [tree] = drafter.propose([state], [budget])
    tree.check(vocab_size=1000)
    return {tuple(tree.token_ids[tree.path(node)[1:]].tolist()) for node in range(1, len(tree))}


def test_branches_of_several_occurrences_are_merged_by_prefix():
    drafter = LookaheadDrafter(min_value=0.0)
    state = state_of("r", [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2])
    drafter.start([state])
    found = paths(drafter, state, 6)
    assert {(3,), (3, 4), (3, 5)} <= found


def test_the_own_text_outweighs_the_tenants():
    store = RetrievalStore()
    drafter = LookaheadDrafter(store=store, min_value=0.0)
    for n in range(5):
        other = state_of(f"o{n}", [7])
        drafter.start([other])
        other.append([1, 2, 8, 8])
        drafter.stop([f"o{n}"])
    state = state_of("r", [1, 2, 3, 1, 2])
    drafter.start([state])
    assert paths(drafter, state, 1) == {(3,)}
    fresh = state_of("s", [5, 1, 2])
    drafter.start([fresh])
    assert paths(drafter, fresh, 1) == {(8,)}


def test_another_tenants_outputs_are_not_drafted():
    drafter = LookaheadDrafter(min_value=0.0)
    other = state_of("o", [7], tenant="a")
    drafter.start([other])
    other.append([1, 2, 8, 8])
    drafter.stop(["o"])
    state = state_of("r", [5, 1, 2], tenant="b")
    drafter.start([state])
    assert paths(drafter, state, 4) == set()


def test_branches_end_at_their_length_and_budgets_are_kept():
    drafter = LookaheadDrafter(branch_length=3, min_value=0.0)
    state = state_of("r", list(range(20)) + [0, 1])
    drafter.start([state])
    assert max(len(path) for path in paths(drafter, state, 50)) == 3
    assert len(paths(drafter, state, 2)) == 2
    assert paths(drafter, state, 0) == set()


def test_old_texts_are_uncounted_when_the_memory_is_full():
    store = RetrievalStore()
    memory = store.branches("", 14)
    memory.max_tokens = 100
    for n in range(20):
        memory.open(str(n))
        memory.append(str(n), np.arange(20, dtype=np.int32) + 20 * n)
        memory.close(str(n))
    assert memory.keys == [str(n) for n in range(15, 20)]
    assert memory.trie.count([0, 1]) == 0
    assert memory.trie.count([380, 381]) == 1
    memory.trie.check_integrity()


@pytest.mark.parametrize(("option", "value"), [("branch_length", 0), ("max_query", 9), ("min_value", 1.5)])
def test_bad_options_are_named(option, value):
    with pytest.raises(ConfigError, match=f"{option} must be in .*, got {value}"):
        LookaheadDrafter(**{option: value})


def test_a_suffix_drafter_names_bad_options_and_requests():
    with pytest.raises(ConfigError, match=r"threshold must be in \[0, 1\], got 2"):
        SuffixDrafter(threshold=2)
    with pytest.raises(ConfigError, match="not both"):
        SuffixDrafter(store=RetrievalStore(), max_bytes=1 << 20)
    drafter = SuffixDrafter()
    state = state_of("r", [1, 2, 3])
    drafter.start([state])
    with pytest.raises(RequestError, match="'r' is already active"):
        drafter.start([state_of("other", [1]), state])
    assert drafter.propose([state], [4])[0].token_ids[0] == 3
    with pytest.raises(InternalError, match="'ghost' was not started"):
        drafter.propose([state_of("ghost", [1])], [4])
    drafter.stop(["r", "ghost"])
