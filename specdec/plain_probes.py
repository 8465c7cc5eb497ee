"""When a step should be plain only to learn what plain steps take: the baseline that drafting is held against.

Where drafting pays, no step is plain any more, and what a plain step would take is known only from the start of the
engine or from the steps of another batch size. So some steps are plain on purpose: the seventh one of a batch size and
context that none was seen for, then at twice the distance each time. Steps that draft nothing anyway count as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

__all__ = ["PlainProbes"]

_FIRST_WAIT, _MAX_WAIT = 6, 256  # steps: less than 1 % of them in the long run, of which only the lost gain is paid
_LEAST_SHARE = 0.06  # of a new plain step once many were seen, as the cost tables have it


@dataclass(slots=True)
class _Bucket:
    waited: int = 0  # steps with drafts since the last plain one
    wait: int = _FIRST_WAIT
    num_seen: int = 0


class PlainProbes:
    """Counts steps by batch size and context, both to the nearest power of two.

    Args:
        max_wait: most steps between two probes.
        least_share: of a probe's time in what is known, once many were seen.
    """

    def __init__(self, *, max_wait: int = _MAX_WAIT, least_share: float = _LEAST_SHARE) -> None:
        self._max_wait, self._least_share = max_wait, least_share
        self._buckets: dict[tuple[int, int], _Bucket] = {}

    def _bucket(self, num_requests: int, context: float) -> _Bucket:
        key = round(log2(max(num_requests, 1))), round(log2(max(context, 128.0)))
        return self._buckets.setdefault(key, _Bucket())

    def is_due(self, num_requests: int, context: float) -> bool:
        """Asked before each step that may draft; True: this one should not."""
        bucket = self._bucket(num_requests, context)
        bucket.waited += 1
        return bucket.waited > bucket.wait

    def seen(self, num_requests: int, context: float) -> float:
        """A plain step was made; how much of its time is believed: half of the first one, a third of the second."""
        bucket = self._bucket(num_requests, context)
        bucket.num_seen += 1
        if bucket.waited > bucket.wait:
            bucket.wait = min(2 * bucket.wait, self._max_wait)
        bucket.waited = 0
        return max(self._least_share, 1 / (bucket.num_seen + 1))
