"""The draft model inside the engine: the text never changes, the guesses are good ones, no memory is left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from specdec.build import VERIFIERS, build_engine, name_drafter
from specdec.drafters.checkpoint import PendingDrafter, parse_name
from specdec.drafters.draft_costs import DraftCosts
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.lm import LmDrafter
from specdec.drafters.tree_search import LevelCosts
from specdec.errors import ConfigError, LoadError, UnsupportedError
from specdec.types import Request, RequestOutput, SamplingParams
from tests.tiny_models import byte_tokenizer, tiny_llama

PROMPTS = [np.arange(3, 3 + size, dtype=np.int32) for size in (4, 19, 33)]
LAWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "repetition_penalty": 1.3},
]


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return tiny_llama(seed=0)


@pytest.fixture(scope="module")
def noisy(target: LlamaForCausalLM) -> LlamaForCausalLM:
    """The target with noise on its weights: a draft model that is often right."""
    model = tiny_llama(seed=0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        for parameter in model.parameters():
            parameter += 0.003 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def saved(noisy: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("draft")
    noisy.save_pretrained(path)
    return str(path)


def requests(num_new: int = 20, **law: Any) -> list[Request]:
    return [
        Request(f"r{i}", prompt, SamplingParams(max_new_tokens=num_new, seed=7 + i, **law))
        for i, prompt in enumerate(PROMPTS)
    ]


def last_outputs(engine: Any, batch: Sequence[Request]) -> dict[str, RequestOutput]:
    with engine:
        return {output.request_id: output for output in engine.generate(batch)}


def texts(outputs: dict[str, RequestOutput]) -> dict[str, list[int]]:
    return {name: output.state.output_ids.tolist() for name, output in outputs.items()}


def acceptance_length(outputs: dict[str, RequestOutput]) -> float:
    states = [output.state for output in outputs.values()]
    return sum(s.num_output_tokens for s in states) / sum(s.num_steps for s in states)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("shape", [{"top_k": 1, "width": 1, "depth": 4}, {"top_k": 3, "width": 2, "depth": 4}])
def test_the_text_is_that_of_plain_decoding(
    target: LlamaForCausalLM, saved: str, law: dict[str, Any], shape: dict[str, int]
) -> None:
    plain = texts(last_outputs(build_engine(target, "none", budget=0), requests(**law)))
    engine = build_engine(target, f"lm:{saved}", budget=6, drafter_options=shape)
    outputs = last_outputs(engine, requests(**law))
    assert texts(outputs) == plain
    assert acceptance_length(outputs) > 1.5
    assert engine.drafter.model.num_used == 0  # type: ignore[attr-defined]


def test_a_batch_drafts_what_each_request_alone_would(target: LlamaForCausalLM, saved: str) -> None:
    together = last_outputs(build_engine(target, f"lm:{saved}", budget=5), requests(temperature=0.7))
    for request in requests(temperature=0.7):
        alone = last_outputs(build_engine(target, f"lm:{saved}", budget=5), [request])
        a, b = alone[request.request_id].state, together[request.request_id].state
        assert (a.num_drafted, a.num_accepted) == (b.num_drafted, b.num_accepted)


def test_measured_costs_end_drafts_and_change_no_text(
    target: LlamaForCausalLM, saved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drafted(costs: Callable[[object], LevelCosts | None]) -> int:
        monkeypatch.setattr(DraftCosts, "costs", property(costs))
        outputs = last_outputs(build_engine(target, f"lm:{saved}", budget=6), requests(temperature=0.7))
        assert texts(outputs) == plain
        return sum(output.state.num_drafted for output in outputs.values())

    plain = texts(last_outputs(build_engine(target, "none", budget=0), requests(temperature=0.7)))
    luck = np.random.default_rng(0)
    free, dear = drafted(lambda _: LevelCosts(0.0, 1.0)), drafted(lambda _: LevelCosts(10.0, 1.0))
    assert dear < drafted(lambda _: LevelCosts(luck.choice([0.0, 10.0]), 1.0)) < free


def test_the_target_as_its_own_drafter_is_always_right_greedy_and_sampled(
    target: LlamaForCausalLM, tmp_path: Path
) -> None:
    target.save_pretrained(tmp_path)
    for law in ({"temperature": 0.0}, {"temperature": 1.0}):
        options = {"top_k": 1, "width": 1, "depth": 4, "min_gain": 0.0}
        engine = build_engine(target, f"lm:{tmp_path}", budget=4, drafter_options=options)
        outputs = last_outputs(engine, requests(20, **law))
        assert acceptance_length(outputs) == 5  # coupled by the target's own noise


@pytest.mark.parametrize("verifier", VERIFIERS[1:-1])
def test_honest_drafts_go_with_every_rejection_rule(target: LlamaForCausalLM, saved: str, verifier: str) -> None:
    plain = texts(last_outputs(build_engine(target, "none", budget=0), requests()))
    greedy = last_outputs(build_engine(target, f"lm:{saved}", budget=5, verifier=verifier), requests())
    assert texts(greedy) == plain
    assert acceptance_length(greedy) > 1.5
    sampled = last_outputs(build_engine(target, f"lm:{saved}", budget=5, verifier=verifier), requests(temperature=1.0))
    assert acceptance_length(sampled) > 1.5


def test_without_room_in_its_cache_it_guesses_less_and_the_text_stays(target: LlamaForCausalLM, saved: str) -> None:
    plain = texts(last_outputs(build_engine(target, "none", budget=0), requests()))
    engine = build_engine(target, f"lm:{saved}", budget=6, drafter_options={"kv_tokens": 40})
    outputs = last_outputs(engine, requests())
    assert texts(outputs) == plain
    assert engine.drafter.model.num_used == 0  # type: ignore[attr-defined]


def test_a_draft_model_without_tokenizer_files_shares_the_targets_tokens(
    target: LlamaForCausalLM, tmp_path: Path
) -> None:
    config = Qwen3Config(
        vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    with build_engine(target, f"lm:{tmp_path}", tokenizer=byte_tokenizer()) as engine:
        assert isinstance(engine.drafter, LmDrafter)


def test_a_short_context_of_the_draft_model_ends_its_guesses_not_the_text(target: LlamaForCausalLM) -> None:
    scorer = DraftModel(tiny_llama(), kv_tokens=400, max_length=24)
    engine = build_engine(target, LmDrafter(scorer, vocab_size=257, top_k=1, width=1), budget=4)
    outputs = last_outputs(engine, requests(24))
    assert texts(outputs) == texts(last_outputs(build_engine(target, "none", budget=0), requests(24)))
    assert outputs["r0"].state.num_accepted > 0
    assert outputs["r2"].state.num_drafted == 0  # its prompt is longer than that


def test_a_drafter_is_loaded_once_per_target(target: LlamaForCausalLM, saved: str) -> None:
    named = name_drafter(f"lm:{saved}?depth=3")
    assert isinstance(named, PendingDrafter)
    assert named.load(target, None, None) is named.load(target, None, None)
    assert named.load(target, None, None) is not named.load(target, None, "chain")


def test_names_are_read_and_bad_ones_refused(target: LlamaForCausalLM, saved: str, tmp_path: Path) -> None:
    assert parse_name("lm:a/b") == ("lm", "a/b", {})
    for name, error, message in (
        ("nn:a", ConfigError, "drafter must be one of .*lm:PATH.*, got 'nn:a'"),
        (f"lm:{saved}?depth", ConfigError, r"written \?name=value&name=value, got 'depth'"),
        (f"lm:{saved}?depth=2&depth=3", ConfigError, "can be given once"),
        (f"lm:{saved}?depht=2", ConfigError, "lm:.*depht"),
        (f"lm:{saved}?depth=0", ConfigError, "depth must be >= 1, got 0"),
        (f"lm:{saved}?min_gain=-1", ConfigError, "min_gain must be auto or >= 0, got -1"),
        (f"lm:{saved}?kv_tokens=0", ConfigError, "kv_tokens must be an integer >= 1, got 0"),
        ("lm:/nowhere/at/all", LoadError, "there is no directory '/nowhere/at/all'"),
        (f"lm:{tmp_path}", LoadError, "looked for config.json, found nothing"),
    ):
        with pytest.raises(error, match=message):
            build_engine(target, name)


def test_checkpoints_that_do_not_fit_are_refused(
    target: LlamaForCausalLM, noisy: LlamaForCausalLM, tmp_path: Path
) -> None:
    noisy.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LoadError, match="cannot load the draft model"):
        build_engine(target, f"lm:{tmp_path / 'cut'}")
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedError, match="has 99 tokens and the target 257"):
        build_engine(target, f"lm:{tmp_path / 'other'}", tokenizer=byte_tokenizer())
