"""Names and options become engines; what cannot be built is refused in words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from specdec.build import DRAFTERS, VERIFIERS, build_drafter, build_engine, build_target, model_max_length
from specdec.chain_target import ChainTarget
from specdec.config import EngineConfig
from specdec.drafters.ngram import NgramDrafter
from specdec.errors import ConfigError, RequestError, UnsupportedError
from specdec.plain_target import PlainTarget
from specdec.routes import Route
from specdec.tree_target import TreeTarget
from specdec.types import Request, SamplingParams
from tests.tiny_models import tiny_llama

PROMPT = np.array([5, 6, 7, 5, 6, 7, 5, 6], dtype=np.int32)


def text(engine, **sampling):
    with engine:
        outputs = list(engine.generate([Request("a", PROMPT, SamplingParams(max_new_tokens=12, **sampling))]))
    return [token_id for output in outputs for token_id in output.new_ids]


@pytest.mark.parametrize("name", sorted(DRAFTERS))
def test_every_drafter_name_builds_and_changes_no_token(name):
    model = tiny_llama()
    assert text(build_engine(model, name)) == text(build_engine(model, "none", budget=0))


def test_unknown_drafter_names_the_known_ones():
    with pytest.raises(ConfigError, match="drafter must be one of .*ngram, none.*, got 'nonsense'"):
        build_drafter("nonsense")


def test_unknown_option_of_a_drafter_names_it():
    with pytest.raises(ConfigError, match="drafter 'ngram': .*'depth'"):
        build_drafter("ngram", depth=3)


def test_unknown_verifier_names_the_known_ones():
    with pytest.raises(ConfigError, match="verifier must be one of match, chain, .*, typical, got 'nonsense'"):
        build_engine(tiny_llama(), "none", verifier="nonsense")


@pytest.mark.parametrize("verifier", VERIFIERS[1:-1])
def test_a_drafter_that_states_no_laws_is_refused_with_the_rejection_rules(verifier):
    with pytest.raises(UnsupportedError, match="NgramDrafter needs the match rule"):
        build_engine(tiny_llama(), "ngram", verifier=verifier)


def test_the_lossy_verifier_says_that_it_is(caplog):
    with build_engine(tiny_llama(), "ngram", verifier="typical") as engine:
        assert not engine.verifier.is_lossless
    assert "'typical' is lossy" in caplog.text


def test_options_for_a_ready_drafter_are_refused():
    with pytest.raises(ConfigError, match=r"options \['min_n'\] need a drafter's name, got a NgramDrafter"):
        build_drafter(NgramDrafter(), min_n=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": -1}, "budget must be >= 0, got -1"),
        ({"max_batch_size": 0}, "max_batch_size: .*greater than or equal to 1, got 0"),
        ({"kv_tokens": 1}, "kv_tokens: .*greater than or equal to 2, got 1"),
        ({"pages": 3}, "pages: .*not permitted, got 3"),
    ],
)
def test_bad_engine_options_name_the_value_and_the_rule(options, message):
    with pytest.raises(ConfigError, match=message):
        build_engine(tiny_llama(), "none", **options)


def test_budget_and_controller_together_are_refused():
    from specdec.controller import FixedController

    with pytest.raises(ConfigError, match="give a budget or a controller, not both"):
        build_engine(tiny_llama(), "none", budget=3, controller=FixedController(2))


def test_a_pool_smaller_than_one_request_is_refused_at_submission():
    engine = build_engine(tiny_llama(), "none", kv_tokens=10)
    with pytest.raises(RequestError, match="may need 28 tokens: raise kv_tokens"):
        engine.submit(Request("a", PROMPT, SamplingParams(max_new_tokens=20)))


def test_a_model_over_several_devices_is_refused():
    model = tiny_llama()
    model.lm_head = model.lm_head.to("meta")
    with pytest.raises(UnsupportedError, match="must run on one device, got cpu, meta"):
        build_engine(model, "none")


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedError, match="T5ForConditionalGeneration cannot be served: .*encoder-decoder"):
        build_engine(transformers.T5ForConditionalGeneration(config).eval(), "none")


@pytest.mark.parametrize(
    ("route", "kind", "most"),
    [
        (Route("chain"), ChainTarget, 64),
        (Route("plain"), PlainTarget, 64),
        (Route("chain", can_draft=False), ChainTarget, 0),
    ],
)
def test_the_route_decides_the_target(route, kind, most):
    target = build_target(tiny_llama(), EngineConfig(kv_tokens=64), route=route)
    assert type(target) is kind
    assert target.max_draft_tokens == most


def test_a_llama_takes_the_tree_path():
    assert type(build_target(tiny_llama(), EngineConfig(kv_tokens=64))) is TreeTarget


@pytest.mark.parametrize("route", [Route("chain"), Route("plain")], ids=lambda route: route.kind)
def test_text_does_not_depend_on_the_route(route):
    model = tiny_llama()
    expected = text(build_engine(model, "none", budget=0), temperature=0.9, seed=4)
    assert text(build_engine(model, "ngram", route=route), temperature=0.9, seed=4) == expected


def _dynamic_rope_model():
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_dynamic_rope_is_frozen_while_an_engine_lives_and_given_back_at_its_end():
    model = _dynamic_rope_model()
    before = model.model.rotary_emb.rope_type
    with build_engine(model, "none", max_length=64):
        assert model.model.rotary_emb.rope_type == "default"
    assert model.model.rotary_emb.rope_type == before == "dynamic"


def test_a_failed_build_gives_the_rope_back():
    model = _dynamic_rope_model()
    with pytest.raises(UnsupportedError):
        build_engine(model, "none", route=Route("refused", ("no.",)))
    assert model.model.rotary_emb.rope_type == "dynamic"


def test_close_cancels_what_is_live():
    engine = build_engine(tiny_llama(), "none")
    state = engine.submit(Request("a", PROMPT, SamplingParams(max_new_tokens=20)))
    engine.step()
    engine.close()
    assert state.finish_reason == "cancelled"
    assert engine.target.pool.num_used == 0


def test_context_length_is_the_models_own():
    assert model_max_length(tiny_llama()) == 256
