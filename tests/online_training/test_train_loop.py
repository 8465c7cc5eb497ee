"""Training runs: learning, resumption to the same bits, several devices, cached states."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from specdec.build import build_engine
from specdec.errors import ConfigError, LoadError, UnsupportedError
from specdec.online_training.data import Example, collate
from specdec.online_training.features import TargetFeatures
from specdec.online_training.regenerate import regenerate
from specdec.online_training.train_loop import Trainer, TrainPlan
from specdec.online_training.train_run import RunOptions, TrainRun
from specdec.online_training.train_setup import BlockPlan, DrafterPlan, build_module
from specdec.types import Request, SamplingParams
from tests.tiny_models import tiny_llama


def walking_target() -> LlamaForCausalLM:
    """A tiny model that nearly always walks in circles of eight tokens: a law that can be learnt in seconds."""
    target = tiny_llama()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        embedding = torch.randn(257, 32)
        target.model.embed_tokens.weight.copy_(embedding)
        ids = torch.arange(257)
        target.lm_head.weight[torch.where(ids < 256, ids // 8 * 8 + (ids + 1) % 8, ids)] = 0.3 * embedding
    return target


def own_answers(count: int = 24, num_new: int = 40) -> list[Example]:
    """What the target says to random prompts."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, 4).astype(np.int32) for _ in range(count)]
    with build_engine(walking_target(), "none", max_batch_size=count) as engine:
        return list(regenerate(engine, prompts, [SamplingParams(max_new_tokens=num_new)] * count))


@pytest.fixture(scope="module")
def answers() -> list[Example]:
    return own_answers()


PLANS = {
    "eagle3": DrafterPlan("eagle3", layers=(0, 1, 2), depth=3),
    "dspark": DrafterPlan(
        "dspark",
        layers=(0, 1),
        depth=3,
        num_layers=1,
        mix={"forward_kl": 1.0},
        blocks=BlockPlan(rank=8, mask_token_id=256, anchors=16),
    ),
    "lm": DrafterPlan("lm", num_layers=1, init=None),
}
RATES = {"eagle3": (2e-3, 0.02), "dspark": (2e-2, 0.05), "lm": (3e-3, 0.0)}  # a head that copies unlearns it at more


def run_of(kind: str, answers: list[Example], work: Path, **options: object) -> TrainRun:
    rate, muon_lr = RATES[kind]
    plan = TrainPlan(1, schedule="constant", learning_rate=rate, muon_lr=muon_lr)
    module, features = build_module(PLANS[kind], walking_target(), None, answers)
    settings = RunOptions(tokens_per_batch=400, epochs=4, heldout=0.1, **options)  # type: ignore[arg-type]
    return TrainRun(module, features, answers, plan=plan, options=settings, work=work)


@pytest.mark.parametrize("kind", PLANS)
def test_a_run_that_was_cut_goes_on_to_the_same_bits(kind: str, answers: list[Example], tmp_path: Path):
    whole = run_of(kind, answers, tmp_path / "whole")
    whole.run()
    first = run_of(kind, answers, tmp_path / "cut", stop_after=3)
    first.run()
    first.trainer.train_step(first.batches(3))  # a step that was not saved is taken again
    second = run_of(kind, answers, tmp_path / "cut")
    assert second.trainer.step == 3 < second.total_steps
    second.run()
    expected = whole.trainer.weights()
    assert all(torch.equal(weight, expected[name]) for name, weight in second.trainer.weights().items())
    points = [json.loads(line) for line in (tmp_path / "cut" / "curve.jsonl").read_text().splitlines()]
    assert [point["train"]["step"] for point in points] == [3, whole.total_steps]
    assert list((tmp_path / "whole" / "tensorboard").glob("events*"))


@pytest.mark.parametrize("kind", PLANS)
def test_a_drafter_learns_its_targets_own_words_and_drafts_them(kind: str, answers: list[Example], tmp_path: Path):
    run = run_of(kind, answers, tmp_path / "work")
    torch.manual_seed(0)
    if kind == "lm":  # the target's first layer says the same as the target: disturb it
        for parameter in run.trainer.module.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    before = run.evaluate()
    for step in range(40):
        run.trainer.train_step(run.batches(step % 8))
    after = run.evaluate()
    assert before.loss > (1.05 if kind == "eagle3" else 1.2) * after.loss
    assert after.acceptance_length > 1.5
    assert before.acceptance_length < 1.2 or kind != "eagle3"
    run.export(tmp_path / "drafter")
    name = f"{ {'eagle3': 'eagle', 'dspark': 'diffusion', 'lm': 'lm'}[kind] }:{tmp_path / 'drafter'}"
    options: dict[str, float] = {"top_k": 1}
    if kind != "dspark":
        options |= {"depth": 3, "min_gain": 0.0, **({"width": 1} if kind == "lm" else {})}
    prompts = [answer.token_ids[: answer.prompt_length] for answer in answers]
    with build_engine(walking_target(), name, budget=3, drafter_options=options) as engine:
        sampling = SamplingParams(max_new_tokens=40)
        states = [engine.submit(Request(str(i), prompt, sampling)) for i, prompt in enumerate(prompts)]
        while engine.has_work:
            engine.step()
    texts = {tuple(answer.token_ids.tolist()) for answer in answers}
    assert {tuple(state.token_ids.tolist()) for state in states} == texts
    if kind != "eagle3":
        assert 1 + sum(s.num_accepted for s in states) / sum(s.num_steps for s in states) > 2.0


def test_accumulated_batches_are_one_batch(answers: list[Example], tmp_path: Path):
    found = []
    for parts in ([answers[:6]], [answers[:2], answers[2:6]]):
        trainer = run_of("eagle3", answers, tmp_path).trainer
        report = trainer.train_step([collate(part) for part in parts])
        found.append((report, trainer.weights()))
    (one, weights), (two, others) = found
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-3)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=2e-4)


def test_cached_states_are_the_computed_ones_in_bfloat16(answers: list[Example], tmp_path: Path):
    target = walking_target()
    batch = collate(answers[:3])
    plain, cached = TargetFeatures(target, (1, 2)), TargetFeatures(target, (1, 2), cache=tmp_path)
    computed, stored = plain.fill(batch), cached.fill(batch)
    target.forward = None  # type: ignore[assignment]  # from here on only the cache can answer
    again = cached.fill(batch)
    for name in ("states", "last"):
        expected = getattr(computed, name).bfloat16().float() * (batch.weights.cumsum(1).flip(1) >= 0)[..., None]
        for found in (stored, again):
            mask = torch.arange(batch.token_ids.shape[1]) < torch.tensor([[len(a.token_ids)] for a in answers[:3]])
            torch.testing.assert_close(getattr(found, name)[mask], expected[mask], rtol=1e-2, atol=1e-2)
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(b"cut")
    with pytest.raises(LoadError, match="delete it"):
        cached.fill(batch)


def test_states_that_a_batch_brings_are_used(answers: list[Example]):
    features = TargetFeatures(walking_target(), (1,))
    batch = features.fill(collate(answers[:2]))
    assert features.fill(batch) is batch


def test_a_target_with_other_logits_is_refused():
    target = walking_target()
    head = target.lm_head.forward
    target.lm_head.forward = lambda x: head(x) * (1 if x.ndim == 2 else 3)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match="unknown to training"):
        TargetFeatures(target, ())


def test_a_checkpoint_of_another_drafter_is_refused(answers: list[Example], tmp_path: Path):
    run_of("eagle3", answers, tmp_path, stop_after=1).run()
    module, features = build_module(DrafterPlan("eagle3", layers=(1, 2), depth=3), walking_target(), None, answers)
    with pytest.raises(LoadError, match="another drafter"):
        Trainer(module, features, TrainPlan(5, muon_lr=0.02)).resume(tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.pt").write_bytes(b"cut")
    with pytest.raises(LoadError, match="cannot read the checkpoint"):
        Trainer(module, features, TrainPlan(5)).resume(tmp_path / "checkpoint.pt")


def test_rates_rise_and_fall():
    plan = TrainPlan(100, warmup=0.1, schedule="linear")
    rates = [plan.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert TrainPlan(100, schedule="constant").rate(99) == 1.0
    assert TrainPlan(100, warmup=0).rate(50) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps must be >= 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0, got 0.0"),
        ({"schedule": "step"}, "schedule must be constant"),
        ({"warmup": 1.0}, "warmup must be in"),
    ],
)
def test_a_plan_outside_its_rules_is_refused(options: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        TrainPlan(**{"total_steps": 5, **options})  # type: ignore[arg-type]


RANK = """
import os, sys
from pathlib import Path
import torch
os.environ |= {{"RANK": sys.argv[1], "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}}
from specdec.online_training.train_setup import join_group
from specdec.online_training.data import collate
from tests.online_training.test_train_loop import two_steps
with join_group("cpu"):
    two_steps(Path(r"{folder}"), kind="{kind}", rank=int(sys.argv[1]), ranks=2)
"""


def two_steps(folder: Path, *, kind: str, rank: int, ranks: int) -> None:
    """Three steps on shared batches, the last after a checkpoint; rank 0 writes the weights."""
    examples = [Example(np.arange(3 + i, 23 + i, dtype=np.int32), 2) for i in range(4)]
    plan = TrainPlan(3, learning_rate=1e-2)
    drafter = PLANS[kind]
    if kind == "dspark":  # anchors are drawn from a batch's seed: only where all are taken do halves add up
        drafter = replace(drafter, blocks=replace(drafter.blocks, anchors=64))
    for part in range(2):
        module, features = build_module(drafter, walking_target(), None, examples)
        trainer = Trainer(module, features, plan)
        if part:
            trainer.resume(folder / "checkpoint.pt")
        for _ in range(2 - part):
            share = len(examples) // ranks
            trainer.train_step([collate(examples[rank * share : (rank + 1) * share])])
        trainer.save(folder / "checkpoint.pt")


@pytest.mark.slow  # two processes that import everything: half a minute on a busy machine
@pytest.mark.parametrize("kind", ["eagle3", "dspark"])
def test_two_processes_train_what_one_does(kind: str, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "two").mkdir()
    code = RANK.format(port=port, kind=kind, folder=tmp_path / "two")
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, str(i)], stderr=subprocess.PIPE, text=True, cwd=Path.cwd())
        for i in range(2)
    ]
    (tmp_path / "one").mkdir()
    two_steps(tmp_path / "one", kind=kind, rank=0, ranks=1)
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert one["step"] == two["step"] == 3
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-3, atol=1e-4)
