"""A step's order of work on a device that works on its own, played by one that does nothing until it is waited for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec import device_work
from specdec.config import EngineConfig
from specdec.controller import FixedController
from specdec.device_work import DeviceClock, start_copy
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.engine import Engine
from specdec.probe import probe
from specdec.sampling import Sampler
from specdec.toy import ToyTarget
from specdec.tree_target import TreeTarget
from specdec.types import Request, SamplingParams
from specdec.verifier import match
from specdec.verifier.match import MatchVerifier
from tests.tiny_models import tiny_llama

VOCAB_SIZE = 20


class SlowDevice:
    """Copies arrive only when somebody waits; until then the host's memory holds an impossible token."""

    def __init__(self, log):
        self.log, self.now = log, 0.0

    def copy(self, ids):
        on_host = np.full(len(ids), -1, dtype=np.int32)
        self.log.append("copy")

        def wait():
            self.log.append("wait")
            on_host[:] = ids.numpy()
            return on_host

        return wait

    def mark(self):
        self.log.append("mark")
        self.now += 5.0
        return self.now

    def ms(self, begin, end):
        assert self.log[-1] != "copy", "asked before the device is done"
        return end - begin


def logged(log, name, function):
    def call(*arguments):
        log.append(name)
        return function(*arguments)

    return call


def test_one_copy_a_step_and_the_host_prepares_the_walk_while_it_travels(monkeypatch):
    log = []
    device = SlowDevice(log)
    target, drafter = ToyTarget(vocab_size=VOCAB_SIZE), NgramDrafter()
    seen = []

    class Times:
        def observe(self, events):
            log.append("observe")
            seen.extend(event.trace.target_ms for event in events)

    engine = Engine(
        target,
        MatchVerifier(Sampler(VOCAB_SIZE, copy=device.copy)),
        drafter,
        FixedController(3),
        clock=device,
        observers=[Times()],
    )
    for owner, name in ((target, "forward"), (target, "commit"), (drafter, "propose")):
        setattr(owner, name, logged(log, name, getattr(owner, name)))
    monkeypatch.setattr(match.np, "concatenate", logged(log, "walk", np.concatenate))
    prompts = [[1, 2, 3, 1, 2], [4, 5, 4]]
    requests = [
        Request(str(i), np.array(ids, dtype=np.int32), SamplingParams(max_new_tokens=6))
        for i, ids in enumerate(prompts)
    ]
    texts = {}
    for output in engine.generate(requests):
        texts.setdefault(output.request_id, []).extend(output.new_ids)
    monkeypatch.undo()
    steps = []
    for name in log:
        if name == "propose":
            steps.append([])
        steps[-1].append(name)
    order = ["propose", "mark", "forward", "mark", "copy", "wait", "commit", "observe"]
    for step in steps:
        assert [name for name in step if name != "walk"] == order
        assert "walk" in step[step.index("copy") : step.index("wait")]
    assert seen
    assert set(seen) == {5.0}
    usual = Engine(
        ToyTarget(vocab_size=VOCAB_SIZE), MatchVerifier(Sampler(VOCAB_SIZE)), NgramDrafter(), FixedController(3)
    )
    wanted = {}
    for output in usual.generate(requests):
        wanted.setdefault(output.request_id, []).extend(output.new_ids)
    assert texts == wanted


def test_on_a_cpu_a_copy_is_there_at_once_and_the_wall_keeps_the_time():
    assert start_copy(torch.tensor([3, 1]))().tolist() == [3, 1]
    clock = DeviceClock(torch.device("cpu"))
    begin = clock.mark()
    assert clock.ms(begin, begin) == 0
    assert clock.ms(begin, clock.mark()) > 0


@pytest.mark.gpu
def test_a_copy_waits_for_what_was_launched_before_it():
    ids = torch.zeros(4, dtype=torch.int32, device="cuda")
    big = torch.randn(4000, 4000, device="cuda")
    clock = DeviceClock(big.device)
    begin = clock.mark()
    for _ in range(20):
        big = (big @ big).tanh()
    ids += 1 + (big.abs().max() < 2).int()
    wait = start_copy(ids)
    end = clock.mark()
    assert wait().tolist() == [2] * 4
    torch.cuda.synchronize()
    assert clock.ms(begin, end) > 0.1


def test_what_drafters_read_of_a_prompt_rides_with_the_drawn_tokens(monkeypatch):
    """Three steps read the prompt; the last of them draws, and needs no copy beside that of the draw."""
    own, log, found = [], [], {}
    monkeypatch.setattr(device_work, "start_copy", lambda ids: (own.append(len(ids)), start_copy(ids))[1])
    model = tiny_llama()
    target = TreeTarget(
        model, probe(model), kv_tokens=64, max_length=40, max_batch_size=1, max_step_tokens=8, num_successors=3
    )

    class Watch:
        def observe(self, events):
            for event in events:
                first, last = event.output.cu_nodes[event.row : event.row + 2]
                likeliest = event.output.logits[first:last].topk(3).indices
                assert np.array_equal(event.output.late.read()[first:last], likeliest)
                for one in event.state.successors:
                    found.update(zip(one.token_ids.tolist(), one.next_ids.tolist(), strict=True))

    engine = Engine(
        target, MatchVerifier(Sampler(target.vocab_size, copy=SlowDevice(log).copy)), NoDrafter(), FixedController(0),
        config=EngineConfig(max_prefill_tokens=8), observers=[Watch()],
    )  # fmt: skip
    prompt = np.random.default_rng(1).permutation(200)[:20].astype(np.int32)  # each token once
    state = engine.submit(Request("r", prompt, SamplingParams(max_new_tokens=2)))
    while engine.has_work:
        engine.step()
    assert state.num_output_tokens == 2
    assert log == ["copy", "wait"] * 2, "one for each step that draws"
    assert len(own) == 2, "one for each step that only reads"
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt).long()[None]).logits[0, :-1]
    assert found == dict(zip(prompt[:-1].tolist(), logits.topk(3).indices.tolist(), strict=True))
