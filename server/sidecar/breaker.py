"""A circuit breaker: an upstream that fails again and again is left alone for a while."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Literal

__all__ = ["BreakerState", "CircuitBreaker"]

BreakerState = Literal["closed", "open", "half-open"]


class CircuitBreaker:
    """Counts failures in a row; open after too many, and half-open, for one request at a time, after a pause.

    Args:
        failures_to_open: in a row.
        cooldown_s: seconds that it stays open.
        clock: seconds.
    """

    def __init__(self, failures_to_open: int, cooldown_s: float, *, clock: Callable[[], float] = monotonic) -> None:
        self._limit, self._cooldown_s, self._clock = failures_to_open, cooldown_s, clock
        self._failures = 0
        self._opened_at = 0.0
        self._is_trying = False

    @property
    def state(self) -> BreakerState:
        """Where it stands now."""
        if self._failures < self._limit:
            return "closed"
        return "half-open" if self.wait_s <= 0 else "open"

    @property
    def wait_s(self) -> float:
        """Seconds until the next try, if it is open."""
        return self._opened_at + self._cooldown_s - self._clock()

    def admits(self) -> bool:
        """True if a request may go out now; it must be followed by ``succeeded``, ``failed`` or ``abandoned``."""
        state = self.state
        if state == "closed":
            return True
        if state == "open" or self._is_trying:
            return False
        self._is_trying = True
        return True

    def succeeded(self) -> None:
        """The upstream answered."""
        self._failures, self._is_trying = 0, False

    def failed(self) -> None:
        """It did not, or said that it cannot."""
        self._failures += 1
        self._is_trying = False
        if self._failures >= self._limit:
            self._opened_at = self._clock()

    def abandoned(self) -> None:
        """The request ended for a reason that says nothing about the upstream."""
        self._is_trying = False
