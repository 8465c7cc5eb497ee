"""Prediction by partial matching: its law, its escapes, its trees, and what it keeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from specdec.drafters.ppm import PpmDrafter
from specdec.drafters.store import RetrievalStore
from specdec.errors import ConfigError, InternalError
from specdec.suffix_tree.count_trie import CountTrie
from specdec.suffix_tree.ppm import MAX_ORDER, PPM_CELLS, grow_likeliest, prior_weights
from specdec.types import DraftTree, Request, RequestState, SamplingParams


def state_of(name: str, prompt: list[int], tenant: str = "") -> RequestState:
    return RequestState(Request(name, np.array(prompt, np.int32), SamplingParams(max_new_tokens=50), tenant))


def serve(drafter: PpmDrafter, name: str, output: list[int], tenant: str = "") -> None:
    state = state_of(name, [7], tenant)
    drafter.start([state])
    for token in output:
        drafter.propose([state], [2])
        state.append([token])
    drafter.stop([name])


def draft(drafter: PpmDrafter, prompt: list[int], budget: int, tenant: str = "") -> DraftTree:
    state = state_of("asked", prompt, tenant)
    drafter.start([state])
    [tree] = drafter.propose([state], [budget])
    tree.check(vocab_size=1000)
    drafter.stop(["asked"])
    return tree


def naive_law(text: list[int], weights: np.ndarray) -> dict[int, float]:
    """The blended law of a request's own text alone, written down as it is defined."""
    law: dict[int, float] = {}
    rest = 1.0
    for order in range(min(MAX_ORDER, len(text)), 0, -1):
        context = text[len(text) - order :]
        starts = [i for i in range(len(text) - order + 1) if text[i : i + order] == context]
        followed = [text[i + order] for i in starts if i + order < len(text)]
        if not followed:
            continue
        size = min(int(np.log2(len(starts))), 6)
        width = min(int(np.log2(len(set(followed)))), 4)
        weight = float(weights[((order - 1) * 7 + size) * 5 + width])
        for token in set(followed):
            law[token] = law.get(token, 0.0) + rest * weight * followed.count(token) / len(starts)
        rest *= 1 - weight
    return law


def test_the_law_is_the_blend_of_all_contexts() -> None:
    rng = np.random.default_rng(0)
    weights = (prior_weights() * rng.uniform(0.3, 0.9, PPM_CELLS)).astype(np.float32)
    for _ in range(20):
        text = rng.integers(0, 4, 40).astype(np.int32)
        own, other = CountTrie(MAX_ORDER + 1, 4096), CountTrie(MAX_ORDER + 1, 64)
        own.append(own.new_windows(), text)
        tree, values = np.empty((2, 9), np.int32), np.empty(9, np.float32)
        size = grow_likeliest(own.header, other.header, text, 8, 1, 0.0, True, weights, tree, values)
        found = dict(zip(tree[0, 1:size].tolist(), values[1:size].tolist(), strict=True))
        law = naive_law(text.tolist(), weights)
        assert found == pytest.approx({t: p for t, p in law.items() if t in found}, rel=1e-3)
        assert set(found) >= {token for token, chance in law.items() if chance > 0.05}
        assert (np.diff(values[1:size]) <= 1e-6).all()


def test_an_unsure_text_has_second_guesses() -> None:
    tree = draft(PpmDrafter(min_value=0.0), [1, 2, 9, 1, 2, 9, 1, 3, 8, 1], 6)
    first = [int(tree.token_ids[node]) for node in range(1, len(tree)) if tree.parents[node] == 0]
    assert first == [2, 3]  # twice against once


def test_a_chain_is_the_likeliest_token_at_each_place() -> None:
    text = [1, 2, 9, 1, 2, 9, 1, 3, 8, 1]
    chain = draft(PpmDrafter(min_value=0.0, as_tree=False), text, 4)
    assert chain.parents.tolist() == [-1, 0, 1, 2, 3]
    assert chain.token_ids.tolist() == [1, 2, 9, 1, 2]


def test_a_copy_is_followed_to_the_depth_and_within_the_budget() -> None:
    text = [*range(30), 0, 1, 2, 3]
    drafter = PpmDrafter(max_depth=5, min_value=0.0)
    tree = draft(drafter, text, 20)
    assert tree.depths().max() == 5
    assert tree.token_ids[1:6].tolist() == [4, 5, 6, 7, 8]
    assert len(draft(drafter, text, 2)) == 3
    assert len(draft(drafter, text, 0)) == 1


def test_contexts_that_were_wrong_before_are_trusted_less() -> None:
    drafter = PpmDrafter(min_value=0.0)
    before = float(draft(drafter, [1, 2, 3, 4, 1, 2, 3], 1).values[1])  # type: ignore[index]
    memory = drafter.store.contexts("")
    rng = np.random.default_rng(0)
    for number in range(6):  # what followed a context once follows it never again
        serve(drafter, f"s{number}", rng.permutation(np.tile(np.arange(100, 140), 2)).tolist())
    assert memory.tries.sum() > 0
    after = float(draft(drafter, [1, 2, 3, 4, 1, 2, 3], 1).values[1])  # type: ignore[index]
    assert after < 0.95 * before  # only contexts of one token were asked


def test_outputs_of_the_tenant_are_known_and_of_others_not() -> None:
    drafter = PpmDrafter(min_value=0.0)
    serve(drafter, "a", [5, 6, 8, 9], tenant="a")
    assert draft(drafter, [5, 6], 2, tenant="a").token_ids.tolist()[1:] == [8, 9]
    assert len(draft(drafter, [5, 6], 2, tenant="b")) == 1


def test_a_store_is_saved_and_loaded_and_forgets(tmp_path: Path) -> None:
    drafter = PpmDrafter(min_value=0.0)
    for number in range(3):
        serve(drafter, f"s{number}", [5, 6, 8, 5, 6, 9, 5, 6, 8])
    drafter.store.save(tmp_path / "store")
    again = PpmDrafter(min_value=0.0, store=RetrievalStore.load(tmp_path / "store"))
    one, two = draft(drafter, [5, 6], 6), draft(again, [5, 6], 6)
    assert one.token_ids.tolist() == two.token_ids.tolist()
    assert one.values == pytest.approx(two.values)
    for number in range(3):
        again.store.forget(f"s{number}")
    assert len(draft(again, [5, 6], 6)) == 1
    again.store.forget_tenant("")
    assert again.store.contexts("").trie.num_nodes == 1


def test_options_and_unknown_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_depth must be in \[1, 256\], got 0"):
        PpmDrafter(max_depth=0)
    with pytest.raises(ConfigError, match=r"min_value must be in \[0, 1\], got 2"):
        PpmDrafter(min_value=2)
    with pytest.raises(InternalError, match="was not started"):
        PpmDrafter().propose([state_of("x", [1])], [1])
