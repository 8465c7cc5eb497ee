"""``numerics="strict"``: the logits of a token have the same bits, drafted or not, alone or in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from specdec.build import build_engine
from specdec.check.hostile import HostileDrafter
from specdec.errors import ConfigError, UnsupportedError
from specdec.packed_linear import PackedLinear
from specdec.strict_attention import paths_of
from specdec.types import Request, SamplingParams, StepEvent
from tests.oracles import random_tree

SIZES = {
    "vocab_size": 300, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "eos_token_id": None,
    "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=40)),
}


def make(kind: str, dtype: torch.dtype):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MODELS[kind]().to(dtype).eval()


class Recorder:
    """The logits from which each token of each request came."""

    def __init__(self) -> None:
        self.logits: dict[tuple[str, int], torch.Tensor] = {}

    def observe(self, events: Sequence[StepEvent]) -> None:
        for event in events:
            first = int(event.output.cu_nodes[event.row])
            nodes = [0, *event.result.accepted_nodes.tolist()][: len(event.emitted_ids)]
            for offset, node in enumerate(nodes):
                key = (event.state.request_id, event.trace.position + offset)
                self.logits[key] = event.output.logits[first + node].clone()


def decode(model, prompts, drafter, *, batch: int, temperature: float, numerics: str, prefill: int):
    recorder, found = Recorder(), {}
    with build_engine(
        model, drafter, budget=0 if drafter == "none" else 9, observers=[recorder], numerics=numerics,
        max_batch_size=batch, max_prefill_tokens=prefill, max_length=700, kv_tokens=3000,
    ) as engine:  # fmt: skip
        requests = [
            Request(str(i), p, SamplingParams(max_new_tokens=14, temperature=temperature, seed=i))
            for i, p in enumerate(prompts)
        ]
        for output in engine.generate(requests):
            found.setdefault(output.request_id, []).extend(output.new_ids)
    return found, recorder.logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_changes_no_bit_of_any_logits(kind, dtype, temperature):
    model = make(kind, dtype)
    rng = np.random.default_rng(0)
    # The second request crosses a block of 512 keys while it is decoded, the third a window within its prompt.
    prompts = [rng.integers(1, 300, n).astype(np.int32) for n in (7, 505, 95)]
    settings = {"temperature": temperature, "numerics": "strict"}
    plain, expected = decode(model, prompts, "none", batch=1, prefill=512, **settings)
    hostile = HostileDrafter({key: [ids] for key, ids in plain.items()}, 300)
    drafted, logits = decode(model, prompts, hostile, batch=3, prefill=64, **settings)
    assert drafted == plain
    assert logits.keys() == expected.keys()
    assert [key for key, row in logits.items() if not torch.equal(row, expected[key])] == []
    assert type(model.lm_head) is torch.nn.Linear, "closing the engine gave the weights back"


def test_default_numerics_do_change_bits_so_the_test_above_can_fail():
    model = make("llama", torch.float32)
    prompts = [np.arange(1, 60, dtype=np.int32)]
    settings = {"temperature": 0.0, "numerics": "default", "prefill": 512}
    plain, expected = decode(model, prompts, "none", batch=1, **settings)
    hostile = HostileDrafter({key: [ids] for key, ids in plain.items()}, 300)
    _, logits = decode(model, prompts, hostile, batch=1, **settings)
    assert any(not torch.equal(row, expected[key]) for key, row in logits.items())


def test_strict_numerics_stay_near_the_default_ones():
    model = make("window", torch.float32)
    prompts = [np.arange(1, 120, dtype=np.int32)]
    settings = {"batch": 1, "temperature": 0.0, "prefill": 50}
    plain, expected = decode(model, prompts, "none", numerics="default", **settings)
    strict, logits = decode(model, prompts, "none", numerics="strict", **settings)
    assert strict == plain
    for key, row in logits.items():
        torch.testing.assert_close(row, expected[key], rtol=1e-4, atol=1e-4)


@given(st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_every_token_is_owned_by_one_path_and_paths_follow_the_tree(max_drafts, seed):
    parents = random_tree(np.random.default_rng(seed), 300, max_drafts).parents
    num_nodes = len(parents)
    ancestors = np.eye(num_nodes, dtype=np.bool_)
    for node in range(1, num_nodes):
        ancestors[node] |= ancestors[parents[node]]
    owned: list[int] = []
    for path, places in paths_of(ancestors):
        assert path[0] == 0
        assert [int(parents[node]) for node in path[1:]] == path[:-1].tolist()
        owned += path[places].tolist()
    assert sorted(owned) == list(range(num_nodes))


def test_what_cannot_be_strict_is_refused_by_name():
    model = make("llama", torch.float32)
    with pytest.raises(ConfigError, match="packed must not be False"):
        build_engine(model, "none", numerics="strict", packed=False)
    with pytest.raises(ConfigError, match="numerics: Input should be 'default' or 'strict', got 'exact'"):
        build_engine(model, "none", numerics="exact")
    with pytest.raises(UnsupportedError, match="is impossible here: no linear layer is in float32 or bfloat16"):
        build_engine(make("llama", torch.float64), "none", numerics="strict", max_length=64)
    capped = Gemma2ForCausalLM(Gemma2Config(**SIZES)).eval()
    with pytest.raises(UnsupportedError, match=r"knows no soft-cap.*self_attn has one of them"):
        build_engine(capped, "none", numerics="strict", max_length=64)
    with pytest.raises(UnsupportedError, match="max_length >= 10 and kv_tokens >= 128"):
        build_engine(model, "none", numerics="strict", max_length=64, kv_tokens=100)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_a_model_with_products_of_its_own_is_tried_and_found_out():
    # GPT-2 multiplies by transposed matrices of its own class, which nobody packs: in float32 its bits depend on the
    # number of rows, and the trial has to see that.
    config = GPT2Config(vocab_size=300, n_embd=256, n_layer=2, n_head=4, n_positions=256, eos_token_id=None)
    model = GPT2LMHeadModel(config).eval()
    with pytest.raises(UnsupportedError, match=r"\d+ of 7 tokens have other bits in a tree than decoded one by one"):
        build_engine(model, "none", numerics="strict", max_length=200)
