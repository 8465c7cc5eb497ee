"""The chain target against ``model.generate``, and its book-keeping."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.chain_target import ChainTarget
from specdec.errors import ConfigError, InternalError, UnsupportedError
from specdec.types import Chunk, DraftTree, Request, RequestState
from tests.architectures import ARCHITECTURES
from tests.greedy import decode, generate, prompts

CROPPED = ["llama", "gemma3_text", "gpt_oss", "bloom", "mpt", "falcon", "xglm", "doge", "lfm2", "deepseek_v32"]
REPLAYED = ["qwen3_next", "qwen3_5_text", "olmo_hybrid", "bailing_hybrid", "kimi_linear", "bamba", "granitemoehybrid"]
TOKEN_BY_TOKEN = ["mamba", "falcon_mamba", "jamba", "zamba", "nemotron_h"]
NUM_NEW = 26


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def target_of(name, **options):
    return ChainTarget(ARCHITECTURES[name](), **{"kv_tokens": 400, "max_length": 200, **options})


def state_of(name="r", length=5, vocab_size=128):
    return RequestState(Request(name, prompts(vocab_size, (length,))[0]))


def forward(target, state, num_prefix, drafts=None):
    """One reserved forward of one request; the chunk."""
    prefix = state.token_ids[state.num_cached : state.num_cached + num_prefix].copy()
    tree = None if drafts is None else DraftTree.chain(int(state.token_ids[-1]), drafts)
    chunk = Chunk(state, prefix, tree)
    assert target.reserve(state, chunk.num_tokens)
    return chunk, target.forward([chunk])


@pytest.mark.parametrize("name", CROPPED + REPLAYED)
def test_chains_with_rejections_say_what_generate_says(name):
    model = ARCHITECTURES[name]()
    asked = prompts(128)
    expected = [generate(model, p, NUM_NEW) for p in asked]
    target = ChainTarget(model, kv_tokens=400, max_length=200)
    assert decode(target, asked, expected, NUM_NEW) == expected
    assert target.has_room(400)
    assert not target.has_room(401)


@pytest.mark.parametrize("name", TOKEN_BY_TOKEN)
def test_without_drafts_it_feeds_what_generate_feeds(name):
    model = ARCHITECTURES[name]()
    asked = prompts(128)
    expected = [generate(model, p, NUM_NEW) for p in asked]
    target = ChainTarget(model, kv_tokens=400, max_length=200, max_draft_tokens=0)
    assert decode(target, asked, expected, NUM_NEW) == expected
    assert target.has_room(400)


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_many_rejections_in_a_row_lose_nothing(name):
    model = ARCHITECTURES[name]()
    asked = prompts(128, (7,))
    expected = [generate(model, asked[0], 60)]
    nothing_right = [[] for _ in asked]
    assert decode(ChainTarget(model, kv_tokens=99, max_length=99), asked, nothing_right, 60) == expected


def test_a_rejection_costs_no_forward_of_its_own(monkeypatch):
    target = target_of("qwen3_next")
    state = state_of()
    chunk, _ = forward(target, state, 4, [9, 9, 9])
    target.commit([chunk], [[0, 1]])
    state.num_cached += 6
    state.append([9, 7])
    fed = []
    row = target._row
    monkeypatch.setattr(target, "_row", lambda ids, **options: fed.append(len(ids)) or row(ids, **options))
    target._row.device = row.device
    forward(target, state, 0, [9])
    assert fed == [6 + 2]  # the accepted tokens again, together with the new ones


@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_logits_after_a_commit_are_those_of_a_fresh_prefill(name):
    target = target_of(name)
    used, fresh = state_of("used"), state_of("fresh")
    chunk, _ = forward(target, used, 4, [11, 12, 13])
    target.commit([chunk], [[0, 1, 2]])
    used.num_cached += 7
    used.append([11, 12, 14])
    fresh.append([11, 12, 14])
    _, after = forward(target, used, 0, [15, 16])
    _, expected = forward(target, fresh, 7, [15, 16])
    torch.testing.assert_close(after.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_room_is_refused_when_full_and_comes_back():
    target = target_of("llama", kv_tokens=10)
    first, second = state_of("first"), state_of("second")
    assert target.reserve(first, 6)
    assert not target.reserve(second, 5)
    assert target.reserve(second, 4)
    target.release(first)
    assert target.has_room(6)
    target.release(first)  # unknown now: no error
    target.release(second)
    assert target.has_room(10)


def test_dropped_draft_tokens_free_their_room():
    target = target_of("llama", kv_tokens=12)
    state = state_of()
    chunk, _ = forward(target, state, 4, [9] * 7)
    assert not target.has_room(1)
    target.commit([chunk], [[0, 1]])
    assert target.has_room(6)
    assert not target.has_room(7)


def test_fits_is_bounded_by_room_and_by_length():
    target = target_of("llama", kv_tokens=50, max_length=80)
    assert target.fits(50)
    assert not target.fits(51)
    assert not target_of("llama", kv_tokens=90, max_length=80).fits(81)


def test_a_prefill_piece_has_no_logits():
    target = target_of("llama")
    _, output = forward(target, state_of(), 3)
    assert output.logits.shape == (0, 128)
    assert output.cu_nodes.tolist() == [0]


def test_rows_follow_the_order_of_trees():
    target = target_of("llama")
    states = [state_of(f"r{i}", 3 + i) for i in range(3)]
    chunks = []
    for state, drafts in zip(states, ([9], None, [9, 8, 7]), strict=True):
        tree = None if drafts is None else DraftTree.chain(int(state.token_ids[-1]), drafts)
        chunk = Chunk(state, state.token_ids[:-1].copy(), tree)
        assert target.reserve(state, chunk.num_tokens)
        chunks.append(chunk)
    output = target.forward(chunks)
    assert output.cu_nodes.tolist() == [0, 2, 6]
    assert output.logits.shape == (6, 128)


def test_a_branching_tree_is_a_bug_of_the_caller():
    target = target_of("llama")
    state = state_of()
    tree = DraftTree(np.array([5, 6, 7], dtype=np.int32), np.array([-1, 0, 0], dtype=np.int32))
    assert target.reserve(state, 7)
    with pytest.raises(InternalError, match="a tree with branches went to a chain target"):
        target.forward([Chunk(state, state.token_ids[:4].copy(), tree)])


def test_a_cache_that_is_not_what_the_state_says_is_a_bug_of_the_caller():
    target = target_of("llama")
    state = state_of()
    state.num_cached = 3
    assert target.reserve(state, 2)
    with pytest.raises(InternalError, match="0 cached tokens, 3 expected"):
        target.forward([Chunk(state, state.token_ids[3:4].copy(), None)])


def test_models_without_a_cache_are_unsupported():
    with pytest.raises(UnsupportedError, match=r"OpenAIGPTLMHeadModel.forward takes no cache"):
        target_of("openai-gpt")
    with pytest.raises(UnsupportedError, match=r"does not run with transformers' DynamicCache"):
        target_of("minimax")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_tokens": 0}, "kv_tokens must be >= 1, got 0"),
        ({"max_length": 0}, "max_length must be >= 1, got 0"),
        ({"max_draft_tokens": -1}, "max_draft_tokens must be >= 0, got -1"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        target_of("llama", **options)
