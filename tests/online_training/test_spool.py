"""Shards on disk: whole or not there, leased by one, within their limits, private."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from specdec.errors import ConfigError, LoadError
from specdec.online_training.ledger import Ledger
from specdec.online_training.records import read_meta, write_meta
from specdec.online_training.spool import Spool, SpoolLimits, read_shard
from tests.online_training.traces import HASHES, record


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def spool_at(path: Path, clock: Clock | None = None, **limits: float) -> Spool:
    return Spool(path / "spool", SpoolLimits(**limits), clock=clock or Clock())  # type: ignore[arg-type]


def put(spool: Spool, clock: Clock, count: int = 1) -> list[str]:
    names = []
    for _ in range(count):
        clock.now += 1
        names.append(spool.put([record()]))
    return names


def test_what_was_put_is_leased_unchanged(tmp_path: Path) -> None:
    spool = spool_at(tmp_path)
    first, second = record("a" * 32, has_features=True), record("b" * 32)
    name = spool.put([first, second])
    lease = spool.lease("w")
    assert lease is not None
    assert lease.shard_id == name
    for got, wanted in zip(lease.records, (first, second), strict=True):
        assert got.token_ids.tolist() == wanted.token_ids.tolist()
        assert got.sampling == wanted.sampling
        assert (got.tenant, got.target, got.drafter) == (wanted.tenant, wanted.target, wanted.drafter)
        for column in ("positions", "versions", "num_accepted", "draft_ids", "draft_parents", "target_us"):
            assert getattr(got.rounds, column).tolist() == getattr(wanted.rounds, column).tolist()
    features = lease.records[0].features
    assert features is not None
    assert (features.start, features.layers) == (1, (0, 2))
    assert torch.equal(features.tensors["aux_hidden"], torch.arange(6, dtype=torch.bfloat16).reshape(3, 2))
    assert lease.records[1].features is None
    assert first.rounds.first_rejected.tolist() == [3]  # the second round's draft was right to its end


def test_a_shard_is_leased_by_one_worker_and_oldest_first(tmp_path: Path) -> None:
    clock = Clock()
    spool = spool_at(tmp_path, clock)
    names = put(spool, clock, 2)
    leases = [spool.lease("a"), spool.lease("b"), spool.lease("c")]
    assert [lease and lease.shard_id for lease in leases] == [*names, None]
    spool.release("a", names[0])
    spool.ack("b", names[1])
    again = spool.lease("c")
    assert again is not None
    assert again.shard_id == names[0]
    assert spool.lease("c") is None
    assert [folder.name for folder in spool.done()] == [names[1]]


def test_a_silent_workers_shard_is_free_again(tmp_path: Path) -> None:
    clock = Clock()
    spool = spool_at(tmp_path, clock, lease_s=100.0)
    put(spool, clock)
    assert spool.lease("dead") is not None
    clock.now += 60
    spool.keep_alive("dead")
    clock.now += 60
    assert spool.lease("other") is None
    clock.now += 60
    assert spool.lease("other") is not None
    assert spool.held("dead") == []


def test_the_oldest_unleased_shards_go_when_there_is_too_much(tmp_path: Path) -> None:
    clock = Clock()
    probe = spool_at(tmp_path / "probe", clock)
    put(probe, clock)
    size = probe.stats().nbytes
    spool = spool_at(tmp_path, clock, max_bytes=int(3.5 * size))
    names = put(spool, clock, 3)
    lease = spool.lease("w")
    assert lease is not None
    assert lease.shard_id == names[0]
    names += put(spool, clock, 2)
    left = {folder.name for folder in (tmp_path / "spool" / "ready").iterdir()}
    assert left == {names[3], names[4]}  # the leased one stays, of the others the oldest went
    assert spool.stats().num_deleted == 2
    assert spool.stats().nbytes <= 3.5 * size


def test_old_shards_are_deleted(tmp_path: Path) -> None:
    clock = Clock()
    spool = spool_at(tmp_path, clock, ttl_s=50.0)
    put(spool, clock)
    clock.now += 60
    put(spool, clock)
    assert spool.stats().num_ready == 1


def test_forgetting_a_tenant_deletes_its_shards_wherever_they_are(tmp_path: Path) -> None:
    clock = Clock()
    spool = spool_at(tmp_path, clock)
    names = []
    for tenant in ("x", "y", "x", "x"):
        clock.now += 1
        names.append(spool.put([record(tenant=tenant)]))
    assert spool.lease("w") is not None
    done = [spool.lease("v"), spool.lease("v")]
    assert all(done)
    spool.ack("v", names[2])
    assert sorted(spool.forget(HASHES.text("x"))) == sorted([names[0], names[2], names[3]])
    files = [str(path) for path in (tmp_path / "spool").rglob("shard-*") if path.is_dir()]
    assert len(files) == 1
    assert names[1] in files[0]
    assert spool.forget(HASHES.text("nobody")) == []


@pytest.mark.parametrize("file", ["meta.arrow", "manifest.json"])
def test_a_damaged_shard_is_refused_and_skipped(tmp_path: Path, file: str) -> None:
    clock = Clock()
    spool = spool_at(tmp_path, clock)
    names = put(spool, clock, 2)
    damaged = tmp_path / "spool" / "ready" / names[0] / file
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 0x10
    damaged.write_bytes(data[: len(data) - (file == "manifest.json")])
    with pytest.raises(LoadError):
        read_shard(damaged.parent)
    lease = spool.lease("w")
    assert lease is not None
    assert lease.shard_id == names[1]
    assert spool.lease("w") is None


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        spool = spool_at(tmp_path)
        spool.put([record(has_features=True)])
        Ledger(tmp_path / "spool" / "ledger.db").close()
    finally:
        os.umask(old)
    for path in [tmp_path / "spool", *(tmp_path / "spool").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_full_disk_leaves_nothing_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = spool_at(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("specdec.online_training.spool.write_private", full)
    with pytest.raises(OSError, match="No space"):
        spool.put([record()])
    assert spool.stats().nbytes == 0
    assert list((tmp_path / "spool" / "tmp").iterdir()) == []


def test_records_of_another_schema_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.online_training.records.SCHEMA_VERSION", 2)
    data = write_meta([record()])
    monkeypatch.undo()
    with pytest.raises(LoadError, match="must have schema version 1, got 2"):
        read_meta(data)
    with pytest.raises(LoadError, match="cannot read trace records"):
        read_meta(b"no arrow")


def test_limits_name_the_rule() -> None:
    with pytest.raises(ConfigError, match="ttl_s must be > 0, got 0"):
        SpoolLimits(ttl_s=0)


@pytest.mark.parametrize("name", ["", "../x", ".hidden"])
def test_a_worker_is_a_plain_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="plain file name"):
        spool_at(tmp_path).lease(name)


def test_the_ledger_counts_a_shard_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.record(1, [("a", 2, 30), ("b", 1, 10)])
    ledger.record(2, [("b", 1, 10), ("c", 1, 5)])
    ledger.close()
    ledger = Ledger(tmp_path / "ledger.db")
    assert ledger.totals() == (3, 4, 45)
    assert ledger.has("c")
    assert not ledger.has("d")
    ledger.close()
