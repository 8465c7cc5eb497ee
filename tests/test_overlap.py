from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from specdec.beside import StreamBeside, ThreadBeside, beside_for
from specdec.build import build_engine, load_drafter
from specdec.cost_model import BATCHES, CONTEXTS, TOKENS, CostModel, CostTable, line_of
from specdec.drafters.lm import LmDrafter
from specdec.errors import ConfigError, UnsupportedError
from specdec.overlap import StepOverlap, grafted, rest_of
from specdec.overlap_costs import AutoOverlap, FixedOverlap, Trial, chunk_gains, halves_gain
from specdec.types import DraftTree, Request, RequestState, SamplingParams
from tests.drafters import diffusion_checkpoints, eagle_checkpoints
from tests.drafters.eagle_checkpoints import eagle_target
from tests.erratic import Erratic, Inline

_T = TypeVar("_T")


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return eagle_target()


@pytest.fixture(scope="module")
def names(target: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("heads")
    noisy = eagle_target()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in noisy.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    noisy.save_pretrained(folder / "lm")
    eagle = eagle_checkpoints.write(next(iter(eagle_checkpoints.LAYOUTS)), folder / "eagle")
    diffusion = diffusion_checkpoints.write(next(iter(diffusion_checkpoints.DIALECTS)), folder / "diffusion")
    return {
        "lm": f"lm:{folder / 'lm'}?min_gain=0&depth=5",
        "chain": f"lm:{folder / 'lm'}?min_gain=0&depth=2&top_k=1&width=1",
        "eagle": f"eagle:{eagle}?min_gain=0&depth=4",
        "diffusion": f"diffusion:{diffusion}",
        "early-exit": "early-exit:5?min_gain=0&depth=4",
    }


def requests() -> list[Request]:
    text = np.array([1, 2, 3, 4, 5, 1, 2, 3] * 3, np.int32)
    return [
        Request(f"r{i}", text[i:] + i // 3, SamplingParams(max_new_tokens=18, temperature=0.8 * (i % 2), seed=i))
        for i in range(6)
    ]


def serve(engine: Any, *, cancel: str | None = None) -> dict[str, list[int]]:
    """What every request said; one of them is cancelled after its first tokens."""
    found: dict[str, list[int]] = {}
    for output in engine.generate(requests()):
        found.setdefault(output.request_id, []).extend(output.new_ids)
        if output.request_id == cancel and output.finish_reason is None:
            engine.cancel(cancel)
    return found


def overlapped(engine: Any, policy: Any, beside: Any) -> StepOverlap:
    engine.overlap = StepOverlap(policy, beside)
    return engine.overlap


@pytest.mark.parametrize(
    ("drafter", "threads"),
    [
        ("ngram", True), ("suffix", True), ("fused:suffix+lookahead+recycling", True), ("lm", True), ("chain", True),
        ("lm", False), ("eagle", False), ("diffusion", False), ("early-exit", False),
    ],
)  # fmt: skip
def test_halves_and_chunks_as_the_dice_fall_change_no_token(
    target: LlamaForCausalLM, names: dict[str, str], drafter: str, threads: bool
) -> None:
    with build_engine(target, "none", budget=0) as engine:
        plain = serve(engine)
    options: dict[str, Any] = {"kv_tokens": 90, "max_batch_size": 4, "max_prefill_tokens": 16}  # two requests crowd it
    with build_engine(target, names.get(drafter, drafter), budget=7, overlap="off", **options) as engine:
        overlap = overlapped(engine, Erratic(3), ThreadBeside() if threads else Inline())
        said = serve(engine, cancel="r4")
        assert plain["r4"][: len(said["r4"])] == said.pop("r4")
        assert said == {name: ids for name, ids in plain.items() if name != "r4"}
        assert overlap.num_split_steps > 0
        assert not any((overlap._ready, overlap._whole, overlap._shown, overlap._limits))
        assert engine.target.pool.num_used == 0
        if isinstance(engine.drafter, LmDrafter):
            assert engine.drafter.model.num_used == 0


def test_drafts_behind_a_chunk_come_true_and_wrong_ones_are_forgotten(
    target: LlamaForCausalLM, names: dict[str, str]
) -> None:
    with build_engine(target, "none", budget=0) as engine:
        plain = serve(engine)
    with build_engine(target, names["chain"], budget=6, overlap="off") as engine:
        overlap = overlapped(engine, FixedOverlap("chunks", levels=2), ThreadBeside())
        assert serve(engine) == plain
        assert overlap.num_chunked_steps > 0
        assert overlap.num_reused > 0
        # What is shown in advance and taken back leaves the draft model as if it had never been shown.
        drafter = load_drafter(names["chain"], target)
        request = requests()[0]
        state, guess, fresh = RequestState(request), RequestState(request), RequestState(request)
        guess.append([7, 8, 9])
        before = drafter.propose([state], [4])[0]
        assert drafter.propose([guess], [4])[0].token_ids[0] == 9
        drafter.rewind(request.request_id, state.num_tokens)  # type: ignore[attr-defined]
        for one in (state, fresh):
            one.append([11, 12, 13, 14])
        again = drafter.propose([state], [4])[0]
        other = load_drafter(names["chain"], target).propose([fresh], [4])[0]
        assert again.token_ids.tolist() == other.token_ids.tolist() != before.token_ids.tolist()


def test_what_is_left_of_a_draft() -> None:
    tree = DraftTree(
        np.array([9, 1, 2, 3, 4, 5], np.int32), np.array([-1, 0, 0, 1, 3, 2], np.int32),
        np.array([1, 0.8, 0.1, 0.4, 0.2, 0.05], np.float32), np.array([0, 1, 2, 1, 1, 2], np.uint8),
    )  # fmt: skip
    rest = rest_of(tree, [1])
    assert rest is not None
    rest.check(10)
    assert rest.token_ids.tolist() == [1, 3, 4]
    assert rest.parents.tolist() == [-1, 0, 1]
    assert rest.values is not None
    assert rest.values.tolist() == pytest.approx([1.0, 0.5, 0.25])
    assert rest.sources is not None
    assert rest.sources.tolist() == [1, 1, 1]
    assert rest_of(tree, [1, 3, 4]) is None  # nothing is behind
    assert rest_of(tree, [2, 3]) is None  # another way
    more = DraftTree(np.array([4, 6, 7], np.int32), np.array([-1, 0, 0], np.int32))
    longer = grafted(tree, 4, more)
    longer.check(10)
    assert longer.token_ids[longer.path(7)].tolist() == [9, 1, 3, 4, 7]


def test_a_failure_beside_the_forward_is_raised_and_nothing_is_lost(target: LlamaForCausalLM) -> None:
    with build_engine(target, "none", budget=0) as engine:
        plain = serve(engine)
    with build_engine(target, "ngram", budget=4, overlap="halves") as engine:
        propose, calls = engine.drafter.propose, iter(range(1000))

        def fails_once(*args: Any) -> Any:
            if next(calls) == 3:
                raise RuntimeError("no draft")
            return propose(*args)

        engine.drafter.propose = fails_once  # type: ignore[method-assign]
        found: dict[str, list[int]] = {}
        failures: list[str] = []
        for request in requests():
            engine.submit(request)
        while engine.has_work:
            try:
                for output in engine.step():
                    found.setdefault(output.request_id, []).extend(output.new_ids)
            except RuntimeError as error:
                failures.append(str(error))
        assert failures == ["no draft"]
        assert found == plain


class Cuda:
    """Stands in for ``torch.cuda`` and notes the order of what is asked."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.green_contexts = self
        self.SUPPORTED = True
        self.GreenContext = self

    def create(self, *, num_sms: int, device_id: int) -> Any:
        if num_sms > 100:
            raise RuntimeError("too many")
        self.log.append(f"context of {num_sms}")
        return self

    def Stream(self, device: Any = None) -> Any:
        return _Stream(self, "side")

    def Event(self) -> Any:
        return self

    def record(self, stream: Any) -> None:
        self.log.append(f"{stream.name} records")

    def current_stream(self, device: Any) -> Any:
        return _Stream(self, "main")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        yield
        self.log.append(f"off {stream.name}")


class _Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: Any) -> None:
        self.cuda.log.append(f"{self.name} waits for the event")

    def wait_stream(self, stream: Any) -> None:
        self.cuda.log.append(f"{self.name} waits for {stream.name}")

    def synchronize(self) -> None:
        self.cuda.log.append(f"{self.name} is waited for")


def test_a_side_stream_sees_what_was_queued_before_and_the_main_one_goes_on_behind_it() -> None:
    cuda = Cuda()
    beside = StreamBeside(torch.device("cuda", 0), cuda=cuda)
    finish = beside.start(lambda: cuda.log.append("drafts"))
    cuda.log.append("forward")
    finish()
    beside.close()
    assert cuda.log == [
        "main records", "forward", "side waits for the event", "on side", "drafts", "off side", "main waits for side",
        "side is waited for",
    ]  # fmt: skip


def test_a_green_context_is_asked_for_or_refused_by_name() -> None:
    cuda = Cuda()
    StreamBeside(torch.device("cuda", 0), num_sms=16, cuda=cuda).close()
    assert cuda.log[0] == "context of 16"
    with pytest.raises(UnsupportedError, match="no green context of 200"):
        StreamBeside(torch.device("cuda", 0), num_sms=200, cuda=cuda)
    cuda.SUPPORTED = False
    with pytest.raises(UnsupportedError, match="num_sms must be 0"):
        StreamBeside(torch.device("cuda", 0), num_sms=16, cuda=cuda)
    with pytest.raises(ConfigError, match="num_sms must be >= 0"):
        StreamBeside(torch.device("cuda", 0), num_sms=-1, cuda=cuda)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        beside_for(torch.device("cpu"), num_sms=8)


def table(ms: Callable[[float], float]) -> CostModel:
    row = np.array([ms(tokens) for tokens in TOKENS])
    return CostModel({"target": CostTable(np.broadcast_to(row, (len(BATCHES), len(CONTEXTS), len(TOKENS))).copy())})


def test_costs_promise_halves_where_drafting_is_dear() -> None:
    linear = CostModel({"target": line_of(0.1, 1.0), "draft": line_of(0.1, 1.0)})
    flat = CostModel({"target": line_of(20.0, 0.01), "draft": line_of(0.1, 0.1)})
    assert halves_gain(linear, 16, 100) == pytest.approx(2.0, rel=0.05)  # all drafting is hidden
    assert halves_gain(flat, 16, 100) == pytest.approx(0.5, rel=0.1)  # the target runs twice as often
    assert halves_gain(linear, 16, 100, hidden=0.0) == pytest.approx(1.0, rel=0.05)  # nothing is
    assert halves_gain(flat, 16, 100, hidden=0.0) < halves_gain(flat, 16, 100)
    assert halves_gain(CostModel(), 16, 100) == halves_gain(linear, 1, 100) == 1.0


def chains(count: int, depth: int, chance: float) -> list[DraftTree]:
    made = []
    for _ in range(count):
        tree = DraftTree.chain(1, np.arange(depth, dtype=np.int32))
        tree.values = (chance ** np.arange(depth + 1)).astype(np.float32)
        made.append(tree)
    return made


def test_chunks_are_chosen_where_rows_are_dear_and_declined_on_the_costs_that_were_measured_here() -> None:
    trees = chains(8, 12, 0.4)
    steep = table(lambda tokens: 2.0 + tokens)
    gains = chunk_gains(steep, trees, 200)
    first, rows = 2.0 + 8 * 4, 8 * 0.4**4 * 9  # three levels and the roots; what is left of those that go on
    again = (1 - (1 - 0.4**4) ** 8) * (2.0 + max(rows, 1.0))
    assert gains[2] == pytest.approx((2.0 + 8 * 13) / (first + again), rel=1e-5)
    assert gains[11] == 1.0  # one part
    results = json.loads(Path("bench/results/adaptive_agents.json").read_text(encoding="utf-8"))
    measured = next(row for row in results["agents"] if row["concurrency"] == 1)["fused"]["step_ms"]
    sizes = sorted(map(int, measured))
    here = table(lambda tokens: float(np.interp(tokens, sizes, [measured[str(size)] for size in sizes])))
    for chance in (0.5, 0.7, 0.8, 0.9, 0.95):

        def speed(depth: int, chance: float = chance) -> float:
            return sum(chance**level for level in range(depth + 1)) / here.step_ms(depth + 1, 200, 1)

        # Of drafts that are cut where more of them would cost more than they bring, no part is worth a second forward.
        depth = max(range(1, 32), key=speed)
        assert chunk_gains(here, chains(1, depth, chance), 200).max() < 1.05
    states = [RequestState(request) for request in requests()]
    trees = chains(len(states), 12, 0.4)

    def levels(costs: CostModel) -> int:
        policy = AutoOverlap(costs, clock=lambda: 0.0, learn=0)
        policy.chunks._left, policy.chunks._is_won = 10, True
        return policy.levels(states, trees)

    assert 1 <= levels(steep) <= 4
    assert levels(table(lambda tokens: 20.0 + 0.01 * tokens)) == 0


def test_a_trial_keeps_what_wins_and_leaves_what_loses_for_longer_each_time() -> None:
    trial = Trial(stretch=4, rounds=2, keep=10)
    seen = []
    for _ in range(16):
        seen.append(trial.is_on)
        trial.note(1.0, 5.0 if trial.is_on else 10.0)
    assert seen == ([False] * 4 + [True] * 4) * 2
    assert trial.gain == pytest.approx(2.0)
    kept = [trial.is_on for _ in range(10) if trial.note(1.0, 1.0) is None]
    assert kept[:9] == [True] * 9
    pauses = []
    for _ in range(2):  # now it loses, twice
        for _ in range(16):
            trial.note(1.0, 20.0 if trial.is_on else 10.0)
        assert trial.gain == pytest.approx(0.5)
        pauses.append(trial._left)
        while trial._left:
            assert not trial.is_on
            trial.note(1.0, 1.0)
    assert pauses == [10, 20]


@pytest.mark.parametrize(("factor", "is_kept"), [(0.5, True), (1.5, False)])
def test_auto_tries_what_the_costs_promise_and_keeps_it_only_if_it_wins(factor: float, is_kept: bool) -> None:
    costs, now = CostModel({"target": line_of(0.1, 1.0), "draft": line_of(0.1, 1.0)}), [0.0]
    policy = AutoOverlap(costs, clock=lambda: now[0], learn=4)
    trace = type("Trace", (), {"num_accepted": 0, "num_emitted": 1, "target_ms": 1.0, "draft_ms": 1.0, "position": 9})
    event: Any = type("Event", (), {"trace": trace, "tree": DraftTree.root_only(1)})
    taken = []
    for _ in range(400):
        splits = policy.splits(8, 100.0)
        taken.append(splits)
        now[0] += 1e-2 * (factor if splits else 1.0)
        policy.observe([event] * 8)
    assert not any(taken[:4])
    assert any(taken[4:150])  # it was tried
    assert all(taken[160:]) == any(taken[160:]) == is_kept
    assert policy.halves.gain == pytest.approx(1 / factor, rel=0.01)
    closed = AutoOverlap(costs, hidden=0.0, clock=lambda: 0.0, learn=0)
    assert not closed.splits(8, 100.0)


def test_the_option_of_an_engine(target: LlamaForCausalLM, names: dict[str, str]) -> None:
    with build_engine(target, "ngram") as engine:
        assert engine.overlap is not None
        assert isinstance(engine.overlap.policy, AutoOverlap)
    for options in ({"drafter": "none"}, {"overlap": "off"}, {"drafter": names["chain"], "verifier": "chain"}):
        with build_engine(target, **{"drafter": "ngram", **options}) as engine:
            assert engine.overlap is None
    with pytest.raises(UnsupportedError, match='overlap="chunks" is impossible here: drafts of another step'):
        build_engine(target, names["chain"], verifier="chain", overlap="chunks")
    with pytest.raises(UnsupportedError, match="LmDrafter may run modules of the target"):
        build_engine(target, names["early-exit"], overlap="halves")
    with build_engine(target, "none", budget=0) as engine:
        plain = serve(engine)
    for mode in ("halves", "chunks"):
        with build_engine(target, names["lm"], overlap=mode, budget=30) as engine:
            assert serve(engine) == plain
            assert engine.overlap is not None
            assert (engine.overlap.num_split_steps > 0) == (mode == "halves")
            assert (engine.overlap.num_chunked_steps > 0) == (mode == "chunks")
    with pytest.raises(ConfigError, match="fixed overlap is halves or chunks"):
        FixedOverlap("chunks", levels=0)
