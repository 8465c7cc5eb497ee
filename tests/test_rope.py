"""Freezing RoPE kinds whose frequencies follow the sequence length."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from specdec.errors import ConfigError, UnsupportedError
from specdec.rope import freeze_rope
from specdec.routes import choose_route
from specdec.toy import OracleDrafter
from specdec.tree_target import TreeTarget
from specdec.types import SamplingParams
from tests.greedy import generate, prompts
from tests.serving import serve, target_for, texts

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 99,
    "pad_token_id": 0,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,  # logits that a change of frequencies moves visibly
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.0, 1.0, 1.0],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
}


def llama(rope_parameters):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, rope_parameters=rope_parameters)).eval()


def gemma3(rope_parameters):
    torch.manual_seed(0)
    both = {"full_attention": rope_parameters, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    layer_types = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**SMALL, rope_parameters=both, layer_types=layer_types)
    return transformers.Gemma3ForCausalLM(config).eval()


def logits(model, length):
    ids = torch.arange(length)[None] % 90 + 3
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


KINDS = pytest.mark.parametrize(
    ("build", "rope_parameters"),
    [(llama, DYNAMIC), (llama, LONGROPE), (gemma3, DYNAMIC), (gemma3, LONGROPE)],
    ids=["dynamic", "longrope", "dynamic by layer type", "longrope by layer type"],
)


@KINDS
def test_a_frozen_model_gives_a_token_the_same_logits_in_any_company(build, rope_parameters):
    model = build(rope_parameters)
    moving = logits(model, 40)[:, :8] - logits(model, 8)
    assert moving.abs().max() > 1e-2, "the test needs a model whose frequencies move"
    with freeze_rope(model, 40):
        torch.testing.assert_close(logits(model, 40)[:, :8], logits(model, 8), rtol=0, atol=1e-5)


@KINDS
def test_a_sequence_of_the_longest_length_is_unchanged_by_freezing(build, rope_parameters):
    expected = logits(build(rope_parameters), 40)
    model = build(rope_parameters)
    with freeze_rope(model, 40) as freeze:
        assert torch.equal(logits(model, 40), expected)
        (notice,) = freeze.notices
        assert rope_parameters["rope_type"] in notice
        assert "max_length = 40" in notice


@KINDS
def test_within_the_original_context_nothing_changes_and_nothing_is_said(build, rope_parameters):
    model = build(rope_parameters)
    expected = logits(model, 12)
    with freeze_rope(model, 16) as freeze:
        assert torch.equal(logits(model, 12), expected)
        assert freeze.notices == ()


@KINDS
def test_a_longer_sequence_before_freezing_leaves_no_trace(build, rope_parameters):
    fresh, used = build(rope_parameters), build(rope_parameters)
    logits(used, 90)
    with freeze_rope(fresh, 40), freeze_rope(used, 40):
        assert torch.equal(logits(fresh, 30), logits(used, 30))


@KINDS
def test_restore_brings_the_moving_frequencies_back(build, rope_parameters):
    model = build(rope_parameters)
    expected = [logits(model, length) for length in (8, 60, 8)]
    freeze_rope(model, 40).restore()
    assert all(torch.equal(logits(model, n), e) for n, e in zip((8, 60, 8), expected, strict=True))
    assert type(model.model.rotary_emb.rope_type) is type(build(rope_parameters).model.rotary_emb.rope_type)


def test_two_holders_share_a_length_and_the_last_one_restores():
    model = llama(DYNAMIC)
    first, second = freeze_rope(model, 40), freeze_rope(model, 40)
    first.restore()
    first.restore()  # a second call of one holder must not count for the other
    assert model.model.rotary_emb.rope_type == "default"
    second.restore()
    assert model.model.rotary_emb.rope_type == "dynamic"


def test_two_lengths_on_one_model_are_refused():
    model = llama(DYNAMIC)
    with freeze_rope(model, 40):
        with pytest.raises(ConfigError, match=r"in use for max_length 40 and cannot serve max_length 50"):
            freeze_rope(model, 50)
        assert model.model.rotary_emb.rope_type == "default"
    with freeze_rope(model, 50):
        assert model.model.rotary_emb.rope_type == "default"


def test_ordinary_rope_is_left_alone():
    model = llama({"rope_type": "default", "rope_theta": 10000.0})
    with freeze_rope(model, 40) as freeze:
        assert freeze.notices == ()
        assert not hasattr(model.model.rotary_emb, "_specdec_frozen_rope")


def test_an_embedding_that_cannot_run_alone_is_an_error_and_stays_as_it_was():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.rope_type = "dynamic"
            self.inv_freq = nn.Buffer(torch.ones(4))

        def forward(self, grid):
            return grid

    model = nn.Sequential(Odd())
    with pytest.raises(UnsupportedError, match="could not be frozen"):
        freeze_rope(model, 40)
    assert model[0].rope_type == "dynamic"


def test_max_length_must_be_positive():
    with pytest.raises(ConfigError, match="max_length must be >= 1, got 0"):
        freeze_rope(llama(DYNAMIC), 0)


@KINDS
def test_an_engine_over_frozen_rope_says_what_generate_says(build, rope_parameters):
    model = build(rope_parameters)
    asked = prompts(99, (5, 12, 21))
    how = [SamplingParams(max_new_tokens=30)] * 3
    with freeze_rope(model, 60):
        expected = [generate(model, prompt, 30) for prompt in asked]
        target = target_for(model, choose_route(model, max_length=60))
        drafter = OracleDrafter({str(i): ids for i, ids in enumerate(expected)}, 99, num_wrong_siblings=1, wrong_from=3)
        assert texts(serve(target, drafter, asked, how, budget=6, num_late=1)) == expected
    assert isinstance(target, TreeTarget)
