"""The plain target against ``model.generate``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.errors import ConfigError, InternalError
from specdec.plain_target import PlainTarget
from specdec.types import Chunk, DraftTree, Request, RequestState
from tests.architectures import ARCHITECTURES
from tests.greedy import decode, generate, prompts


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["llama", "openai-gpt", "rwkv", "recurrent_gemma", "mamba", "zamba", "minimax"])
@pytest.mark.parametrize("draft_length", [0, 4])
def test_it_says_what_generate_says(name, draft_length):
    model = ARCHITECTURES[name]()
    asked = prompts(128, (5, 13))
    expected = [generate(model, p, 20) for p in asked]
    target = PlainTarget(model, max_length=200)
    assert decode(target, asked, expected, 20, draft_length=draft_length) == expected


def test_it_holds_nothing():
    target = PlainTarget(ARCHITECTURES["llama"](), max_length=50)
    state = RequestState(Request("r", prompts(128, (5,))[0]))
    assert target.reserve(state, 10**9)
    assert target.has_room(10**9)
    assert target.fits(50)
    assert not target.fits(51)
    target.release(state)


def test_a_prefill_piece_runs_no_forward():
    model = ARCHITECTURES["llama"]()
    target = PlainTarget(model, max_length=50)
    model.forward = None  # any call would fail
    state = RequestState(Request("r", prompts(128, (5,))[0]))
    output = target.forward([Chunk(state, state.token_ids[:3].copy(), None)])
    assert output.logits.shape == (0, 128)
    assert output.cu_nodes.tolist() == [0]


def test_a_branching_tree_is_a_bug_of_the_caller():
    target = PlainTarget(ARCHITECTURES["llama"](), max_length=50)
    state = RequestState(Request("r", prompts(128, (1,))[0]))
    tree = DraftTree(np.array([5, 6, 7], dtype=np.int32), np.array([-1, 0, 0], dtype=np.int32))
    with pytest.raises(InternalError, match="a tree with branches went to a chain target"):
        target.forward([Chunk(state, state.token_ids[:0].copy(), tree)])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_length": 0}, "max_length must be >= 1, got 0"), ({"max_length": 9, "max_draft_tokens": -1}, "got -1")],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        PlainTarget(ARCHITECTURES["llama"](), **options)
