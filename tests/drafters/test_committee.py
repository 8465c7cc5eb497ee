from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from specdec.build import build_engine, load_drafter, name_drafter
from specdec.drafters.committee import CommitteeDrafter, CommitteeModel, Router
from specdec.drafters.draft_model import DraftModel
from specdec.drafters.growing import Growth
from specdec.errors import ConfigError, UnsupportedError
from specdec.types import Request, SamplingParams
from tests.tiny_models import tiny_llama


class Spoken:
    """A scorer that says the same law everywhere, and how many nodes it was asked for."""

    max_length = 100

    def __init__(self, *law: float) -> None:
        self.law, self.vocab_size, self.asked = torch.tensor(law).log(), len(law), 0

    def read(self, request_ids: Any, texts: Any) -> tuple[list[int], torch.Tensor]:
        return list(range(len(request_ids))), self.law.repeat(len(request_ids), 1)

    def grow(self, growths: Any) -> torch.Tensor:
        count = sum(len(growth.token_ids) for growth in growths)
        self.asked += count
        return self.law.repeat(count, 1)

    def drop(self, request_ids: Any) -> None: ...

    def release(self, request_ids: Any) -> None: ...


def test_the_surest_model_speaks_and_all_go_on_from_it() -> None:
    models = [Spoken(0.9, 0.05, 0.05), Spoken(0.3, 0.3, 0.4)]
    committee = CommitteeModel(models, Router(2, per_request=2))
    rows, logits = committee.read(["a", "b"], [np.array([1], np.int32)] * 2)
    assert rows == [0, 1]
    assert logits.exp()[0].tolist() == pytest.approx([0.9, 0.3, 0.4])
    grown = committee.grow([Growth("b", np.array([0, 2], np.int32), np.array([-1, -1], np.int32))])
    assert grown is not None
    assert grown.shape == (2, 3)
    assert [model.asked for model in models] == [2, 2]


def test_requests_go_to_the_model_that_served_them_best() -> None:
    router = Router(3, per_request=1)
    for _ in range(30):
        for model in range(3):
            router.note("code", model, 0.8, agreed=model == 2)
            router.note("law", model, 0.8, agreed=model == 0)
        router.note_accepted("code", 3)
        router.note_accepted("law", 3)
    assert [router.pick("code") for _ in range(5)] == [[2]] * 5
    assert router.pick("law") == [0]
    for _ in range(40):
        router.note_accepted("code", 0)
    assert len({tuple(router.pick("code")) for _ in range(40)}) == 3  # nothing is accepted: others are tried
    router.forget("code")
    assert len({tuple(router.pick("code")) for _ in range(40)}) == 3


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return tiny_llama()


def committee_of(target: LlamaForCausalLM, others: int, per_request: int) -> CommitteeDrafter:
    members = [tiny_llama(), *(tiny_llama(seed=7 + i) for i in range(others))]
    models = [DraftModel(model, kv_tokens=600, max_length=256, self_test=False) for model in members]
    router = Router(len(models), per_request=per_request)
    # Models with random weights are sure of nothing, so no level would seem worth its time.
    return CommitteeDrafter(CommitteeModel(models, router), vocab_size=257, top_k=1, width=1, min_gain=0.0)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_no_token_changes_and_some_drafts_are_accepted(target: LlamaForCausalLM, temperature: float) -> None:
    def run(drafter: Any, budget: int) -> tuple[dict[str, list[int]], float]:
        texts: dict[str, list[int]] = {}
        with build_engine(target, drafter, budget=budget) as engine:
            batch = [
                Request(
                    f"r{i}",
                    np.array([i, 5, 9], np.int32),
                    SamplingParams(max_new_tokens=40, temperature=temperature, seed=i),
                )
                for i in range(3)
            ]
            states = []
            for output in engine.generate(batch):
                texts.setdefault(output.request_id, []).extend(output.new_ids)
                if output.finish_reason:
                    states.append(output.state)
        return texts, sum(s.num_output_tokens for s in states) / sum(s.num_steps for s in states)

    plain, _ = run("none", 0)
    drafter = committee_of(target, others=2, per_request=1)
    routed, length = run(drafter, 6)
    assert routed == plain
    assert length > 1.2  # one of the three models is the target itself
    assert all(model._target.pool.num_used == 0 for model in drafter.model.models)  # type: ignore[attr-defined]


def test_wrong_committees_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"per_request must be in \[1, 2\], got 3"):
        Router(2, per_request=3)
    with pytest.raises(ConfigError, match=r"one vocabulary, got sizes \[2, 3\]"):
        CommitteeModel([Spoken(0.5, 0.5), Spoken(0.2, 0.3, 0.5)], Router(2))


def test_a_committee_has_a_name(target: LlamaForCausalLM, tmp_path: Path) -> None:
    for seed in (0, 7):
        tiny_llama(seed=seed).save_pretrained(tmp_path / str(seed))
    name = f"committee:{tmp_path / '0'},{tmp_path / '7'}?per_request=2&depth=3&min_gain=0"
    drafter = load_drafter(name, target)
    assert isinstance(drafter, CommitteeDrafter)
    assert len(drafter.model.models) == 2
    request = Request("r", np.array([3, 5, 9], np.int32), SamplingParams(max_new_tokens=12))
    texts = []
    for one in ("none", drafter):
        with build_engine(target, one, budget=4) as engine:
            texts.append([token for part in engine.generate([request]) for token in part.new_ids])
    assert texts[0] == texts[1]
    with pytest.raises(UnsupportedError, match="needs the match rule"):
        load_drafter(name, target, verifier="chain")
    with pytest.raises(ConfigError, match="at least two models"):
        name_drafter("committee:one")
