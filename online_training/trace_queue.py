"""The bounded queue between serving and the spool. Nothing that serves ever waits for it.

As it fills, quality gives way before quantity, and quantity before time: from half full on requests lose their tensors,
from three quarters on requests are sampled (their probability of being kept goes with them), and a full queue takes
nothing. All of it is counted.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from specdec.errors import ConfigError

__all__ = ["QueueLimits", "Queueable", "TraceQueue"]

_DROP_FEATURES, _SAMPLE = 0.5, 0.75  # shares of the queue; the stretch between is what tensors are given up for


class Queueable(Protocol):
    """What a queue needs to know of a request."""

    trace_id: str
    inclusion: float

    @property
    def nbytes(self) -> int:
        """About how much memory it holds."""

    @property
    def has_features(self) -> bool:
        """True if it holds tensors."""

    def drop_features(self) -> None:
        """Let go of its tensors."""


_T = TypeVar("_T", bound=Queueable)


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Most that waits.

    Args:
        max_records: requests.
        max_bytes: of all of them, tensors included.
    """

    max_records: int = 256
    max_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        if self.max_records < 1 or self.max_bytes < 1:
            raise ConfigError(f"max_records and max_bytes must be >= 1, got {self.max_records} and {self.max_bytes}")


class TraceQueue(Generic[_T]):
    """Finished requests on their way to disk. ``offer`` holds a lock for microseconds and never waits for a taker."""

    def __init__(self, limits: QueueLimits | None = None) -> None:
        self._limits = limits or QueueLimits()
        self._items: deque[tuple[_T, int]] = deque()
        self._nbytes = 0
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()  # what became of requests, by name

    def __len__(self) -> int:
        return len(self._items)

    @property
    def fill(self) -> float:
        """How full it is, 0 to 1."""
        return max(len(self._items) / self._limits.max_records, self._nbytes / self._limits.max_bytes)

    def offer(self, item: _T) -> bool:
        """Queue a request as far as there is room; False if it was dropped."""
        with self._lock:
            if item.has_features and self._fill_with(item) > _DROP_FEATURES:
                item.drop_features()
                self.counts["features dropped"] += 1
            fill = self._fill_with(item)
            if fill > 1:
                self.counts["queue full"] += 1
                return False
            if fill > _SAMPLE:
                chance = (1 - fill) / (1 - _SAMPLE) * 0.9 + 0.1  # the last places are for one in ten
                if _uniform(item.trace_id) >= chance:
                    self.counts["sampled out"] += 1
                    return False
                item.inclusion *= chance
            self._items.append((item, item.nbytes))
            self._nbytes += item.nbytes
            self.counts["queued"] += 1
            return True

    def take(self, max_bytes: int) -> list[_T]:
        """The oldest requests, one at least where there is one, up to ``max_bytes``."""
        taken: list[_T] = []
        with self._lock:
            size = 0
            while self._items and (not taken or size + self._items[0][1] <= max_bytes):
                item, nbytes = self._items.popleft()
                size += nbytes
                taken.append(item)
            self._nbytes -= size
        return taken

    def _fill_with(self, item: _T) -> float:
        by_count = (len(self._items) + 1) / self._limits.max_records
        return max(by_count, (self._nbytes + item.nbytes) / self._limits.max_bytes)


def _uniform(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
