"""Which path each architecture takes, why, and that a target with a mistake in it does not survive the self-test."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from specdec.chain_target import ChainTarget, _take_down
from specdec.errors import ConfigError, UnsupportedError
from specdec.routes import TargetFactories, choose_route
from specdec.tree_target import TreeTarget
from specdec.types import Chunk, TargetOutput
from tests.architectures import ARCHITECTURES

MAX_LENGTH = 400


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tree_target(model, calls, max_length, kind=TreeTarget):
    return kind(model, calls, kv_tokens=640, max_length=max_length, max_batch_size=2, max_step_tokens=640)


def chain_target(model, max_length, max_draft_tokens, kind=ChainTarget):
    return kind(model, kv_tokens=640, max_length=max_length, max_draft_tokens=max_draft_tokens)


@pytest.mark.parametrize(
    "name",
    ["llama", "gemma2", "gemma3_text", "gemma4_text", "gpt2", "gpt_neox", "gpt_oss", "llama4_text", "phimoe", "opt"]
    + ["deepseek_v3", "mixtral", "stablelm", "biogpt", "hrm_text"],
)
def test_models_with_ordinary_attention_take_the_tree_path(name):
    route = choose_route(ARCHITECTURES[name](), max_length=MAX_LENGTH)
    assert (route.kind, route.reasons, route.can_draft) == ("tree", (), True)
    assert route.calls


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
def test_a_short_limit_does_not_cost_a_model_its_path(name):
    assert choose_route(ARCHITECTURES[name](), max_length=4).kind == "tree"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3_next", "tree: the model keeps a recurrent state"),
        ("lfm2", "tree: its cache keeps more than keys and values: LinearAttentionLayer"),
        ("bloom", "tree: the model computes attention without transformers' attention interface, or has none"),
        ("deepseek_v32", "tree: attention call model.layers.0.self_attn passes indices, which we do not know"),
        ("doge", "tree: attention call model.layers.0.self_attn has a mask that is not causal, sliding or chunked"),
        ("bart", "tree: the self-test found"),
    ],
)
def test_models_that_cannot_share_a_pass_take_the_chain_path(name, reason):
    route = choose_route(ARCHITECTURES[name](), max_length=MAX_LENGTH)
    assert (route.kind, route.can_draft) == ("chain", True)
    (said,) = route.reasons
    assert said.startswith(reason)


@pytest.mark.parametrize("name", ["mamba", "jamba", "zamba", "nemotron_h"])
def test_models_whose_cache_takes_one_token_at_a_time_decode_plainly_over_it(name):
    route = choose_route(ARCHITECTURES[name](), max_length=MAX_LENGTH)
    assert (route.kind, route.can_draft) == ("chain", False)
    assert route.reasons


@pytest.mark.parametrize("name", ["openai-gpt", "rwkv", "recurrent_gemma", "minimax"])
def test_models_without_a_cache_that_we_can_use_take_the_plain_path(name):
    route = choose_route(ARCHITECTURES[name](), max_length=MAX_LENGTH)
    assert (route.kind, route.can_draft) == ("plain", True)
    assert [reason.split(":")[0] for reason in route.reasons] == ["tree", "chain", "chain without drafts"]


def test_a_model_that_looks_ahead_is_never_drafted_for():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=99
    )
    route = choose_route(transformers.BertLMHeadModel(config).eval(), max_length=MAX_LENGTH)
    assert (route.kind, route.can_draft) == ("plain", False)
    assert route.reasons == ("all drafts: a token's logits depend on the tokens after it",)


def test_an_encoder_decoder_is_refused():
    config = transformers.BartConfig(d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=99)
    route = choose_route(transformers.BartForConditionalGeneration(config).eval(), max_length=MAX_LENGTH)
    assert route.kind == "refused"
    why = "BartForConditionalGeneration is an encoder-decoder; specdec serves decoder-only language models"
    assert route.reasons == (why,)


def test_a_model_without_a_head_is_refused():
    route = choose_route(ARCHITECTURES["llama"]().model, max_length=MAX_LENGTH)
    assert route.kind == "refused"
    assert "LlamaModel has no language-model head" in route.reasons[0]


def test_a_model_whose_generate_has_inputs_of_its_own_is_refused():
    route = choose_route(ARCHITECTURES["xlnet"](), max_length=MAX_LENGTH)
    assert route.kind == "refused"
    assert "its generate computes other logits than an ordinary forward" in route.reasons[0]


def test_training_mode_and_missing_weights_are_errors():
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM is in training mode.*call model.eval\(\)"):
        choose_route(ARCHITECTURES["llama"]().train(), max_length=MAX_LENGTH)
    with pytest.raises(ConfigError, match="parameters on the meta device"):
        choose_route(ARCHITECTURES["llama"]().to("meta"), max_length=MAX_LENGTH)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "tree"), ("gemma3_text", "tree"), ("qwen3_moe", "tree"), ("qwen3_next", "chain")]
)
def test_sixteen_bit_models_take_the_same_path(name, kind, dtype):
    route = choose_route(ARCHITECTURES[name]().to(dtype), max_length=MAX_LENGTH)
    assert (route.kind, route.can_draft) == (kind, True)


def test_the_model_is_as_before_afterwards():
    model = ARCHITECTURES["gemma3_text"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choose_route(model, max_length=MAX_LENGTH)
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_the_self_test_the_rules_decide_alone():
    assert choose_route(ARCHITECTURES["llama"](), max_length=MAX_LENGTH, self_test=False).kind == "tree"
    route = choose_route(ARCHITECTURES["mamba"](), max_length=MAX_LENGTH, self_test=False)
    assert (route.kind, len(route.reasons)) == ("chain", 1)


class ForgetsBranches(TreeTarget):
    """Attends to all nodes before a node, as if the tree were a chain."""

    def forward(self, chunks):
        chained = [Chunk(c.state, c.prefix_ids, None if c.tree is None else _as_chain(c.tree)) for c in chunks]
        return super().forward(chained)


def _as_chain(tree):
    return type(tree).chain(int(tree.token_ids[0]), tree.token_ids[1:])


class KeepsTheWrongNodes(TreeTarget):
    """Keeps as many nodes as it should, but the first ones."""

    def commit(self, chunks, keep):
        super().commit(chunks, [list(range(len(nodes))) for nodes in keep])


class MixesNeighbours(TreeTarget):
    """A little of the first row's logits is in every other row."""

    def forward(self, chunks):
        output = super().forward(chunks)
        return TargetOutput(output.logits + 0.01 * output.logits[:1], output.cu_nodes)


class OffByOneWindow(TreeTarget):
    """Every window sees one key more."""

    def __init__(self, model, calls, **options):
        wider = [replace(c, window=c.window + 1) if c.window is not None else c for c in calls]
        super().__init__(model, wider, **options)


class Fails(TreeTarget):
    """Has no room for anything."""

    def reserve(self, state, num_tokens):
        return False


class RefusesTheModel(TreeTarget):
    """Cannot be built."""

    def __init__(self, model, calls, **options):
        raise UnsupportedError("not this one")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ForgetsBranches, "nodes with other logits"),
        (KeepsTheWrongNodes, "nodes with other logits"),
        (MixesNeighbours, "nodes with other logits"),
        (OffByOneWindow, "nodes with other logits"),
        (Fails, "the self-test raised RuntimeError: no room"),
        (RefusesTheModel, "not this one"),
    ],
)
def test_a_tree_target_with_a_mistake_is_demoted(kind, said):
    model = ARCHITECTURES["gemma3_text"]()
    factories = TargetFactories(tree=lambda model, calls, length: tree_target(model, calls, length, kind))
    route = choose_route(model, max_length=MAX_LENGTH, factories=factories)
    assert route.kind == "chain"
    (reason,) = route.reasons
    assert reason.startswith("tree: ")
    assert said in reason


@pytest.mark.parametrize("window", [32, 100])
def test_windows_of_a_few_hundred_tokens_are_crossed(window):
    config = transformers.MistralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        sliding_window=window,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    good = choose_route(model, max_length=MAX_LENGTH)
    bad = TargetFactories(tree=lambda model, calls, length: tree_target(model, calls, length, OffByOneWindow))
    assert good.kind == "tree"
    assert choose_route(model, max_length=MAX_LENGTH, factories=bad).kind == "chain"


class NeverRollsBack(ChainTarget):
    """Leaves rejected tokens in the recurrent state."""

    def commit(self, chunks, keep):
        for row in self._rows.values():
            row.before = _take_down(row.cache)
        super().commit(chunks, keep)


def test_a_chain_target_with_a_mistake_is_demoted_too():
    model = ARCHITECTURES["qwen3_next"]()
    factories = TargetFactories(chain=lambda model, length, drafts: chain_target(model, length, drafts, NeverRollsBack))
    route = choose_route(model, max_length=MAX_LENGTH, factories=factories)
    assert route.kind != "chain" or not route.can_draft
    assert any(reason.startswith("chain: ") for reason in route.reasons)
