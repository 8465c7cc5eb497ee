"""Traces over Redis Streams, against a real server that the test starts."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from specdec.errors import ConfigError, LoadError
from specdec.online_training.redis_transport import RedisTransport
from specdec.online_training.spool import SpoolLimits
from specdec.online_training.transports import open_transport
from tests.online_training.traces import HASHES, record

SERVER = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(SERVER is None, reason="redis-server is not installed (Debian: redis-server)")


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    folder: Path = tmp_path_factory.mktemp("redis")
    command = [SERVER or "", "--port", str(number), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", number), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        yield number
    finally:
        process.terminate()
        process.wait(10)


def stream(port: int, name: str, **limits: float) -> RedisTransport:
    return RedisTransport.of_url(f"redis://127.0.0.1:{port}/{name}", SpoolLimits(**limits))  # type: ignore[arg-type]


@needs_redis
def test_records_are_leased_by_one_worker_and_acknowledged(port: int) -> None:
    sender, reader = stream(port, "a"), stream(port, "a")
    names = [sender.put([record(letter * 32, has_features=True)]) for letter in "abc"]
    first, second = reader.lease("w"), reader.lease("v")
    assert first is not None
    assert second is not None
    assert [first.shard_id, second.shard_id] == names[:2]
    assert first.records[0].token_ids.tolist() == record().token_ids.tolist()
    assert first.records[0].features is None  # tensors do not travel this way
    assert sender.num_stripped == 3
    assert reader.held("w") == [names[0]]
    reader.ack("w", names[0])
    reader.release("v", names[1])
    rest = [reader.lease("w"), reader.lease("w")]
    assert [lease.records[0].trace_id[0] for lease in rest if lease] == ["c", "b"]
    assert reader.lease("w") is None
    assert reader.stats().num_leased == 2


@needs_redis
def test_what_a_silent_worker_holds_is_claimed(port: int) -> None:
    transport = stream(port, "b", lease_s=0.2)
    name = transport.put([record()])
    assert transport.lease("dead") is not None
    assert transport.lease("other") is None
    time.sleep(0.12)
    transport.keep_alive("dead")
    time.sleep(0.12)
    assert transport.lease("other") is None
    time.sleep(0.25)
    claimed = transport.lease("other")
    assert claimed is not None
    assert claimed.shard_id == name
    assert transport.held("dead") == []


@needs_redis
def test_a_tenant_is_forgotten_and_old_entries_go(port: int) -> None:
    transport = stream(port, "c", ttl_s=0.3)
    transport.put([record(tenant="x")])
    kept = transport.put([record(tenant="y")])
    assert len(transport.forget(HASHES.text("x"))) == 1
    lease = transport.lease("w")
    assert lease is not None
    assert lease.shard_id == kept
    time.sleep(0.4)
    transport.put([record(tenant="y")])
    assert transport.stats().num_deleted == 1


@needs_redis
def test_the_stream_stays_within_its_bytes(port: int) -> None:
    transport = stream(port, "d", max_bytes=40_000)
    for _ in range(40):
        transport.put([record()])
    assert transport.stats().nbytes <= 40_000 * 1.2
    assert transport.stats().num_deleted > 0


def test_wrong_places_are_named() -> None:
    with pytest.raises(ConfigError, match="redis://HOST"):
        open_transport("redis://host")
    with pytest.raises(LoadError, match="cannot reach redis"):
        open_transport("redis://127.0.0.1:1/stream")
