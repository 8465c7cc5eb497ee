"""Bad fields get one clear message each; the mutable record grows without losing a token."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.errors import RequestError
from specdec.types import Chunk, DraftTree, Request, RequestState, SamplingParams, VerifyResult

BAD_FIELDS = [
    ("temperature", -0.1, "temperature must be >= 0, got -0.1"),
    ("temperature", math.nan, "temperature must be >= 0, got nan"),
    ("temperature", math.inf, "temperature must be >= 0, got inf"),
    ("top_k", -1, "top_k must be >= 0 (0 = off), got -1"),
    ("top_k", 2.5, "top_k must be an integer, got 2.5"),
    ("top_p", 0.0, "top_p must be in (0, 1], got 0.0"),
    ("top_p", 1.3, "top_p must be in (0, 1], got 1.3"),
    ("top_p", math.nan, "top_p must be in (0, 1], got nan"),
    ("min_p", -0.1, "min_p must be in [0, 1], got -0.1"),
    ("min_p", 1.1, "min_p must be in [0, 1], got 1.1"),
    ("typical_p", 0.0, "typical_p must be in (0, 1], got 0.0"),
    ("epsilon_cutoff", 1.0, "epsilon_cutoff must be in [0, 1), got 1.0"),
    ("eta_cutoff", -0.5, "eta_cutoff must be in [0, 1), got -0.5"),
    ("repetition_penalty", 0.0, "repetition_penalty must be > 0 and finite, got 0.0"),
    ("repetition_penalty", math.inf, "repetition_penalty must be > 0 and finite, got inf"),
    ("presence_penalty", math.inf, "presence_penalty must be finite, got inf"),
    ("frequency_penalty", math.nan, "frequency_penalty must be finite, got nan"),
    ("no_repeat_ngram_size", -2, "no_repeat_ngram_size must be >= 0 (0 = off), got -2"),
    ("min_new_tokens", -1, "min_new_tokens must be >= 0, got -1"),
    ("max_new_tokens", 0, "max_new_tokens must be >= 1, got 0"),
    ("max_new_tokens", 3.0, "max_new_tokens must be an integer, got 3.0"),
    ("max_new_tokens", True, "max_new_tokens must be an integer, got True"),
    ("seed", -1, "seed must be in [0, 2**64), got -1"),
    ("seed", 2**64, "seed must be in [0, 2**64), got 18446744073709551616"),
    ("stop_strings", ("a", ""), "stop_strings must be non-empty strings, got ('a', '')"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_FIELDS, ids=[f"{n}={v}" for n, v, _ in BAD_FIELDS])
def test_a_bad_sampling_field_is_named_with_its_rule_and_value(name: str, value: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value) == message


def test_the_edges_of_every_rule_are_allowed() -> None:
    params = SamplingParams(
        temperature=0.0, top_p=1.0, min_p=1.0, typical_p=1.0, max_new_tokens=1, seed=2**64 - 1, top_k=np.int64(3)
    )
    assert params.is_greedy
    assert not SamplingParams(temperature=1e-3).is_greedy


BAD_PROMPTS = [
    ([], "prompt_ids must be a non-empty list of token ids, got shape (0,)"),
    ([[1, 2]], "prompt_ids must be a non-empty list of token ids, got shape (1, 2)"),
    (7, "prompt_ids must be a non-empty list of token ids, got shape ()"),
    ([1.5, 2.0], "prompt_ids must be integers, got float64"),
    ([1, -3], "prompt_ids must be in [0, 2**31), got -3"),
    (np.array([2**32 + 5]), "prompt_ids must be in [0, 2**31), got 4294967301"),  # would wrap around to 5
]


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS, ids=[str(p) for p, _ in BAD_PROMPTS])
def test_a_bad_prompt_is_refused(prompt: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request("r", prompt)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
def test_a_request_keeps_its_own_copy_of_the_prompt(dtype: type) -> None:
    prompt = np.array([3, 1, 2], dtype=dtype)
    request = Request("r", prompt)
    prompt[0] = 9
    assert request.prompt_ids.dtype == np.int32
    assert request.prompt_ids.tolist() == [3, 1, 2]


def test_a_list_is_a_prompt() -> None:
    assert Request("r", [3, 1, 2]).prompt_ids.tolist() == [3, 1, 2]  # type: ignore[arg-type]


@given(
    prompt=st.lists(st.integers(0, 99), min_size=1, max_size=80),
    blocks=st.lists(st.lists(st.integers(0, 99), max_size=40), max_size=12),
)
def test_a_state_holds_prompt_and_output_however_they_come(prompt: list[int], blocks: list[list[int]]) -> None:
    state = RequestState(Request("r", np.array(prompt, dtype=np.int32)))
    output: list[int] = []
    for block in blocks:
        state.append(np.array(block, dtype=np.int32) if len(block) % 2 else block)
        output += block
        assert state.token_ids.tolist() == prompt + output
        assert state.output_ids.tolist() == output
        assert state.num_tokens == len(prompt) + len(output)
        assert state.num_output_tokens == len(output)
    assert state.num_prompt_tokens == len(prompt)
    assert not state.is_finished


def test_the_buffer_of_a_state_is_copied_rarely() -> None:
    state = RequestState(Request("r", np.array([1], dtype=np.int32)))
    buffers = {id(state._buffer)}
    keep_alive = [state._buffer]
    for token in range(10_000):
        state.append([token])
        if id(state._buffer) not in buffers:
            buffers.add(id(state._buffer))
            keep_alive.append(state._buffer)
    assert len(buffers) <= 10


def test_a_chunk_counts_prefix_and_tree() -> None:
    state = RequestState(Request("r", np.array([1, 2, 3], dtype=np.int32)))
    assert Chunk(state, state.token_ids[:2], None).num_tokens == 2
    assert Chunk(state, state.token_ids[:2], DraftTree.chain(3, [4, 5])).num_tokens == 5


def test_acceptance_length_counts_the_bonus_token() -> None:
    result = VerifyResult(np.array([2, 5], dtype=np.int32), np.array([7, 8], dtype=np.int32), 9)
    assert (result.num_accepted, result.acceptance_length) == (2, 3)


def test_the_words_load_without_torch() -> None:
    code = "import sys, specdec.types, specdec.protocols; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
