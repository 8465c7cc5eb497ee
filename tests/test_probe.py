"""The probe against models whose attention is known, and against mask predicates written here."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specdec.errors import UnsupportedError
from specdec.probe import attention_implementation, forward_inputs, probe

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 99,
    "pad_token_id": 0,
}


class OneCall(nn.Module):
    """One attention call with a mask from a given predicate, the way models of transformers make it."""

    def __init__(self, predicate, change_mask=lambda mask: mask, **kwargs):
        super().__init__()
        self.config = transformers.LlamaConfig(**SMALL)
        self.config._attn_implementation = "sdpa"
        self.embedding = nn.Embedding(10, 8)
        self.predicate, self.change_mask, self.kwargs = predicate, change_mask, kwargs

    def forward(self, input_ids, position_ids=None):
        name = self.config._attn_implementation
        length = input_ids.shape[1]
        x = self.embedding(input_ids)[:, None]
        mask = ALL_MASK_ATTENTION_FUNCTIONS[name](1, length, length, mask_function=self.predicate, device=x.device)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, None)
        out, _ = attend(self, x, x, x, self.change_mask(mask), scaling=0.5, **self.kwargs)
        return out


def sliding(window):
    return lambda b, h, q, k: (k <= q) & (k > q - window)


def chunked(size):
    return lambda b, h, q, k: (k <= q) & (k // size == q // size)


def full(b, h, q, k):
    return k <= q


def kinds(model, **kwargs):
    return [(call.mask_kind, call.window) for call in probe(model, **kwargs)]


@pytest.mark.parametrize("window", [2, 3, 63, 64, 65, 1000, 4096, 131072])
def test_a_sliding_window_of_any_width_is_found(window):
    assert kinds(OneCall(sliding(window))) == [("sliding", window)]


@pytest.mark.parametrize("size", [2, 3, 63, 64, 65, 1000, 8192])
def test_a_chunk_of_any_size_is_found(size):
    assert kinds(OneCall(chunked(size))) == [("chunked", size)]


@pytest.mark.parametrize("limit", [2, 3, 64, 65, 1 << 18])
def test_full_causal_attention_is_full_at_any_limit(limit):
    assert kinds(OneCall(full), limit=limit) == [("full", None)]


@pytest.mark.parametrize(("limit", "kind"), [(100, ("full", None)), (101, ("sliding", 100))])
def test_a_window_counts_only_where_sequences_can_reach_it(limit, kind):
    assert kinds(OneCall(sliding(100)), limit=limit) == [kind]


TABLE = torch.tensor([True, False, True, True])


@pytest.mark.parametrize(
    "predicate",
    [
        pytest.param(lambda b, h, q, k: q >= 0, id="bidirectional"),
        pytest.param(lambda b, h, q, k: abs(q - k) <= 8, id="bidirectional window"),
        pytest.param(lambda b, h, q, k: (k <= q) & (k % 2 == q % 2), id="strided"),
        pytest.param(lambda b, h, q, k: (k <= q) & ((k > q - 8) | (k < 4)), id="window and first tokens"),
        pytest.param(lambda b, h, q, k: (k <= q) | (k < 3), id="bidirectional prefix"),
        pytest.param(lambda b, h, q, k: (k <= q) & TABLE[k], id="table of the tokens it was made for"),
    ],
)
def test_a_law_that_is_not_ours_is_other(predicate):
    model = OneCall(predicate)
    if "TABLE" in predicate.__code__.co_names:
        with pytest.raises(IndexError):
            predicate(0, 0, torch.tensor(9), torch.tensor(9))
    assert kinds(model) == [("other", None)]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda mask: None, id="dropped"),
        pytest.param(lambda mask: mask.float(), id="cast"),
        pytest.param(lambda mask: mask & torch.ones(4, dtype=torch.bool), id="combined"),
        pytest.param(lambda mask: mask.logical_or_(torch.ones(4, dtype=torch.bool)), id="changed in place"),
    ],
)
def test_a_mask_that_the_model_changed_is_other(change):
    assert kinds(OneCall(full, change)) == [("other", None)]


def test_a_mask_that_the_model_slices_to_the_same_shape_is_known():
    assert kinds(OneCall(full, lambda mask: mask[:, :, :, :4])) == [("full", None)]


def test_unknown_keyword_arguments_are_named_and_harmless_ones_are_not():
    (call,) = probe(OneCall(full, position_bias=torch.zeros(1), position_ids=torch.zeros(1), indices=None))
    assert call.extra_kwargs == ("position_bias",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_geometry_of_every_call_is_recorded(dtype):
    config = transformers.Gemma2Config(
        **SMALL, sliding_window=8, attn_logit_softcapping=30.0, query_pre_attn_scalar=16, layer_types=None
    )
    calls = probe(transformers.Gemma2ForCausalLM(config).to(dtype).eval())
    assert [(c.mask_kind, c.window) for c in calls] == [("sliding", 8), ("full", None), ("sliding", 8)]
    assert {(c.num_query_heads, c.num_kv_heads, c.key_dim, c.value_dim) for c in calls} == {(4, 2, 8, 8)}
    assert {(c.scaling, c.softcap, c.has_sinks, c.extra_kwargs) for c in calls} == {(0.25, 30.0, False, ())}
    assert [c.layer_name for c in calls] == [f"model.layers.{i}.self_attn" for i in range(3)]


def test_sinks_are_seen():
    config = transformers.GptOssConfig(**SMALL, num_local_experts=4, sliding_window=128)
    calls = probe(transformers.GptOssForCausalLM(config).eval())
    assert [c.has_sinks for c in calls] == [True] * 3
    assert [(c.mask_kind, c.window) for c in calls] == [("sliding", 128), ("full", None), ("sliding", 128)]


def test_a_window_that_is_only_in_the_mask_is_seen():
    config = transformers.PhimoeConfig(**SMALL, sliding_window=2047, num_local_experts=2)
    assert kinds(transformers.PhimoeForCausalLM(config).eval()) == [("sliding", 2047)] * 3


def test_a_chunk_that_is_only_in_the_mask_is_seen():
    config = transformers.Llama4TextConfig(
        **SMALL, attention_chunk_size=96, num_local_experts=2, intermediate_size_mlp=32, layer_types=None
    )
    assert ("chunked", 96) in kinds(transformers.Llama4ForCausalLM(config).eval())


def test_a_model_with_attention_of_its_own_makes_no_call():
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99, state_size=4)
    assert probe(transformers.MambaForCausalLM(config).eval()) == ()


def test_the_implementation_is_restored_everywhere_even_after_an_error():
    config = transformers.Gemma3Config(
        text_config={**SMALL, "sliding_window": 8},
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.config.vision_config._attn_implementation = "eager"
    before = [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]
    assert before == ["sdpa", "sdpa", "eager"]

    def fail_inside():
        with attention_implementation(model, "specdec_probe"):
            assert model.config.text_config._attn_implementation == "specdec_probe"
            raise ZeroDivisionError

    pytest.raises(ZeroDivisionError, fail_inside)
    assert len(probe(model)) == 3
    after = [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]
    assert after == before


def test_a_forward_that_fails_is_reported_with_its_error():
    def fail(mask):
        raise KeyError("no such mask")

    model = OneCall(full, fail)
    with pytest.raises(UnsupportedError, match=r"OneCall cannot be probed.*KeyError: 'no such mask'"):
        probe(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_limit_below_two_is_refused():
    with pytest.raises(ValueError, match="limit must be >= 2, got 1"):
        probe(OneCall(full), limit=1)


def test_forward_inputs_are_the_declared_names():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    assert {"input_ids", "position_ids", "past_key_values", "logits_to_keep"} <= forward_inputs(model)
    assert "kwargs" not in forward_inputs(model)
    assert forward_inputs(OneCall(full)) == {"input_ids", "position_ids"}
