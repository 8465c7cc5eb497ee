"""Traces over Redis Streams, for servers and a trainer on several hosts (`TraceTransport`).

An entry is a shard: token columns as Arrow IPC, who is in it, and when. Tensors do not travel this way: a stream is
held in memory, and states are a thousand times the size of their tokens; records lose theirs here, and that is counted.
Workers form one consumer group; what a silent one holds is claimed by another when its lease runs out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from specdec.errors import ConfigError, LoadError, UnsupportedError
from specdec.online_training.records import TraceRecord, read_meta, write_meta
from specdec.online_training.spool import SpoolLimits
from specdec.online_training.transport import Lease, TransportStats

__all__ = ["RedisTransport"]

_GROUP = "traind"


class RedisTransport:
    """One stream.

    Args:
        client: a ``redis.Redis`` that returns bytes.
        stream: its name.
        limits: as for a spool; ``max_bytes`` is kept by deleting the oldest entries.

    Raises:
        LoadError: the server cannot be reached.
    """

    def __init__(self, client: Any, stream: str, limits: SpoolLimits | None = None) -> None:
        import redis

        self._errors = redis.RedisError
        self._client, self._stream, self.limits = client, stream, limits or SpoolLimits()
        self._num_deleted = self.num_stripped = 0
        try:
            client.xgroup_create(stream, _GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise LoadError(f"cannot use the stream {stream}: {error}") from error
        except redis.RedisError as error:
            raise LoadError(f"cannot reach redis for the stream {stream}: {error}") from error

    @classmethod
    def of_url(cls, url: str, limits: SpoolLimits | None = None) -> RedisTransport:
        """The stream of ``redis://HOST[:PORT]/STREAM``.

        Raises:
            ConfigError: the URL names no stream.
            UnsupportedError: the redis client is not installed.
            LoadError: as the constructor.
        """
        try:
            import redis
        except ImportError as error:
            raise UnsupportedError("redis:// needs the extra `redis` (pip install 'specdec-toolkit[redis]')") from error
        parts = urlsplit(url)
        stream = parts.path.strip("/")
        if not parts.hostname or not stream or "/" in stream:
            raise ConfigError(f"a stream is written redis://HOST[:PORT]/STREAM, got {url!r}")
        client = redis.Redis(
            host=parts.hostname, port=parts.port or 6379, username=parts.username, password=parts.password,
            ssl=parts.scheme == "rediss", socket_timeout=30,
        )  # fmt: skip
        return cls(client, stream, limits)

    def put(self, records: Sequence[TraceRecord]) -> str:
        """Append one entry and enforce the limits.

        Raises:
            OSError: redis refuses; nothing was appended.
        """
        self.num_stripped += sum(record.features is not None for record in records)
        data = write_meta([replace(record, features=None) for record in records])
        tenants = json.dumps(sorted({record.tenant for record in records}))
        name: bytes = self._do(self._client.xadd, self._stream, {"data": data, "tenants": tenants})
        self._enforce()
        return name.decode()

    def lease(self, worker: str) -> Lease | None:
        idle = round(self.limits.lease_s * 1e3)
        claimed = self._do(self._client.xautoclaim, self._stream, _GROUP, worker, min_idle_time=idle, count=1)[1]
        if not claimed:
            read = self._do(self._client.xreadgroup, _GROUP, worker, {self._stream: ">"}, count=1)
            claimed = read[0][1] if read else []
        for name, fields in claimed:
            if not fields:  # deleted while somebody held it
                self.ack(worker, name.decode())
                continue
            return Lease(name.decode(), read_meta(fields[b"data"]))
        return None

    def ack(self, worker: str, shard_id: str) -> None:
        self._do(self._client.xack, self._stream, _GROUP, shard_id)
        self._do(self._client.xdel, self._stream, shard_id)

    def release(self, worker: str, shard_id: str) -> None:
        """Back to the stream's end, since a group reads every entry once; the trace keeps its own time."""
        found = self._do(self._client.xrange, self._stream, min=shard_id, max=shard_id)
        if found:
            pipe = self._client.pipeline(transaction=True)
            pipe.xadd(self._stream, found[0][1])
            pipe.xack(self._stream, _GROUP, shard_id)
            pipe.xdel(self._stream, shard_id)
            self._do(pipe.execute)

    def held(self, worker: str) -> list[str]:
        pending = self._do(
            self._client.xpending_range, self._stream, _GROUP, min="-", max="+", count=10_000, consumername=worker
        )
        return [one["message_id"].decode() for one in pending]

    def keep_alive(self, worker: str) -> None:
        names = self.held(worker)
        if names:
            self._do(self._client.xclaim, self._stream, _GROUP, worker, 0, names, justid=True)

    def kept(self, shard_ids: Sequence[str]) -> set[str]:
        """Entries that were acknowledged are deleted here: a trainer replays what it remembers itself."""
        return set(shard_ids)

    def forget(self, tenant: str) -> list[str]:
        gone = []
        for name, fields in self._do(self._client.xrange, self._stream):
            if tenant in json.loads(fields[b"tenants"]):
                self.ack("", name.decode())
                gone.append(name.decode())
        return gone

    def stats(self) -> TransportStats:
        length = int(self._do(self._client.xlen, self._stream))
        leased = int(self._do(self._client.xpending, self._stream, _GROUP)["pending"])
        nbytes = int(self._do(self._client.memory_usage, self._stream) or 0)
        return TransportStats(max(0, length - leased), leased, nbytes, self._num_deleted)

    def _enforce(self) -> None:
        before = int(self._do(self._client.xlen, self._stream))
        oldest = round((time.time() - self.limits.ttl_s) * 1e3)
        self._do(self._client.xtrim, self._stream, minid=oldest, approximate=False)
        nbytes = int(self._do(self._client.memory_usage, self._stream) or 0)
        length = int(self._do(self._client.xlen, self._stream))
        if nbytes > self.limits.max_bytes:
            fitting = int(length * self.limits.max_bytes / nbytes)
            self._do(self._client.xtrim, self._stream, maxlen=fitting, approximate=False)
        self._num_deleted += before - int(self._do(self._client.xlen, self._stream))

    def _do(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return call(*args, **options)
        except self._errors as error:
            raise OSError(f"redis: {error}") from error
