"""Replay returns the recorded answer exactly, whoever decodes: transformers, its prompt lookup, our engine."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from specdec.bench.arms import EngineArm, GenerateArm, Job
from specdec.bench.forcing import ForcedResponse
from specdec.build import build_engine
from specdec.errors import ConfigError, UnsupportedError
from tests.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    made = tiny_llama()
    made.generation_config.eos_token_id = None
    return made


def job(length: int = 40, seed: int = 0) -> Job:
    """A prompt and an answer that copies from it, with an end token in the middle."""
    noise = np.random.default_rng(seed)
    prompt = noise.integers(0, 256, 50).astype(np.int32)
    answer = np.concatenate([prompt[10:30], [256], prompt[:20]])[:length].astype(np.int32)
    return Job(prompt, len(answer), answer)


def engine_of(model):
    return partial(build_engine, model, kv_tokens=400)


def arms(model):
    return [
        GenerateArm("generate", model),
        GenerateArm("prompt lookup", model, prompt_lookup_num_tokens=6),
        EngineArm("plain", engine_of(model), "none"),
        EngineArm("ngram", engine_of(model), "ngram", budget=8),
        EngineArm("ngram chain", engine_of(model), "ngram", drafter_options={"max_branches": 1}),
    ]


def test_every_arm_returns_the_recorded_answer(model):
    for arm in arms(model):
        for one in (job(), job(1), job(33, seed=1)):
            assert one.forced_ids is not None
            (done,) = arm.run([one])
            assert done.output_ids == one.forced_ids.tolist(), arm.name
            assert sum(done.emitted) == len(done.output_ids), arm.name
            assert len(done.stamps) == len(done.emitted), arm.name
            assert [*done.stamps, done.seconds] == sorted([*done.stamps, done.seconds]), arm.name


def test_speculating_arms_need_fewer_steps_and_say_what_they_did(model):
    plain, lookup, ours, drafted, _ = (arm.run([job()])[0] for arm in arms(model))
    assert len(plain.emitted) == len(ours.emitted) == 40
    assert len(lookup.emitted) < 30
    assert len(drafted.emitted) < 20
    assert sum(lookup.accepted) == 40 - len(lookup.emitted)
    assert sum(drafted.drafted) >= sum(drafted.accepted) >= 40 - len(drafted.emitted)
    assert max(drafted.depths) <= 8
    assert sum(drafted.parts_ms.values()) == pytest.approx(1e3 * drafted.seconds)
    assert min(drafted.parts_ms.values()) >= 0


def test_prompt_lookup_is_not_told_the_answer(model):
    # A prompt that promises a copy, and an answer that breaks the promise at once.
    prompt = np.array([1, 2, 3, 4, 5, 6, 7, 8, 1, 2], dtype=np.int32)
    answer = np.array([90, 1, 2, 91, 1, 2, 92], dtype=np.int32)
    (done,) = GenerateArm("prompt lookup", model, prompt_lookup_num_tokens=5).run([Job(prompt, 7, answer)])
    assert done.output_ids == answer.tolist()
    scores = ForcedResponse([answer], 10)(torch.zeros(1, 10, dtype=torch.int64), torch.ones(1, 257))
    assert torch.isfinite(scores).all()
    assert (scores == 1).sum() == 256


def test_nodes_of_a_tree_are_forced_as_single_calls_are(model):
    class Unvectorised:
        """The same processor without its vectorised form."""

        def __init__(self, inner):
            self.inner = inner

        def __call__(self, input_ids, scores):
            return self.inner(input_ids, scores)

    import specdec
    from specdec.build import build_engine

    one, outputs = job(), []
    for wrap in (Unvectorised, lambda processor: processor):
        engine = build_engine(model, "ngram", budget=8, kv_tokens=400)
        sampling = specdec.SamplingParams(
            max_new_tokens=40, logits_processors=(wrap(ForcedResponse([one.forced_ids], 50)),)
        )
        (*_, last) = engine.generate([specdec.Request("a", one.prompt_ids, sampling)])
        outputs.append((last.state.output_ids.tolist(), last.state.num_steps))
    assert outputs[0] == outputs[1]
    assert outputs[0][0] == one.forced_ids.tolist()


def test_rows_of_a_padded_batch_are_forced_each_to_its_own_answer(model):
    first, second = job(12), job(12, seed=1)
    ids = torch.zeros(2, 53, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, one in enumerate((first, second)):
        ids[row, 3:] = torch.from_numpy(one.prompt_ids.astype(np.int64))
        mask[row, 3:] = 1
    forced = ForcedResponse([first.forced_ids, second.forced_ids], 53)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
        logits_processor=[forced],
    )  # fmt: skip
    assert out[:, 53:].tolist() == [first.forced_ids.tolist(), second.forced_ids.tolist()]
    with pytest.raises(ConfigError, match="at least one row"):
        ForcedResponse([], 0)


def test_live_arms_say_the_same_and_stop_at_the_same_token(model):
    prompt = job().prompt_ids
    (free,) = GenerateArm("generate", model).run([Job(prompt, 24)])
    stop = free.output_ids[10]
    expected = free.output_ids[: free.output_ids.index(stop) + 1]
    assistant = GenerateArm("assisted", model, assistant=tiny_llama(seed=1))
    for arm in (*arms(model), assistant):
        assert arm.run([Job(prompt, 24)])[0].output_ids == free.output_ids, arm.name
        assert arm.run([Job(prompt, 24, stop_ids=(stop,))])[0].output_ids == expected, arm.name


def test_a_forced_assistant_is_refused(model):
    with pytest.raises(UnsupportedError, match="live only"):
        GenerateArm("assisted", model, assistant=tiny_llama(seed=1)).run([job()])


def test_an_engine_arm_forgets_on_reset_and_can_be_warmed(model):
    made = []

    class Learner:
        from specdec.protocols import DrafterNeeds

        needs = DrafterNeeds()

        def __init__(self):
            self.stopped = []
            made.append(self)

        def start(self, states):
            self.seen = [state.token_ids.tolist() for state in states]

        def propose(self, states, budgets):
            from specdec.types import DraftTree

            self.seen = [state.token_ids.tolist() for state in states]
            return [DraftTree.root_only(int(state.token_ids[-1])) for state in states]

        def observe(self, events):
            pass

        def stop(self, request_ids):
            self.stopped += request_ids

    arm = EngineArm("learner", engine_of(model), Learner)
    arm.reset()
    arm.warm([job()])
    assert len(made) == 2
    assert made[-1].stopped == ["warm-0"]
    assert made[-1].seen == [[*job().prompt_ids.tolist(), *job().forced_ids.tolist()]]
