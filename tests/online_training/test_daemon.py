"""The daemon: shards are learned from once, whatever dies; what is not better is withheld, or not even tried."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from specdec.errors import ConfigError, LoadError
from specdec.online_training.daemon import DaemonOptions, TrainDaemon
from specdec.online_training.gate import GateOptions, TrainGate
from specdec.online_training.records import Rounds, TraceRecord
from specdec.online_training.registry import Registry
from specdec.online_training.replay_pool import ReplayMix, ReplayPool
from specdec.online_training.spool import Spool
from tests.online_training.dying import CountingLearner
from tests.online_training.traces import HASHES, ints, record

TARGET = "f" * 32


def numbered(number: int, *, tenant: str = "t", accepted: int = 1) -> TraceRecord:
    """A request that the pool does not hold out, unless its number is a multiple of ten."""
    made = record(f"{number:032x}", tenant=tenant)
    rounds = {name: getattr(made.rounds, name) for name in Rounds.__dataclass_fields__}
    rounds["num_accepted"] = ints(accepted, accepted)
    prompt_hash = f"{number % 10 or 10:08x}" + "0" * 24
    fields = {name: getattr(made, name) for name in TraceRecord.__dataclass_fields__}
    return TraceRecord(**{**fields, "rounds": Rounds(**rounds), "prompt_hash": prompt_hash})


class JudgedLearner(CountingLearner):
    """Has the simulated acceptance lengths that a test gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.length, self.resets = 1.0, list[tuple[Path, float]]()
        self.batches: list[list[str]] = []

    def learn(self, records: Sequence[TraceRecord]) -> Any:
        self.batches.append([one.trace_id for one in records])
        return super().learn(records)

    def judge(self, records: Sequence[TraceRecord], weights: Mapping[str, Tensor] | None = None) -> float:
        return self.length if weights is None else 2.0

    def reset(self, folder: Path, *, rate: float) -> None:
        self.resets.append((folder, rate))


def daemon_at(root: Path, learner: Any = None, gate: TrainGate | None = None, **options: Any) -> TrainDaemon:
    given = {"tokens_per_step": 10, "publish_steps": 2, "checkpoint_s": 0.0, **options}
    return TrainDaemon(
        Spool(root / "spool"), Registry(root / "registry"), learner or JudgedLearner(), target=TARGET,
        work=root / "work", options=DaemonOptions(**given), gate=gate,
    )  # fmt: skip


def die(rounds: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.online_training.dying", "--rounds", str(rounds)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    result: dict[str, int] = json.loads(run.stdout)
    return result


def test_killed_at_random_points_nothing_is_lost_or_counted_twice() -> None:
    """Some rounds; the slow test and ``python -m tests.online_training.dying`` do two hundred."""
    result = die(12)
    assert result["shards"] > 5
    assert result["versions"] > 5


@pytest.mark.slow
def test_killed_at_random_points_two_hundred_times() -> None:
    assert die(200)["rounds"] == 200


def test_a_shard_is_learned_from_acknowledged_and_published(tmp_path: Path) -> None:
    spool, registry = Spool(tmp_path / "spool"), Registry(tmp_path / "registry")
    names = [spool.put([numbered(i)]) for i in (1, 2, 3)]
    learner = JudgedLearner()
    daemon = daemon_at(tmp_path, learner)
    while daemon.step():
        pass
    assert learner.seen == [f"{i:032x}" for i in (1, 2, 3)]
    assert [folder.name for folder in spool.done()] == names
    assert daemon.ledger.totals() == (3, 3, 15)
    manifest = registry.check(1)
    assert manifest.window == tuple(names[:2])
    assert manifest.tenants == (HASHES.text("t"),)
    assert manifest.step == 2
    daemon.close()


def test_records_of_another_target_teach_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    fields = {name: getattr(numbered(1), name) for name in TraceRecord.__dataclass_fields__}
    spool.put([TraceRecord(**{**fields, "target": "0" * 32}), numbered(2)])
    learner = JudgedLearner()
    daemon = daemon_at(tmp_path, learner)
    daemon.step()
    assert learner.seen == [f"{2:032x}"]
    daemon.close()


def test_an_interrupted_daemon_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    for i in (1, 2, 3):
        spool.put([numbered(i)])
    first = daemon_at(tmp_path, checkpoint_s=1e9)
    first.step()
    first.save()
    first.step()  # learned, but in no checkpoint: the process dies here
    learner = JudgedLearner()
    again = daemon_at(tmp_path, learner)
    assert learner.seen == [f"{1:032x}"]
    while again.step():
        pass
    assert learner.seen == [f"{i:032x}" for i in (1, 2, 3)]
    again.close()


def test_a_broken_checkpoint_is_said(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(LoadError, match="cannot read the checkpoint"):
        daemon_at(tmp_path)


def test_what_is_worse_on_heldout_requests_is_withheld(tmp_path: Path) -> None:
    spool, registry = Spool(tmp_path / "spool"), Registry(tmp_path / "registry")
    learner = JudgedLearner()
    daemon = daemon_at(tmp_path, learner)
    for number, length in ((10, 1.0), (1, 1.0), (2, 1.0), (3, 1.9), (4, 1.9), (5, 1.99), (6, 1.99)):
        learner.length = length
        spool.put([numbered(number)])
        daemon.step()
    assert registry.numbers() == [1, 2]  # the one with 1.9, against 2.0 of the first, was withheld
    assert daemon.status.num_withheld == 1
    assert registry.manifest(2).acceptance_length == 1.99
    assert registry.manifest(2).parent == 1
    assert f"{10:032x}" not in learner.seen  # held out
    daemon.close()


def test_a_refused_version_sends_the_learner_back_slower_and_quarantines_its_window(tmp_path: Path) -> None:
    spool, registry = Spool(tmp_path / "spool"), Registry(tmp_path / "registry")
    learner = JudgedLearner()
    learner.length = 2.0
    daemon = daemon_at(tmp_path, learner)
    for number in (1, 2):
        spool.put([numbered(number)])
        daemon.step()
    registry.promote(1, "first")
    poisoned = [spool.put([numbered(number)]) for number in (3, 4)]
    daemon.step()
    daemon.step()
    assert registry.numbers() == [1, 2]
    assert set(poisoned) <= daemon.pool.shard_ids
    registry.promote(2, "newest")
    registry.rollback("worse")
    daemon.step()
    assert learner.resets == [(registry.path(1), 0.5)]
    assert not set(poisoned) & daemon.pool.shard_ids
    assert daemon.pool.shard_ids
    daemon.step()
    assert len(learner.resets) == 1  # once
    daemon.close()


def test_a_version_whose_trial_ended_undecided_is_not_held_against_its_data(tmp_path: Path) -> None:
    spool, registry = Spool(tmp_path / "spool"), Registry(tmp_path / "registry")
    learner = JudgedLearner()
    learner.length = 2.0
    daemon = daemon_at(tmp_path, learner)
    for number in (1, 2, 3, 4):
        spool.put([numbered(number)])
        daemon.step()
    registry.promote(1, "first")
    registry.try_out(2, "newest")
    registry.end_trial("-1% to +1%", is_worse=False)
    shards = daemon.pool.shard_ids
    daemon.step()
    assert learner.resets == []
    assert daemon.pool.shard_ids == shards
    assert 2 in registry.state().marks
    daemon.close()


def test_a_forgotten_tenant_is_not_replayed(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    learner = JudgedLearner()
    daemon = daemon_at(tmp_path, learner)
    for number in range(1, 8):
        spool.put([numbered(number, tenant="x" if number < 4 else "y")])
        daemon.step()
    spool.forget(HASHES.text("x"))
    spool.put([numbered(8, tenant="y")])
    daemon.step()
    learner.batches.clear()
    for number in range(11, 18):
        spool.put([numbered(number, tenant="y")])
        daemon.step()
    replayed = {name for batch in learner.batches for name in batch}
    assert not replayed & {f"{i:032x}" for i in (1, 2, 3)}
    assert replayed & {f"{i:032x}" for i in (4, 5, 6)}
    daemon.close()


def test_a_step_is_half_new_text_and_half_old() -> None:
    pool = ReplayPool(ReplayMix())
    pool.add("old", [numbered(i) for i in range(1, 100)])
    drawn = [len(pool.draw(step, 100)) * 5 for step in range(200)]
    assert 85 < sum(drawn) / len(drawn) < 115
    anchors = {f"{i:032x}" for i in range(1, 65)}
    late = [one.trace_id for step in range(200) for one in pool.draw(step, 100)]
    assert 0.6 < sum(name in anchors for name in late) / len(late) < 0.85  # 64 of 99 by chance, and the fixed tenth
    assert [one.trace_id for one in pool.draw(7, 100)] == [one.trace_id for one in pool.draw(7, 100)]


def test_the_reservoir_is_an_even_sample() -> None:
    counts = [0] * 10
    for seed in range(40):
        pool = ReplayPool(ReplayMix(num_reservoir=20), seed=seed)
        pool.add("s", [numbered(i) for i in range(200)])
        for _, one in pool._reservoir:
            counts[int(one.trace_id, 16) // 20] += 1
    assert sum(counts) == 800
    assert all(45 < count < 115 for count in counts)  # 80 +- 4 standard deviations


def test_a_prompt_is_held_out_every_time_or_never() -> None:
    pool = ReplayPool(ReplayMix(heldout_every=3))
    records = [numbered(i) for i in range(1, 30)] * 2
    taught = pool.split("s", records)
    assert 0 < len(taught) < len(records)
    held = {one.prompt_hash for one in pool.heldout}
    assert not held & {one.prompt_hash for one in taught}


def test_the_gate_sleeps_without_gain_and_wakes_on_a_fall() -> None:
    gate = TrainGate(GateOptions(half_life=5, patience=2))
    gate.observe([numbered(1, accepted=2)] * 30)
    assert gate.served == pytest.approx(3.0)
    gate.judged(2.0, 2.0)
    assert gate.is_open
    gate.judged(2.1, 2.0)
    gate.judged(2.0, 2.0)
    assert gate.is_open  # the gain began the count anew
    gate.judged(2.0, 2.0)
    assert not gate.is_open
    gate.observe([numbered(1, accepted=2)] * 10)
    assert not gate.is_open
    gate.observe([numbered(1, accepted=1)] * 3)
    assert gate.is_open


def test_a_sleeping_daemon_remembers_and_does_not_learn(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    learner, gate = JudgedLearner(), TrainGate()
    daemon = daemon_at(tmp_path, learner, gate)
    gate.is_open = False
    name = spool.put([numbered(1)])
    assert daemon.step()
    assert learner.seen == []
    assert daemon.status.num_skipped == 1
    assert daemon.ledger.has(name)
    assert daemon.pool.shard_ids == {name}
    daemon.close()


def test_a_rehearsing_daemon_learns_on_from_what_it_remembers_until_nothing_is_gained(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.put([numbered(1)])
    learner, gate = JudgedLearner(), TrainGate()
    daemon = daemon_at(tmp_path, learner, gate, rehearses=True)
    assert [daemon.step() for _ in range(4)] == [True] * 4
    assert learner.step == 4
    assert {name for batch in learner.batches for name in batch} == {f"{1:032x}"}
    assert daemon.ledger.totals()[0] == 1  # rehearsed, but counted once
    gate.is_open = False
    assert not daemon.step()
    assert learner.step == 4
    again = daemon_at(tmp_path, third := JudgedLearner())
    assert third.step == 4  # rehearsals are in the checkpoint
    assert not again.step()
    again.close()
    daemon.close()


def test_a_daemon_beside_a_server_rests_as_much_as_its_duty_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, rests = [0.0], list[float]()

    class Clock:
        @staticmethod
        def monotonic() -> float:
            now[0] += 1.0  # seconds between any two looks
            return now[0]

        sleep = staticmethod(rests.append)

    monkeypatch.setattr("specdec.online_training.daemon.time", Clock)
    Spool(tmp_path / "spool").put([numbered(1)])
    daemon = TrainDaemon(
        Spool(tmp_path / "spool"), Registry(tmp_path / "registry"), JudgedLearner(), target=TARGET,
        work=tmp_path / "work", duty=0.25,
    )  # fmt: skip
    daemon.step()
    assert rests == [3.0]
    daemon.close()


def test_a_daemon_that_does_not_rehearse_waits(tmp_path: Path) -> None:
    Spool(tmp_path / "spool").put([numbered(1)])
    daemon = daemon_at(tmp_path)
    assert [daemon.step(), daemon.step()] == [True, False]
    daemon.close()


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match="must be >= 0 and make 1"):
        ReplayMix(new=0.5, reservoir=0.5, anchors=0.5)
    with pytest.raises(ConfigError, match="must be >= 1"):
        DaemonOptions(publish_steps=0)
    with pytest.raises(ConfigError, match="patience >= 1"):
        GateOptions(patience=0)
