"""Learning from records: weights by what became of a position, laws behind rejections, day 0 on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec.build import build_engine, load_drafter
from specdec.errors import ConfigError
from specdec.online_training.capture import CaptureOptions, TraceCapture
from specdec.online_training.counterfactual import Branches, CounterfactualEagle, branches_of, law_loss
from specdec.online_training.data import TrainBatch
from specdec.online_training.day_zero import OnlinePlan, build_learner
from specdec.online_training.fingerprint import fingerprint
from specdec.online_training.module_learner import LearnerOptions, ModuleLearner, batch_of
from specdec.online_training.privacy import Consent
from specdec.online_training.records import TraceRecord
from specdec.types import Request, SamplingParams
from tests.drafters.eagle_checkpoints import eagle_target
from tests.online_training.traces import HASHES, ListSink, record

PLAN = OnlinePlan(depth=2, layers=(2, 4, 6), learner=LearnerOptions(learning_rate=3e-3, ema=0.9, max_length=64))


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


def traces(target: Any, drafter: Any, mode: str, count: int = 3) -> list[TraceRecord]:
    sink = ListSink()
    capture = TraceCapture(
        sink, consent=Consent(frozenset({"t"})), hashes=HASHES, target=fingerprint(target),
        options=CaptureOptions(mode=mode, top_k=257),  # type: ignore[arg-type]
    )  # fmt: skip
    rng = np.random.default_rng(3)
    asked = [
        Request(f"r{i}", rng.integers(0, 250, 9).astype(np.int32), SamplingParams(max_new_tokens=16), "t")
        for i in range(count)
    ]
    with build_engine(target, drafter, budget=4, observers=[capture], packed=False) as engine:
        list(engine.generate(asked))
    capture.close()
    return sink.records


def learner_of(target: Any, **options: Any) -> ModuleLearner:
    plan = replace(PLAN, learner=replace(PLAN.learner, **options))
    return build_learner(plan, target, None)


def test_weights_say_what_became_of_a_position() -> None:
    made = record()  # 2 prompt tokens, 3 more; position 3 was rejected first
    options = LearnerOptions(rejected_weight=1.5, prompt_weight=0.25)
    batch = batch_of([made, replace(made, inclusion=0.5)], options, (2,), 8)
    assert batch.token_ids.tolist() == [[1, 2, 3, 4, 5]] * 2
    assert batch.weights.tolist() == [[0.25, 0.25, 1.0, 2.5, 1.0], [0.5, 0.5, 2.0, 5.0, 2.0]]
    assert batch.states is None
    cut = batch_of([made], replace(options, max_length=4), (2,), 8)
    assert cut.token_ids.tolist() == [[2, 3, 4, 5]]
    assert cut.weights.tolist() == [[0.25, 1.0, 2.5, 1.0]]


def test_the_loss_on_a_partial_law_is_that_of_the_whole_one_where_nothing_is_left_out() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 30, generator=generator).double()
    law = torch.randn(5, 30, generator=generator).double().log_softmax(-1)
    whole = (law.exp() * (law - logits.log_softmax(-1))).sum(-1)
    ids = torch.arange(30).expand(5, 30)
    assert torch.allclose(law_loss(logits, ids, law), whole, atol=1e-6)
    top = law.topk(7, dim=-1)
    p, q = law.exp(), logits.softmax(-1)
    rest = ~torch.zeros(5, 30, dtype=torch.bool).scatter(1, top.indices, value=True)
    rest_p, rest_q = (p * rest).sum(-1), (q * rest).sum(-1)
    bucketed = ((p * (p / q).log()) * ~rest).sum(-1) + rest_p * (rest_p / rest_q).log()
    assert torch.allclose(law_loss(logits, top.indices, top.values), bucketed, atol=1e-9)
    assert bool((bucketed <= whole).all())  # a bucket hides differences, and never adds any


def test_captured_states_and_laws_are_the_targets_own(target: Any, tmp_path: Path) -> None:
    learner = learner_of(target)
    learner.export(tmp_path / "head")
    for made in traces(target, f"eagle:{tmp_path / 'head'}?probe=0&top_k=2&depth=2", "features+rejected"):
        features = made.features
        assert features is not None
        ids = torch.from_numpy(made.token_ids.astype(np.int64))[None]
        with torch.no_grad():
            out = target(ids, output_hidden_states=True)
        rows = features.tensors["aux_hidden"].float()
        expected = torch.cat([out.hidden_states[layer][0] for layer in features.layers], -1)[features.start :]
        assert torch.allclose(rows, expected[: len(rows)], rtol=0.02, atol=0.02)  # kept in bfloat16
        assert features.start + len(rows) >= len(made.token_ids) - 1
        starts = np.cumsum([0, *made.rounds.num_drafted])
        checked = 0
        for row, (number, node) in enumerate(features.tensors["rejected_nodes"].tolist()):
            ids_of, parents = (
                column[starts[number] : starts[number + 1]].tolist()
                for column in (made.rounds.draft_ids, made.rounds.draft_parents)
            )
            path: list[int] = []
            while node:
                path.insert(0, ids_of[node - 1])
                node = parents[node - 1]
            text = [*made.token_ids[: made.rounds.positions[number]].tolist(), *path]
            with torch.no_grad():
                law = target(torch.tensor([text])).logits[0, -1].log_softmax(-1)
            top = features.tensors["rejected_top_ids"][row].long()
            assert torch.allclose(features.tensors["rejected_top_logprobs"][row].float(), law[top], atol=0.02)
            checked += 1
        assert checked > 5


def test_branches_follow_the_draft_as_it_was_made(target: Any, tmp_path: Path) -> None:
    learner = learner_of(target, counterfactual=0.5)
    learner.export(tmp_path / "head")
    records = traces(target, f"eagle:{tmp_path / 'head'}?probe=0&top_k=2&depth=3&min_gain=0", "features+rejected")
    branches = branches_of(records, [0] * len(records), most=16)
    assert branches is not None
    module = learner._trainer.module
    assert isinstance(module, CounterfactualEagle)
    batch = learner._trainer.features.fill(batch_of(records, learner.options, (2, 4, 6), 8))
    with torch.no_grad():
        before = float(module.branch_loss(batch, branches))
        # What is left of a law beside its kept tokens is a small difference of sums near one: float32 shows there.
        assert before == pytest.approx(float(_branch_loss_alone(module, batch, branches)), rel=5e-4)
    for _ in range(12):
        learner.learn(records)
    with torch.no_grad():
        assert float(module.branch_loss(batch, branches)) < before
    assert module.branches is None


def _branch_loss_alone(module: CounterfactualEagle, batch: TrainBatch, branches: Branches) -> Tensor:
    """The same, one branch at a time, with the head run over prefix and draft as a plain row of tokens."""
    assert batch.states is not None
    losses = []
    for branch, (row, place) in enumerate(branches.rows.tolist()):
        single = TrainBatch(
            batch.token_ids[row : row + 1, : place + 2], batch.weights[row : row + 1, : place + 2],
            batch.states[row : row + 1, : place + 2],
        )  # fmt: skip
        alone = Branches(
            torch.tensor([[0, place]]), *(getattr(branches, name)[branch : branch + 1] for name in (
                "token_ids", "is_taught", "top_ids", "top_logprobs")),
        )  # fmt: skip
        mean = module.branch_loss(single, alone)
        losses.append(mean * int(branches.is_taught[branch].sum()))
    return torch.stack(losses).sum() / int(branches.is_taught.sum())


def test_a_random_head_learns_from_traffic_and_serves_what_it_learned(target: Any, tmp_path: Path) -> None:
    learner = learner_of(target)
    records = traces(target, "none", "tokens", count=4)
    before = learner.judge(records)
    for _ in range(40):
        report = learner.learn(records)
    assert math.isfinite(report.loss)
    assert learner.step == 40
    after = learner.judge(records)
    assert after > before + 0.5
    learner.export(tmp_path / "head")
    drafter = load_drafter(f"eagle:{tmp_path / 'head'}?probe=0&top_k=1&depth=2", target)
    asked = [
        Request(str(i), made.token_ids[: made.num_prompt_tokens], SamplingParams(max_new_tokens=16))
        for i, made in enumerate(records)
    ]
    with build_engine(target, drafter, budget=2) as engine:
        last = {output.request_id: output.state for output in engine.generate(asked)}
    for name, state in last.items():
        assert state.token_ids.tolist() == records[int(name)].token_ids.tolist()
    served = sum(s.num_output_tokens for s in last.values()) / sum(s.num_steps for s in last.values())
    assert served > 1.4


def test_the_state_goes_on_to_the_same_weights_and_a_reset_goes_back(target: Any, tmp_path: Path) -> None:
    records = traces(target, "none", "tokens", count=2)
    first, second = learner_of(target), learner_of(target)
    first.learn(records)
    first.export(tmp_path / "first")
    second.load_state(first.state())
    for learner in (first, second):
        learner.learn(records)
    for name, weight in first.weights().items():
        assert torch.equal(weight, second.weights()[name])
    second.reset(tmp_path / "first", rate=0.5)
    assert second.step == 2
    assert second._trainer.plan.learning_rate == pytest.approx(1.5e-3)
    exported = learner_of(target)
    exported.reset(tmp_path / "first", rate=1.0)
    assert all(torch.equal(weight, exported.weights()[name]) for name, weight in second.weights().items())


def test_a_draft_model_learns_too(target: Any) -> None:
    plan = OnlinePlan(kind="lm", num_layers=1, depth=2, learner=LearnerOptions(learning_rate=3e-3, ema=0.5))
    learner = build_learner(plan, target, None)
    records = traces(target, "none", "tokens", count=2)
    losses = [learner.learn(records).loss for _ in range(8)]
    assert losses[-1] < losses[0]
    assert learner.kind == "lm"


def test_wrong_options_are_named(target: Any) -> None:
    with pytest.raises(ConfigError, match="start must be random or copying"):
        OnlinePlan(start="zeros")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ema must be in"):
        LearnerOptions(ema=1.0)
    with pytest.raises(ConfigError, match="layers must be in 0..8"):
        build_learner(OnlinePlan(layers=(0, 9)), target, None)
