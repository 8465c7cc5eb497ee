"""Drafters with a checkpoint are named alike wherever a drafter is named, and share the target's states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdec.bench.arm_builder import build_arms, short_name
from specdec.bench.arms import Job
from specdec.build import DRAFTER_KINDS, build_engine, load_drafter
from specdec.check import CheckOptions, check_model
from specdec.drafters.eagle import EagleDrafter
from specdec.errors import ConfigError, InternalError, LoadError
from specdec.readings import HiddenStates
from specdec.server.launch import ServerOptions, build_service
from specdec.types import Chunk, DraftTree, Request, RequestState, SamplingParams
from tests.drafters.eagle_checkpoints import eagle_target, write
from tests.server.live import running, tokenizer
from tests.tiny_models import byte_tokenizer, save_tiny_llama

PROMPT = np.arange(40, 71, dtype=np.int32)


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A draft model and two heads that read different layers of the target."""
    root = tmp_path_factory.mktemp("named")
    return {
        "lm": f"lm:{save_tiny_llama(root / 'small')}",
        "states of one layer": f"eagle:{write('safeailab-1', root / 'one')}?probe=0&min_gain=0",
        "states of three layers": f"eagle:{write('speculators', root / 'three')}?probe=0&top_k=3&depth=3&min_gain=0",
    }


def test_states_are_told_apart_by_layer():
    rows = torch.arange(12.0).view(2, 6)  # layers 4, 1, 7, two numbers each
    hidden = HiddenStates((4, 1, 7), rows)
    assert hidden.of((4, 1, 7)) is rows
    assert hidden.of((7, 4)).tolist() == [[4.0, 5.0, 0.0, 1.0], [10.0, 11.0, 6.0, 7.0]]
    assert hidden.at([1]).of((1,)).tolist() == [[8.0, 9.0]]
    with pytest.raises(InternalError, match=r"states \[2\] are read, but only \[4, 1, 7\] were asked for"):
        hidden.of((2, 4))


def test_states_of_a_step_belong_to_its_tokens_and_its_logits(target: Any, names: dict[str, str]):
    with build_engine(target, names["states of three layers"]) as engine:
        state = RequestState(Request("a", PROMPT))
        tree = DraftTree(np.array([70, 5, 6, 7], dtype=np.int32), np.array([-1, 0, 0, 2], dtype=np.int32))
        chunk = Chunk(state, PROMPT[:-1], tree)
        assert engine.target.reserve(state, chunk.num_tokens)
        output = engine.target.forward([chunk])
        engine.target.release(state)
    assert output.hidden is not None
    assert output.node_rows is not None
    assert output.hidden.layers == (1, 4, 6)
    assert len(output.hidden) == 34
    assert output.node_rows.tolist() == [30, 31, 32, 33]
    with torch.no_grad():  # the path 70, 6, 7
        text = torch.tensor([[*PROMPT.tolist(), 6, 7]])
        expected = target(text, output_hidden_states=True).hidden_states
    want = torch.cat([expected[layer][0, [0, 30, 31, 32]] for layer in (4, 6)], -1)
    torch.testing.assert_close(output.hidden.at([0, 30, 32, 33]).of((4, 6)), want, rtol=1e-4, atol=1e-4)


def test_a_server_takes_them_side_by_side_and_says_no_folder(target: Any, names: dict[str, str]):
    options = ServerOptions("tiny", tuple(names.values()), engine={"max_length": 200, "kv_tokens": 4096})
    with running(build_service(target, tokenizer(), (256,), options)) as live:
        offered = live.get("/v1/models").json()["data"][0]["drafters"]
        assert offered == ["lm:small", "eagle:one?probe=0&min_gain=0", "eagle:three?probe=0&top_k=3&depth=3&min_gain=0"]
        common = {"model": "tiny", "prompt": PROMPT.tolist(), "max_tokens": 24, "ignore_eos": True, "temperature": 0}
        answers = [
            live.post("/v1/completions", common | {"speculative": {"drafter": name, "max_tokens": 4}}).json()
            for name in offered
        ]
        plain = live.post("/v1/completions", common | {"speculative": {"enabled": False}}).json()
    assert {answer["choices"][0]["text"] for answer in answers} == {plain["choices"][0]["text"]}
    drafted = [answer["metrics"]["speculative_decoding"]["num_draft_tokens"] for answer in answers]
    assert all(drafted), drafted


def test_a_server_refuses_names_that_clients_could_not_tell_apart(target: Any, names: dict[str, str], tmp_path: Path):
    other = f"eagle:{write('safeailab-1', tmp_path / 'one')}?probe=0&min_gain=0"
    with pytest.raises(ConfigError, match=r"different names, got eagle:one\?probe=0&min_gain=0, eagle:one"):
        build_service(target, tokenizer(), (256,), ServerOptions("tiny", (names["states of one layer"], other)))


def test_the_check_and_the_benchmark_take_them(target: Any, names: dict[str, str]):
    options = CheckOptions(
        drafters=tuple(names.values()), max_new_tokens=8, num_seeds=1, num_samples=0, has_controls=False
    )
    report = check_model(target, byte_tokenizer(), texts={"one": "x = 1\n", "two": "return"}, options=options)
    assert report.is_lossless
    assert {comparison.decoder for comparison in report.comparisons} == {"plain", *names.values()}
    job = Job(PROMPT, 12)
    outputs = []
    for arm in build_arms(["plain", *names.values()], target, budget=3):
        outputs.append(arm.run([job])[0].output_ids)
        arm.close()
    assert outputs == [outputs[0]] * 4


def test_what_is_wrong_with_a_name_is_said_before_a_model_is_loaded(tmp_path: Path):
    for name, error, message in (
        ("nn:a", ConfigError, "drafter must be one of ngram, .*eagle:PATH.*, got 'nn:a'|.*got 'nn:a'"),
        ("eagle:" + str(tmp_path / "no"), LoadError, "there is no directory"),
        (f"eagle:{tmp_path}", LoadError, "looked for config.json, found nothing"),
    ):
        with pytest.raises(error, match=message):
            CheckOptions(drafters=(name,))


def test_a_kind_reads_its_own_source(monkeypatch: pytest.MonkeyPatch, target: Any):
    """Another kind needs an entry and nothing else; its source need not be a folder."""
    from specdec.drafters.checkpoint import DrafterKind
    from specdec.drafters.none import NoDrafter

    seen: list[Any] = []

    def load(source: Any, model: Any, words: Any, draws: Any, **options: Any) -> NoDrafter:
        seen.append((source, options))
        return NoDrafter()

    kind = DrafterKind(load, read=lambda name: (name.partition(":")[2].split("+"), {"a": 1}))
    monkeypatch.setitem(DRAFTER_KINDS, "both", kind)  # type: ignore[arg-type]
    load_drafter("both:ngram+suffix", target, b=2)
    assert seen == [(["ngram", "suffix"], {"a": 1, "b": 2})]


def test_short_names_hide_folders_of_every_part():
    assert short_name("lm:/a/b/small?depth=3@4") == "lm:small?depth=3@4"
    assert short_name("fused:suffix+eagle:/a/b/head?top_k=4") == "fused:suffix+eagle:head?top_k=4"


def test_a_routed_head_gets_its_own_layers(target: Any, names: dict[str, str]):
    """Side by side with another head a head guesses what it guesses alone."""
    from specdec.server.speculation import Choices, RoutedDrafter

    def accepted(drafter: Any, budget: int = 4) -> list[int]:
        request = Request("a", PROMPT, SamplingParams(max_new_tokens=24))
        with build_engine(target, drafter, budget=budget) as engine:
            states = [output.state for output in engine.generate([request])]
        return [states[-1].num_drafted, states[-1].num_accepted, states[-1].num_steps]

    one, three = (
        load_drafter(names[f"states of {count} layer{s}"], target) for count, s in (("one", ""), ("three", "s"))
    )
    assert isinstance(one, EagleDrafter)
    for order in (("one", "three"), ("three", "one")):
        both = RoutedDrafter({"one": one, "three": three}, Choices(order))
        assert both.needs.hidden_layers == (1, 4, 6, 8)
        assert accepted(both) == accepted(one if order[0] == "one" else three)
