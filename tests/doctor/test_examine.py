"""Whole examinations of models that take different paths."""

from __future__ import annotations

import json

import pytest
import torch

from specdec.doctor import examine
from specdec.doctor.memory import estimate_memory, state_nbytes, summarise_attention
from specdec.errors import ConfigError
from specdec.probe import probe
from tests.tiny_kinds import headless_model, hybrid_model, sliding_model
from tests.tiny_models import byte_tokenizer, tiny_llama


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def test_a_llama_takes_the_tree_path_and_its_memory_adds_up():
    model = tiny_llama()
    report = examine(model, byte_tokenizer(), batch=3, context=100, seconds=1)
    assert (report.path, report.reasons, report.can_draft) == ("tree", (), True)
    [attention] = report.attention
    assert (attention.num_calls, attention.mask_kind, attention.num_kv_heads, attention.key_dim) == (2, "full", 2, 8)
    memory = report.memory
    assert memory is not None
    assert memory.kv_nbytes_per_token == 2 * 2 * (8 + 8) * 4  # layers x heads x (key + value) x bytes
    assert memory.request_nbytes == 100 * memory.kv_nbytes_per_token
    assert memory.total_nbytes == memory.weights_nbytes + 3 * memory.request_nbytes
    assert memory.weights_nbytes >= sum(p.nbytes for p in model.parameters())
    assert report.costs is not None
    assert (report.costs.batch, report.costs.context) == (3, 100)
    assert [problem for problem in report.problems if problem.area != "probe"] == []


def test_layers_with_windows_are_told_apart_and_cost_their_window_only():
    model = sliding_model()
    attention = summarise_attention(probe(model, limit=512), 4)
    assert {(a.mask_kind, a.window, a.num_calls) for a in attention} == {("sliding", 8, 2), ("full", None, 2)}
    short = estimate_memory(model, attention, batch=1, context=10)
    long = estimate_memory(model, attention, batch=1, context=400)
    assert short.request_nbytes == 10 * short.kv_nbytes_per_token
    assert long.kv_nbytes_per_far_token == long.kv_nbytes_per_token // 2
    assert long.request_nbytes == (400 + 2 * 8) * long.kv_nbytes_per_far_token


def test_a_hybrid_model_takes_the_chain_path_and_says_why():
    report = examine(hybrid_model(), byte_tokenizer(), context=32, seconds=0.1)
    assert report.path == "chain"
    assert any(reason.startswith("tree: ") for reason in report.reasons)
    assert report.memory is not None
    assert report.memory.state_nbytes > 0
    assert report.costs is not None
    assert report.costs.break_even[-1].budget == 31


def test_a_state_is_what_does_not_grow():
    assert state_nbytes(tiny_llama()) == 0
    hybrid = state_nbytes(hybrid_model())
    assert hybrid is not None
    assert hybrid >= 3 * 4 * 8 * 8 * 4  # recurrent matrices of three layers: heads x key x value x bytes


def test_a_model_that_cannot_be_served_is_refused_with_the_reason():
    report = examine(headless_model(), None, seconds=0)
    assert report.path == "refused"
    assert report.reasons
    assert not report.can_draft
    assert report.memory is None


def test_a_context_beyond_the_model_is_cut_with_a_note():
    report = examine(tiny_llama(), byte_tokenizer(), context=9999, seconds=0.05)
    assert report.memory is not None
    assert report.memory.context == 256
    assert any("cut from 9999 to the model's 256" in problem.message for problem in report.problems)


def test_rope_that_follows_the_length_is_a_warning():
    config = tiny_llama().config
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    }  # fmt: skip
    report = examine(type(tiny_llama())(config).eval(), byte_tokenizer(), seconds=0)
    assert any(problem.area == "rope" and "longrope" in problem.message for problem in report.problems)


def test_the_report_is_json():
    report = examine(tiny_llama(), byte_tokenizer(), context=16, seconds=0.05)
    entry = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert entry["path"] == "tree"
    assert entry["costs"]["break_even"][0] == {
        "budget": 0,
        "ms": entry["costs"]["break_even"][0]["ms"],
        "acceptance_length": 1.0,
    }


def test_costs_that_rest_on_little_are_said_to():
    report = examine(tiny_llama(), byte_tokenizer(), context=16, seconds=1e-6)
    assert report.costs is not None
    assert report.costs.num_rounds == 1
    assert any("rest on 1 rounds only" in problem.message for problem in report.problems)


@pytest.mark.parametrize(("option", "value"), [("batch", 0), ("context", 0), ("seconds", -1)])
def test_options_outside_their_rules_are_refused(option: str, value: int):
    with pytest.raises(ConfigError, match=f"{option} must be >= .*, got {value}"):
        examine(tiny_llama(), None, **{option: value})  # type: ignore[arg-type]
