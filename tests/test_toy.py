from __future__ import annotations

import doctest
from collections.abc import Sequence

import numpy as np
import pytest

import specdec.toy
import specdec.toy.target
import specdec.verifier.match
from specdec.errors import ConfigError, InternalError
from specdec.protocols import Drafter, TargetModel
from specdec.toy import OracleDrafter, RandomTreeDrafter, ScriptedSampler, ToyTarget
from specdec.types import Chunk, DraftTree, IntArray, Request, RequestState
from tests.oracles import random_tree

VOCAB_SIZE = 7
PROMPT = [3, 1, 4, 1, 5]
# root 5 ─┬─ 2 ── 6
#         └─ 0
TREE = DraftTree(np.array([5, 2, 0, 6], dtype=np.int32), np.array([-1, 0, 0, 1], dtype=np.int32))


def ids(values: Sequence[int]) -> IntArray:
    return np.array(values, dtype=np.int32)


def state_of(prompt: Sequence[int] = PROMPT, request_id: str = "a") -> RequestState:
    return RequestState(Request(request_id, ids(prompt)))


def chunk_of(target: ToyTarget, state: RequestState, prefix: Sequence[int], tree: DraftTree | None) -> Chunk:
    """A chunk with its room reserved."""
    chunk = Chunk(state, ids(prefix), tree)
    assert target.reserve(state, chunk.num_tokens)
    return chunk


@pytest.mark.parametrize("module", [specdec.toy, specdec.toy.target, specdec.verifier.match])
def test_the_examples_of_the_docstrings_are_true(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("order", [None, 1, 3])
def test_a_tree_row_is_the_law_of_its_path_run_alone(order: int | None) -> None:
    target, state = ToyTarget(vocab_size=VOCAB_SIZE, order=order), state_of()
    assert isinstance(target, TargetModel)
    output = target.forward([chunk_of(target, state, PROMPT[:-1], TREE)])
    assert output.cu_nodes.tolist() == [0, 4]
    for node in range(len(TREE)):
        text = [*PROMPT[:-1], *TREE.token_ids[TREE.path(node)]]
        np.testing.assert_array_equal(output.logits[node].numpy(), target.logits(text))


def test_the_law_depends_on_every_earlier_token_and_its_place() -> None:
    target = ToyTarget(vocab_size=VOCAB_SIZE)
    texts = [PROMPT, [2, *PROMPT[1:]], [1, 3, 4, 1, 5], PROMPT[1:], [*PROMPT, 5]]
    laws = [tuple(target.logits(text)) for text in texts]
    assert len(set(laws)) == len(laws)
    assert tuple(ToyTarget(vocab_size=VOCAB_SIZE, seed=1).logits(PROMPT)) not in laws


def test_a_law_of_small_order_forgets() -> None:
    target = ToyTarget(vocab_size=VOCAB_SIZE, order=2)
    np.testing.assert_array_equal(target.logits([1, 2, 3]), target.logits([6, 2, 3]))
    assert target.logits([2, 2, 3]).tolist() != target.logits([2, 3, 3]).tolist()


def test_the_mean_law_is_flat() -> None:
    target = ToyTarget(vocab_size=4)
    probs = np.array([np.exp(target.logits([i])) for i in range(4000)])
    probs /= probs.sum(axis=1, keepdims=True)
    # A flat Dirichlet over 4 tokens: mean 1/4 and standard deviation sqrt(3/80) = .194 each, over 4000 prefixes.
    np.testing.assert_allclose(probs.mean(axis=0), 0.25, atol=5 * 0.194 / np.sqrt(4000))
    np.testing.assert_allclose(probs.std(axis=0), 0.194, atol=0.01)


def test_prefill_in_chunks_and_the_accepted_path_lead_to_the_same_law() -> None:
    target, state = ToyTarget(vocab_size=VOCAB_SIZE), state_of()
    for prefix in ([3, 1], [4]):
        chunk = chunk_of(target, state, prefix, None)
        output = target.forward([chunk])
        assert (output.logits.shape, output.cu_nodes.tolist()) == ((0, VOCAB_SIZE), [0])
        target.commit([chunk], [[]])
        state.num_cached += len(prefix)
    chunk = chunk_of(target, state, [1], TREE)
    target.forward([chunk])
    target.commit([chunk], [[0, 1, 3]])
    state.num_cached += 4
    state.append([2, 6, 4])
    assert target.num_held_tokens == 7
    output = target.forward([chunk_of(target, state, [], DraftTree.root_only(4))])
    np.testing.assert_array_equal(output.logits[0].numpy(), target.logits([*PROMPT, 2, 6, 4]))


def test_requests_of_a_forward_keep_apart_and_only_trees_get_rows() -> None:
    target = ToyTarget(vocab_size=VOCAB_SIZE)
    states = [state_of(request_id=name) for name in "abc"]
    chunks = [
        chunk_of(target, states[0], PROMPT[:-1], TREE),
        chunk_of(target, states[1], PROMPT[:2], None),
        chunk_of(target, states[2], PROMPT[:-1], DraftTree.root_only(5)),
    ]
    output = target.forward(chunks)
    assert output.cu_nodes.tolist() == [0, 4, 5]
    np.testing.assert_array_equal(output.logits[0].numpy(), output.logits[4].numpy())


def test_room_is_counted_and_comes_back() -> None:
    target, a, b = ToyTarget(vocab_size=VOCAB_SIZE, kv_tokens=10), state_of(), state_of(request_id="b")
    assert target.fits(10)
    assert not target.fits(11)
    chunk = chunk_of(target, a, PROMPT[:-1], TREE)
    assert target.num_held_tokens == 8
    assert target.has_room(2)
    assert not target.reserve(b, 3)
    assert target.num_held_tokens == 8
    target.forward([chunk])
    target.commit([chunk], [[0]])
    assert target.num_held_tokens == 5
    assert target.reserve(b, 5)
    target.release(a)
    target.release(b)
    target.release(b)
    assert target.num_held_tokens == 0
    assert target.request_ids == []


def test_room_reserved_in_parts_adds_up() -> None:
    target, state = ToyTarget(vocab_size=VOCAB_SIZE), state_of()
    assert target.reserve(state, 5)
    assert target.reserve(state, 3)
    target.forward([Chunk(state, ids(PROMPT[:-1]), TREE)])


def test_a_forward_without_its_room_is_refused() -> None:
    target, state = ToyTarget(vocab_size=VOCAB_SIZE), state_of()
    with pytest.raises(
        InternalError, match="0 cached and 0 reserved tokens, but its state says 0 cached and its chunk"
    ):
        target.forward([Chunk(state, ids(PROMPT), None)])


def test_a_state_that_claims_more_cache_than_is_held_is_refused() -> None:
    target, state = ToyTarget(vocab_size=VOCAB_SIZE), state_of()
    state.num_cached = 2
    with pytest.raises(InternalError, match="0 cached and 3 reserved tokens, but its state says 2 cached"):
        target.forward([chunk_of(target, state, PROMPT[2:], None)])


def test_two_chunks_of_one_request_are_refused() -> None:
    target, state = ToyTarget(vocab_size=VOCAB_SIZE), state_of()
    chunk = chunk_of(target, state, PROMPT, None)
    with pytest.raises(InternalError, match="two chunks"):
        target.forward([chunk, chunk])


@pytest.mark.parametrize("nodes", [[], [1], [0, 3], [0, 1, 2], [0, 2, 1]])
def test_only_a_path_from_the_root_can_be_kept(nodes: list[int]) -> None:
    target, state = ToyTarget(vocab_size=VOCAB_SIZE), state_of()
    chunk = chunk_of(target, state, PROMPT[:-1], TREE)
    target.forward([chunk])
    with pytest.raises(InternalError, match="must be a path from the root"):
        target.commit([chunk], [nodes])


def test_only_what_was_scored_can_be_committed() -> None:
    target, state = ToyTarget(vocab_size=VOCAB_SIZE), state_of()
    chunk = chunk_of(target, state, PROMPT, None)
    with pytest.raises(InternalError, match="was not scored"):
        target.commit([chunk], [[]])
    target.forward([chunk])
    with pytest.raises(InternalError, match="of a chunk without a tree"):
        target.commit([chunk], [[0]])


def test_a_chain_target_refuses_branches_and_any_target_a_tree_over_its_limit() -> None:
    target, state = ToyTarget(vocab_size=VOCAB_SIZE, supports_trees=False), state_of()
    with pytest.raises(InternalError, match="does not take"):
        target.forward([chunk_of(target, state, PROMPT[:-1], TREE)])
    target, state = ToyTarget(vocab_size=VOCAB_SIZE, max_draft_tokens=2), state_of()
    with pytest.raises(InternalError, match="does not take"):
        target.forward([chunk_of(target, state, PROMPT[:-1], TREE)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 1}, "vocab_size must be >= 2, got 1"),
        ({"vocab_size": 2, "order": 0}, "order must be >= 1 or None, got 0"),
        ({"vocab_size": 2, "sharpness": 0}, "sharpness must be > 0, got 0"),
        ({"vocab_size": 2, "kv_tokens": 0}, "kv_tokens must be >= 1, got 0"),
    ],
)
def test_a_wrong_option_is_named_with_its_rule(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ToyTarget(**options)  # type: ignore[arg-type]


def test_random_trees_are_valid_and_of_every_shape() -> None:
    drafter = RandomTreeDrafter(VOCAB_SIZE, seed=5)
    assert isinstance(drafter, Drafter)
    states = [state_of([1] * length) for length in range(1, 200)]
    trees = drafter.propose(states, [8] * len(states))
    for tree in trees:
        tree.check(VOCAB_SIZE)
        assert tree.num_draft_tokens <= 8
    assert {tree.num_draft_tokens for tree in trees} == set(range(9))
    assert sum(tree.is_chain and len(tree) > 3 for tree in trees) > 5
    assert sum(len(tree) > 3 and not tree.parents[1:].any() for tree in trees) > 5  # stars
    assert max(int(tree.depths().max()) for tree in trees) >= 6
    assert all(len(tree) == 1 for tree in drafter.propose(states, [0] * len(states)))


def test_a_random_tree_depends_on_request_position_and_seed_only() -> None:
    drafter = RandomTreeDrafter(VOCAB_SIZE)
    a, b = state_of(PROMPT, "a"), state_of(PROMPT, "b")
    alone = drafter.propose([a], [8])[0]
    beside = drafter.propose([b, a], [3, 8])[1]
    assert alone.token_ids.tolist() == beside.token_ids.tolist()
    assert alone.parents.tolist() == beside.parents.tolist()
    others = [RandomTreeDrafter(VOCAB_SIZE, seed=seed).propose([a], [8])[0].token_ids.tolist() for seed in range(5)]
    assert len({tuple(other) for other in others}) > 1


def test_an_oracle_drafts_what_it_was_told() -> None:
    drafter = OracleDrafter({"a": [6, 5, 4, 3]}, VOCAB_SIZE)
    assert isinstance(drafter, Drafter)
    state = state_of()
    assert drafter.propose([state], [3])[0].token_ids.tolist() == [5, 6, 5, 4]
    state.append([6, 5])
    assert drafter.propose([state], [3])[0].token_ids.tolist() == [5, 4, 3]
    assert len(drafter.propose([state], [0])[0]) == 1


def test_an_oracle_can_be_wrong_from_some_depth_on() -> None:
    drafter = OracleDrafter({"a": [6, 5, 4, 3]}, VOCAB_SIZE, wrong_from=2)
    [tree] = drafter.propose([state_of()], [4])
    assert tree.token_ids[1] == 6
    assert not set(zip(tree.token_ids[2:].tolist(), [5, 4, 3], strict=True)) & {(5, 5), (4, 4), (3, 3)}


@pytest.mark.parametrize("budget", range(10))
def test_an_oracle_can_hide_the_right_token_among_wrong_siblings(budget: int) -> None:
    output = [6, 5, 4, 3]
    drafter = OracleDrafter({"a": output}, VOCAB_SIZE, num_wrong_siblings=2)
    [tree] = drafter.propose([state_of()], [budget])
    tree.check(VOCAB_SIZE)
    assert tree.num_draft_tokens == budget
    right = [tree.token_ids[tree.path(node)[1:]].tolist() for node in range(3, len(tree), 3)]
    assert right == [output[: depth + 1] for depth in range(budget // 3)]


def test_an_oracle_refuses_more_wrong_siblings_than_there_are_wrong_tokens() -> None:
    with pytest.raises(ConfigError, match="num_wrong_siblings must be below V - 1, got 6"):
        OracleDrafter({}, VOCAB_SIZE, num_wrong_siblings=6)


def test_a_scripted_sampler_gives_its_script_and_writes_down_what_it_is_told() -> None:
    sampler, state = ScriptedSampler([[1, 2], [3]]), state_of()
    sampler.start(state)
    assert sampler.target_ids([state], [TREE], None).tolist() == [1, 2]  # type: ignore[arg-type]
    sampler.commit(state, ids([1]))  # type: ignore[arg-type]
    assert sampler.target_ids([state], [TREE], None).tolist() == [3]  # type: ignore[arg-type]
    sampler.stop(["a"])
    assert sampler.calls == [("start", "a"), ("commit", ("a", [1])), ("stop", ["a"])]


def test_random_trees_of_the_test_helpers_are_valid() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        random_tree(rng, VOCAB_SIZE, 10).check(VOCAB_SIZE)
