"""The training daemon: leases shards, learns, and publishes what is better. It serves nothing and decides no swap.

What happens to a shard, so that dying at any point neither loses it nor counts it twice:

    lease -> learn -> checkpoint (weights, optimizer, ids of the shards in them) -> ledger -> acknowledge

A checkpoint is one file, replaced. On restart the ledger is completed from it; shards that are still held are
acknowledged if the ledger has them and given back if not.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.errors import ConfigError, LoadError
from specdec.online_training.gate import TrainGate
from specdec.online_training.learner import Learner
from specdec.online_training.ledger import Ledger
from specdec.online_training.records import TraceRecord
from specdec.online_training.registry import Manifest, Registry
from specdec.online_training.replay_pool import ReplayMix, ReplayPool
from specdec.online_training.transport import Lease, TraceTransport

logger = logging.getLogger(__name__)

__all__ = ["DaemonOptions", "DaemonStatus", "TrainDaemon"]

_UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError)
_CHECKPOINT, _LEDGER = "checkpoint.pt", "ledger.db"


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """When the daemon does what.

    Args:
        tokens_per_step: of a training step, replay included.
        publish_steps: steps between publications.
        checkpoint_s: seconds between checkpoints, and thereby until a shard is acknowledged.
        min_gain: a version is published if its simulated acceptance length on held-out requests is at least that of
            the last published one times (1 - this).
        keep_versions: how many old versions are kept.
        worker: name under which shards are leased.
        mix: where a step's text comes from.
        rehearses: while no shard waits, learn on from what is remembered; for traffic that is scarcer than time.
        seed: of all draws.
    """

    tokens_per_step: int = 4096
    publish_steps: int = 50
    checkpoint_s: float = 60.0
    min_gain: float = 0.01
    keep_versions: int = 5
    worker: str = "traind"
    mix: ReplayMix = field(default_factory=ReplayMix)
    rehearses: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens_per_step < 1 or self.publish_steps < 1 or self.keep_versions < 1 or not self.checkpoint_s >= 0:
            raise ConfigError("tokens_per_step, publish_steps and keep_versions must be >= 1, checkpoint_s >= 0")


@dataclass(slots=True)
class DaemonStatus:
    """What a daemon has done since it began."""

    num_shards: int = 0
    num_skipped: int = 0
    num_steps: int = 0
    num_published: int = 0
    num_withheld: int = 0
    loss: float = float("nan")
    acceptance_length: float = float("nan")


class TrainDaemon:
    """Learns from one transport and publishes to one registry.

    Args:
        transport: brings traces.
        registry: takes versions.
        learner: its weights.
        target: fingerprint of the target; records of another are passed over.
        work: a directory for checkpoint and ledger.
        options: see ``DaemonOptions``.
        gate: decides whether learning still pays; None: always.
        report: called after every step and publication.
        duty: share of the time that it works, where it has to share a device with a server.

    Raises:
        LoadError: the checkpoint cannot be read.
    """

    def __init__(
        self,
        transport: TraceTransport,
        registry: Registry,
        learner: Learner,
        *,
        target: str,
        work: Path,
        options: DaemonOptions | None = None,
        gate: TrainGate | None = None,
        report: Callable[[DaemonStatus], None] = lambda _: None,
        duty: float = 1.0,
    ) -> None:
        self._transport, self._registry, self._learner = transport, registry, learner
        self._target, self._work, self.options = target, work, options or DaemonOptions()
        self._gate, self._report, self._duty = gate, report, duty
        self.status = DaemonStatus()
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.ledger = Ledger(work / _LEDGER)
        self.pool = ReplayPool(self.options.mix, seed=self.options.seed)
        self._learned: list[tuple[str, int, int]] = []  # in the weights, not yet in a checkpoint
        self._window: list[str] = []  # shards since the last publication
        self._tenants: set[str] = set()
        self._published: dict[str, Tensor] | None = None  # weights of the last publication
        self._parent = 0
        self._own: set[int] = set()  # versions published here
        self._next_publication = self.options.publish_steps
        self._saved, self._saved_step = time.monotonic(), self._learner.step
        self._recover()

    def run(self, stop: threading.Event, *, idle_s: float = 0.5) -> None:
        """Learn until told to stop; then save."""
        while not stop.is_set():
            if not self.step():
                stop.wait(idle_s)
        self.close()

    def close(self) -> None:
        """Save what was learned, give back what was not."""
        self.save()
        for shard_id in self._transport.held(self.options.worker):
            self._transport.release(self.options.worker, shard_id)
        self.ledger.close()

    def step(self) -> bool:
        """Learn from one shard, or rehearse; False if there was neither a shard nor anything to rehearse."""
        self._follow_registry()
        lease = self._transport.lease(self.options.worker)
        if lease is not None:
            if self.ledger.has(lease.shard_id):  # its lease had run out before it was acknowledged
                self._transport.ack(self.options.worker, lease.shard_id)
                return True
            self._take(lease)
        has_worked = lease is not None or self._rehearse()
        if has_worked and time.monotonic() - self._saved >= self.options.checkpoint_s:
            self.save()
        if self._learner.step >= self._next_publication:
            self.publish()
        return has_worked

    def _rehearse(self) -> bool:
        """One step on remembered requests alone, where that is wanted and still pays."""
        share = self.options.mix.new
        if not self.options.rehearses or share == 1 or (self._gate is not None and not self._gate.is_open):
            return False
        old = self.pool.draw(self._learner.step, round(self.options.tokens_per_step * share / (1 - share)))
        if old:
            self._work_on(old)
        return bool(old)

    def _take(self, lease: Lease) -> None:
        records = [record for record in lease.records if record.target == self._target and len(record.token_ids) > 3]
        if self._gate is not None:
            self._gate.observe(records)
        taught = self.pool.split(lease.shard_id, records)
        if self._gate is not None and not self._gate.is_open:
            self.status.num_skipped += 1
        else:
            for batch in _batches(taught, round(self.options.tokens_per_step * self.options.mix.new)):
                old = self.pool.draw(self._learner.step, sum(len(record.token_ids) for record in batch))
                self._work_on([*batch, *old])
        self.pool.add(lease.shard_id, taught)
        self._learned.append((lease.shard_id, len(records), sum(len(record.token_ids) for record in records)))
        self._window.append(lease.shard_id)
        self._tenants.update(record.tenant for record in records)
        self.status.num_shards += 1
        self.pool.keep_only(self._transport.kept(sorted(self.pool.shard_ids)))  # what was deleted is forgotten here too

    def _work_on(self, records: Sequence[TraceRecord]) -> None:
        """One step, and then as much rest as ``duty`` asks for."""
        started = time.monotonic()
        report = self._learner.learn(records)
        self.status.num_steps += 1
        self.status.loss = report.loss
        self._transport.keep_alive(self.options.worker)
        self._report(self.status)
        time.sleep((time.monotonic() - started) * (1 / self._duty - 1))

    def save(self) -> None:
        """Checkpoint, ledger, acknowledgement: in this order."""
        if self._learned or self._learner.step > self._saved_step:
            state = {
                "learner": self._learner.state(),
                "shards": [list(one) for one in self._learned],
                "window": self._window,
                "tenants": sorted(self._tenants),
                "published": self._published,
                "parent": self._parent,
                "own": sorted(self._own),
                "next_publication": self._next_publication,
            }
            _replace(self._work / _CHECKPOINT, state)
            self._enter(self._learned)
            self._learned, self._saved_step = [], self._learner.step
        self._saved = time.monotonic()

    def _enter(self, shards: Sequence[tuple[str, int, int]]) -> None:
        self.ledger.record(self._learner.step, shards)
        for shard_id, _, _ in shards:
            self._transport.ack(self.options.worker, shard_id)

    def _recover(self) -> None:
        file = self._work / _CHECKPOINT
        if file.exists():
            state = _read(file)
            self._learner.load_state(state["learner"])
            self._window, self._tenants = list(state["window"]), set(state["tenants"])
            self._published, self._parent = state["published"], int(state["parent"])
            self._own, self._next_publication = set(state["own"]), int(state["next_publication"])
            self._saved_step = self._learner.step
            self._enter([(name, int(records), int(tokens)) for name, records, tokens in state["shards"]])
        for shard_id in self._transport.held(self.options.worker):
            if self.ledger.has(shard_id):
                self._transport.ack(self.options.worker, shard_id)
            else:
                self._transport.release(self.options.worker, shard_id)

    def publish(self) -> int | None:
        """Publish the weights if held-out requests do not speak against them; the version, or None."""
        self._next_publication = self._learner.step + self.options.publish_steps
        heldout = self.pool.heldout
        length = self._learner.judge(heldout) if heldout else float("nan")
        self.status.acceptance_length = length
        if heldout and self._published is not None:
            before = self._learner.judge(heldout, self._published)
            if self._gate is not None:
                self._gate.judged(length, before)
            if not length >= before * (1 - self.options.min_gain):
                self.status.num_withheld += 1
                logger.info("withheld: %.3f tokens per round on held-out requests, %.3f before", length, before)
                self._report(self.status)
                return None
        manifest = Manifest(
            version=0, parent=self._parent, kind=self._learner.kind, target=self._target, step=self._learner.step,
            window=tuple(self._window), tenants=tuple(sorted(self._tenants)),
            acceptance_length=length if length == length else None,
        )  # fmt: skip
        done = self._registry.publish(self._learner.export, manifest)
        self._own.add(done.version)
        self._parent, self._published = done.version, self._learner.weights()
        self._window, self._tenants = [], set()
        self._registry.prune(self.options.keep_versions)
        self.status.num_published += 1
        self._report(self.status)
        return done.version

    def _follow_registry(self) -> None:
        """If a version of ours went wrong: begin again from the one that serves, slower, without what taught it."""
        state = self._registry.state()
        marked = self._own & state.marks.keys()
        self._own -= marked
        bad = marked - state.undecided
        if not bad:
            return
        quarantined: set[str] = set()
        for version in bad:
            try:
                quarantined.update(self._registry.manifest(version).window)
            except LoadError:
                continue  # deleted already
        self.pool.keep_only(self.pool.shard_ids - quarantined)
        if state.current:
            self._learner.reset(self._registry.path(state.current), rate=0.5)
            self._parent, self._published = state.current, self._learner.weights()
        logger.warning("versions %s were refused: %d shards are quarantined", sorted(bad), len(quarantined))


def _batches(records: Sequence[TraceRecord], num_tokens: int) -> list[list[TraceRecord]]:
    """Requests in order, at least one and about ``num_tokens`` tokens at a time."""
    batches: list[list[TraceRecord]] = []
    size = num_tokens
    for record in records:
        if size >= num_tokens:
            batches.append([])
            size = 0
        batches[-1].append(record)
        size += len(record.token_ids)
    return batches


def _replace(file: Path, state: Mapping[str, Any]) -> None:
    draft = file.with_suffix(f".{os.getpid()}.tmp")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as stream:
        torch.save(dict(state), stream)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(file)


def _read(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise LoadError(f"cannot read the checkpoint {file}: {type(error).__name__}: {error}") from error
    return state
