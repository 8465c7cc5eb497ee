"""Kills a writer, a trainer and a publisher at random moments, round after round, and checks what they leave behind.

    python -m tests.online_training.dying --rounds 200

Prints one line of JSON; exits with 1 and the broken rule if one is broken. The rules: every shard and version that can
be seen is whole; no shard whose writing was acknowledged is lost; a shard is in the trainer's weights at most once, in
the ledger if it is done with, and the trainer goes on where its last checkpoint was.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.online_training.daemon import DaemonOptions, TrainDaemon
from specdec.online_training.learner import LearnReport
from specdec.online_training.ledger import Ledger
from specdec.online_training.records import TraceRecord
from specdec.online_training.registry import Manifest, Registry
from specdec.online_training.spool import Spool, read_shard
from tests.online_training.traces import record

TARGET = "f" * 32


class CountingLearner:
    """Its weights are the list of the requests that it learned from."""

    kind = "lm"

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.step = 0

    def learn(self, records: Sequence[TraceRecord]) -> LearnReport:
        self.seen.append(records[0].trace_id)  # the new one stands first, replay behind it
        self.step += 1
        return LearnReport(1.0, 1.0, 1)

    def judge(self, records: Sequence[TraceRecord], weights: Mapping[str, Tensor] | None = None) -> float:
        return 1.0

    def weights(self) -> dict[str, Tensor]:
        return {"depth": torch.tensor([float(self.step)])}

    def export(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(os.urandom(20_000))

    def reset(self, folder: Path, *, rate: float) -> None:
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {"seen": list(self.seen), "step": self.step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.seen, self.step = list(state["seen"]), int(state["step"])


def write_shards(root: Path) -> None:
    spool = Spool(root / "spool")
    with (root / "acknowledged").open("a") as log:
        while True:
            number = f"{time.time_ns():032x}"
            shard = spool.put([record(number, has_features=True)])
            log.write(f"{shard} {number}\n")
            log.flush()
            time.sleep(0.004)


def daemon_at(root: Path) -> tuple[TrainDaemon, CountingLearner]:
    learner = CountingLearner()
    options = DaemonOptions(tokens_per_step=1, publish_steps=1, checkpoint_s=0.0)
    daemon = TrainDaemon(
        Spool(root / "spool"), Registry(root / "registry"), learner, target=TARGET, work=root / "work", options=options
    )
    return daemon, learner


def train(root: Path) -> None:
    daemon, _ = daemon_at(root)
    while True:
        daemon.step()


def publish(root: Path) -> None:
    registry = Registry(root / "registry")
    while True:
        done = registry.publish(CountingLearner().export, Manifest(version=0, parent=0, kind="lm", target=TARGET))
        registry.promote(done.version, "newest")
        registry.prune()


def run_until_killed(root: Path, seconds: float, jobs: Sequence[Callable[[Path], None]]) -> None:
    children = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            try:
                job(root)
            except BaseException as error:  # noqa: BLE001  -- a child must not run the parent's code
                sys.stderr.write(f"{job.__name__}: {type(error).__name__}: {error}\n")
                os._exit(3)
        children.append(child)
    time.sleep(seconds)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        status = os.waitpid(child, 0)[1]
        require(os.WIFSIGNALED(status), "a worker ended by itself, see above")


def require(ok: bool, rule: str) -> None:
    if not ok:
        sys.stdout.write(f"broken: {rule}\n")
        sys.exit(1)


def check(root: Path) -> None:
    """What must hold while everybody is dead."""
    spool = Spool(root / "spool")
    places = {path.name: path for path in spool._all()}
    for path in places.values():
        read_shard(path)
    acknowledged = dict(line.split() for line in (root / "acknowledged").read_text().splitlines() if line.count(" "))
    require(acknowledged.keys() <= places.keys(), "a shard that was acknowledged is lost")
    registry = Registry(root / "registry")
    for version in registry.numbers():
        registry.check(version)
    current = registry.state().current
    require(not current or current in registry.numbers(), "the current version is not there")
    checkpoint = root / "work" / "checkpoint.pt"
    if not checkpoint.exists():
        return
    state = torch.load(checkpoint, weights_only=True)
    times = Counter(state["learner"]["seen"])
    require(max(times.values()) == 1, "a shard is in the weights twice")
    ledger = Ledger(root / "work" / "ledger.db")
    for name, path in places.items():
        is_in = read_shard(path)[0].trace_id in times
        require(is_in or not ledger.has(name), "the ledger names a shard that the weights lack")
        require(path.parent.name != "done" or ledger.has(name), "a shard is done with and not in the ledger")
        held_out = int(read_shard(path)[0].prompt_hash[:8], 16) % 10 == 0
        require(is_in or held_out or path.parent.name != "done", "a shard is done with and not in the weights")
    ledger.close()


def finish(root: Path) -> dict[str, int]:
    """Start once more, learn all that is left, and count."""
    daemon, learner = daemon_at(root)
    while daemon.step():
        pass
    daemon.close()
    check(root)
    ready = Spool(root / "spool").stats()
    require(ready.num_ready == ready.num_leased == 0, "a shard was left over")
    total = len((root / "acknowledged").read_text().splitlines())
    require(len(set(learner.seen)) == len(learner.seen) >= total - 1, "a shard was not learned from")
    return {"shards": len(learner.seen), "versions": max(Registry(root / "registry").numbers())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "acknowledged").touch()
        for _ in range(args.rounds):
            run_until_killed(root, rng.uniform(0.005, 0.12), (write_shards, train, publish))
            check(root)
        sys.stdout.write(json.dumps({"rounds": args.rounds, **finish(root)}) + "\n")


if __name__ == "__main__":
    main()
