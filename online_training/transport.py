"""How traces get from servers to a trainer: the contract, and what a lease is.

A shard is leased by one worker at a time; a worker that dies gives its shards back when the lease runs out. What was
learned from is acknowledged once the weights that learned it are safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from specdec.online_training.records import TraceRecord

__all__ = ["Lease", "TraceTransport", "TransportStats"]


@dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """A shard that one worker may use until it acknowledges or releases it.

    Args:
        shard_id: names it; ids ascend with time.
        records: what is in it.
    """

    shard_id: str
    records: Sequence[TraceRecord]

    @property
    def num_tokens(self) -> int:
        """Tokens of all records."""
        return sum(len(record.token_ids) for record in self.records)


@dataclass(frozen=True, slots=True)
class TransportStats:
    """How full the transport is.

    Args:
        num_ready: shards that wait.
        num_leased: shards that a worker holds.
        nbytes: of all that is kept.
        num_deleted: shards that the limits removed before anybody leased them, since the start.
    """

    num_ready: int
    num_leased: int
    nbytes: int
    num_deleted: int = 0


@runtime_checkable
class TraceTransport(Protocol):
    """Carries records from a capture to a trainer."""

    def put(self, records: Sequence[TraceRecord]) -> str:
        """Hand over records as one shard, whole or not at all; its id. May block: never called by an engine."""

    def lease(self, worker: str) -> Lease | None:
        """The oldest shard that nobody holds, or None."""

    def ack(self, worker: str, shard_id: str) -> None:
        """A shard is done with: it is never leased again. One that is unknown is no error."""

    def release(self, worker: str, shard_id: str) -> None:
        """Give a shard back unused."""

    def held(self, worker: str) -> list[str]:
        """Ids of shards that a worker holds, such as after it died and began again."""

    def keep_alive(self, worker: str) -> None:
        """Say that a worker still uses what it holds."""

    def kept(self, shard_ids: Sequence[str]) -> set[str]:
        """Which of these shards still exist, leased, waiting or done with; what is gone must not be learned from."""

    def forget(self, tenant: str) -> list[str]:
        """Delete every shard with a record of this tenant (its keyed hash); their ids."""

    def stats(self) -> TransportStats:
        """How full it is."""
