"""Answers of greedy requests, given again to the same tenant for the very same request.

Right for greedy decoding on one state of the model only: what is given again is one run that took place. So it is off
unless asked for, lives for a short time, and needs temperature 0 said by the request itself.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from specdec.errors import ConfigError
from specdec.server.sidecar.requests import Asked

__all__ = ["CachedAnswer", "ExactCache"]


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """An answer as the upstream gave it."""

    content_type: str
    body: bytes


class ExactCache:
    """Whole answers by (tenant, route, bytes of the request).

    Args:
        ttl_s: seconds that an answer is given again.
        max_bytes: of all answers; the oldest go first.
        clock: seconds.

    Raises:
        ConfigError: a bound that is not above 0.
    """

    def __init__(self, ttl_s: float, max_bytes: int = 64 << 20, *, clock: Callable[[], float] = monotonic) -> None:
        if ttl_s <= 0 or max_bytes <= 0:
            raise ConfigError(f"ttl_s and max_bytes must be above 0, got {ttl_s} and {max_bytes}")
        self._ttl_s, self._max_bytes, self._clock = ttl_s, max_bytes, clock
        self._answers: OrderedDict[bytes, tuple[float, CachedAnswer]] = OrderedDict()
        self._num_bytes = 0

    @staticmethod
    def key(tenant: str, path: str, body: bytes, asked: Asked) -> bytes | None:
        """The key of a request; None if its answer may not be given again."""
        n = asked.body.get("n", 1)
        if not asked.is_greedy or n not in (1, None) or asked.body.get("store"):
            return None
        return hashlib.sha256(b"\0".join((tenant.encode(), path.encode(), body))).digest()

    def get(self, key: bytes) -> CachedAnswer | None:
        """The answer, if there is one that is young enough."""
        found = self._answers.get(key)
        if found is None:
            return None
        if self._clock() - found[0] > self._ttl_s:
            self._drop(key)
            return None
        return found[1]

    def put(self, key: bytes, answer: CachedAnswer, *, is_stream: bool) -> None:
        """Keep an answer; one that is not complete is not kept."""
        is_whole = answer.body.rstrip().endswith(b"data: [DONE]") if is_stream else bool(answer.body)
        if not is_whole or len(answer.body) > self._max_bytes:
            return
        if key in self._answers:
            self._drop(key)
        self._answers[key] = (self._clock(), answer)
        self._num_bytes += len(answer.body)
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._answers)))

    def _drop(self, key: bytes) -> None:
        self._num_bytes -= len(self._answers.pop(key)[1].body)
