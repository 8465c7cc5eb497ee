from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.bench import tiny_loops, tiny_train
from specdec.bench.tiny_data import load_corpus, train_tokenizer
from specdec.bench.tiny_loops import answer_rows, loop_rows
from specdec.bench.tiny_train import Trainer, TrainPlan, export_model, new_model
from specdec.errors import ConfigError

torch.set_num_threads(1)
FUNCTION = "def name{i}(first, second):\n    value = first + second * {i}\n    other = value - {i}\n    check(other)\n"
FUNCTION += "    return value\n\n\n"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("src")
    for index in range(60):
        (root / f"part{index}.py").write_text("".join(FUNCTION.format(i=index * 9 + k) for k in range(9)))
    corpus, heldout = load_corpus(root, None), load_corpus(root, None, heldout=True)
    return corpus, heldout, train_tokenizer(iter(corpus.files), 320)


@pytest.fixture(scope="module")
def plan():
    return TrainPlan(steps=6, tokens_per_step=128, warmup=2, lengths=((64, 0.5), (128, 0.5)))


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(parts, plan, tmp_path):
    whole = Trainer(plan, *parts)
    for _ in range(2):
        whole.train_step()
    whole.save(tmp_path / "checkpoint.pt")
    whole.train_step()
    resumed = Trainer(plan, *parts)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert resumed.step == 2
    resumed.train_step()
    assert torch.equal(weights(resumed), weights(whole))


def test_steps_change_the_weights_and_stay_finite(parts, plan):
    trainer = Trainer(plan, *parts)
    before = weights(trainer)
    losses = [trainer.train_step() for _ in range(2)]
    assert all(0 < loss < 30 for loss in losses)
    assert (weights(trainer) != before).any()
    assert weights(trainer).isfinite().all()


def test_the_decay_has_lessons_against_loops_and_its_own_mixture(parts, plan):
    trainer = Trainer(plan, *parts)
    trainer.step = trainer.decay_from = 3
    calls = []
    unlearn = trainer._unlearn_loops
    trainer._unlearn_loops = lambda: (calls.append(trainer.step), unlearn())
    assert trainer.train_step() > 0
    assert trainer.train_step() > 0
    assert calls == [3]
    assert trainer.model.config._attn_implementation == "specdec_block_causal"


def test_the_finish_has_both_kinds_of_lesson_in_every_step(parts, monkeypatch):
    plan = TrainPlan(steps=4, tokens_per_step=128, warmup=2, lengths=((64, 0.5), (128, 0.5)), finish_steps=2)
    trainer = Trainer(plan, *parts)
    trainer.step = trainer.stop_at
    calls = []
    monkeypatch.setattr(tiny_train, "loop_rows", lambda *a: (calls.append("plain"), loop_rows(*a))[1])
    monkeypatch.setattr(tiny_train, "answer_rows", lambda *a: (calls.append("answer"), answer_rows(*a))[1])
    monkeypatch.setattr(tiny_loops, "_SNIPPET", (50, 1000))
    assert (trainer.last_step, trainer._rate()) == (6, 0.5)
    for _ in range(2):
        assert trainer.train_step() > 0
    assert calls == ["plain", "answer"] * 2
    assert trainer._rate() == 0.0
    assert weights(trainer).isfinite().all()


def test_what_is_exported_is_the_stated_mean(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_loops, "_SNIPPET", (50, 1000))
    plan = TrainPlan(steps=2, tokens_per_step=128, warmup=1, lengths=((64, 0.5), (128, 0.5)), finish_steps=1)
    trainer = Trainer(plan, *parts)
    start = weights(trainer)
    trainer.train_step()
    trainer.train_step()
    decayed = weights(trainer)
    trainer.save(tmp_path / "checkpoint.pt")
    trainer = Trainer(plan, *parts)
    trainer.resume(tmp_path / "checkpoint.pt")
    trainer.train_step()
    mean = torch.cat([p.detach().flatten() for p in trainer.averaged().parameters()])
    a, b, c = plan.average
    torch.testing.assert_close(mean, a * start + b * decayed + c * weights(trainer))
    assert not torch.equal(decayed, weights(trainer))


def test_a_time_limit_starts_the_decay_early_and_only_once(parts, plan):
    trainer = Trainer(TrainPlan(steps=1000, tokens_per_step=128, lengths=((64, 1.0),)), *parts)
    trainer.step, trainer.seconds = 130, 65.0
    trainer.limit(100.0)
    assert trainer.decay_from == 650
    trainer.limit(1.0)
    assert (trainer.decay_from, trainer.stop_at) == (130, 200)
    trainer.step, trainer.seconds = 150, 90.0
    trainer.limit(1.0)
    assert (trainer.decay_from, trainer.stop_at) == (130, 200)


def test_the_rate_warms_up_holds_and_decays_to_nothing(parts, plan):
    trainer = Trainer(TrainPlan(steps=100, tokens_per_step=128, lengths=((64, 1.0),), warmup=10), *parts)
    rates = {}
    for step in (0, 9, 10, 64, 99, 100):
        trainer.step = step
        rates[step] = trainer._rate()
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == rates[64] == 1.0
    assert 0 < rates[99] < 0.05
    assert rates[100] == 0.5  # the finish


def test_an_export_loads_with_the_auto_classes_and_is_greedy(parts, tmp_path):
    _, _, tokenizer = parts
    model = new_model(len(tokenizer), seed=0)
    export_model(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert loaded.config.tie_word_embeddings
    assert loaded.generation_config.do_sample is False
    assert loaded.generation_config.eos_token_id == 1
    torch.testing.assert_close(
        loaded.state_dict()["model.norm.weight"], model.state_dict()["model.norm.weight"], rtol=0.01, atol=0.0
    )
    assert AutoTokenizer.from_pretrained(tmp_path)("def name1(", add_special_tokens=False)["input_ids"]
    assert "specdec" not in (tmp_path / "config.json").read_text()


def test_the_curve_keeps_one_row_per_step(plan, tmp_path):
    rows = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 20, "loss": 2.5}]
    (tmp_path / "curve.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    tiny_train._write_curve(tmp_path, tmp_path, plan)
    written = json.loads((tmp_path / "loss_curve.json").read_text())
    assert [row["loss"] for row in written["curve"]] == [3.0, 2.5]
    assert written["plan"]["steps"] == 6


def test_a_plan_whose_rows_do_not_fit_a_step_is_refused():
    with pytest.raises(ConfigError, match="tokens_per_step"):
        TrainPlan(tokens_per_step=256)
