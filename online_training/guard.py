"""When to trust new weights: trials, alarms, and telling bad weights from changed traffic. Numbers only, no files.

All figures are tokens per round (accepted + 1) of rounds that drafted. Trials compare means over *requests*: rounds of
one request are alike, and counting them as independent would promote by luck.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, pvariance
from typing import Literal, TypeAlias

from specdec.errors import ConfigError

__all__ = ["Alarm", "Cusum", "GuardOptions", "RollbackLimit", "Trial", "Verdict", "share_of", "tell_apart"]

Verdict: TypeAlias = Literal["promote", "reject", "undecided"]
Alarm: TypeAlias = Literal["drift", "bad weights"]


@dataclass(frozen=True, slots=True)
class GuardOptions:
    """How careful a swap is.

    Args:
        canary_share: of requests that a version on trial serves.
        min_requests: finished requests of the canary before anything is decided,
        max_requests: and at most: a trial that is still open then ends with a rejection.
        z: width of the confidence bound, in standard errors; 1.645: 95 % one-sided.
        tolerance: the canary may be worse by this share at most.
        cusum_slack: k, in standard deviations.
        cusum_limit: h, in standard deviations. A false alarm comes about every (e^(2kb) - 2kb - 1) / 2k^2 requests
            with b = h + 1.166 (Siegmund 1985): 19 000 with these values, 140 with the often named k = 0.25, h = 5.
        shadow_share: of requests for which the pinned baseline drafts too, unseen.
        min_seconds: between two swaps.
        max_rollbacks: within an hour; then nothing is swapped until that hour is over.
    """

    canary_share: float = 0.05
    min_requests: int = 200
    max_requests: int = 5000
    z: float = 1.645
    tolerance: float = 0.005
    cusum_slack: float = 0.5
    cusum_limit: float = 8.0
    shadow_share: float = 0.01
    min_seconds: float = 600.0
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        for name in ("canary_share", "shadow_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 2 <= self.min_requests <= self.max_requests:
            raise ConfigError(f"min_requests must be in 2..max_requests = {self.max_requests}, got {self.min_requests}")
        for name in ("z", "tolerance", "cusum_slack", "cusum_limit", "min_seconds", "max_rollbacks"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be >= 0, got {getattr(self, name)}")


def share_of(name: str, salt: str) -> float:
    """A number in [0, 1) for a request, the same wherever it is asked for with the same salt."""
    digest = hashlib.blake2b(f"{salt} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class Trial:
    """Compares the canary's requests with the others' of the same time (Welch's bounds over requests)."""

    def __init__(self, options: GuardOptions) -> None:
        self._options = options
        self._means: tuple[deque[float], deque[float]] = (
            deque(maxlen=options.max_requests), deque(maxlen=4 * options.max_requests),
        )  # fmt: skip

    def add(self, tokens_per_round: float, *, is_canary: bool) -> None:
        """A request has finished."""
        self._means[0 if is_canary else 1].append(tokens_per_round)

    @property
    def counts(self) -> tuple[int, int]:
        """Finished requests (of the canary, of the others)."""
        return len(self._means[0]), len(self._means[1])

    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound of (canary - others) / others."""
        new, old = self._means
        if len(new) < 2 or len(old) < 2:
            return -math.inf, math.inf
        error = math.sqrt(pvariance(new) / (len(new) - 1) + pvariance(old) / (len(old) - 1))
        difference, base = fmean(new) - fmean(old), fmean(old)
        return (difference - self._options.z * error) / base, (difference + self._options.z * error) / base

    def verdict(self) -> Verdict | None:
        """What the requests so far say; None: more are needed."""
        options, (num_new, num_old) = self._options, self.counts
        if min(num_new, num_old) < options.min_requests:
            return None
        lower, upper = self.bounds()
        if lower > -options.tolerance:
            return "promote"
        if upper < 0:
            return "reject"
        return "undecided" if num_new >= options.max_requests else None


class Cusum:
    """One-sided CUSUM of a fall in tokens per round below a reference (Page 1954, "Continuous inspection schemes").

    Args:
        mean: of the reference.
        deviation: standard deviation of one round, > 0.
        options: slack and limit.
    """

    def __init__(self, mean: float, deviation: float, options: GuardOptions) -> None:
        if not deviation > 0:
            raise ConfigError(f"deviation must be > 0, got {deviation}")
        self._mean, self._deviation = mean, deviation
        self._slack, self._limit = options.cusum_slack, options.cusum_limit
        self.sum = 0.0

    def add(self, tokens: float) -> bool:
        """Take in a round; True: alarm."""
        fall = (self._mean - tokens) / self._deviation - self._slack
        self.sum = max(0.0, self.sum + fall)
        return self.sum > self._limit


def tell_apart(*, reference: tuple[float, float], now: tuple[float, float], min_fall: float = 0.05) -> Alarm | None:
    """Why tokens per round fell, from what the pinned baseline did on the same requests.

    Args:
        reference: tokens per round of (current version, baseline) on shadowed requests before the alarm.
        now: the same since.
        min_fall: relative; what is less is no fall.

    Returns:
        ``drift`` if the baseline fell along by at least half as much, ``bad weights`` if the current version fell
        alone, None if it has not fallen on the shadowed requests.
    """
    fall, base_fall = (1 - after / before for after, before in zip(now, reference, strict=True))
    if fall < min_fall:
        return None
    return "drift" if base_fall >= fall / 2 else "bad weights"


class RollbackLimit:
    """Keeps swaps apart, and stops them where rollbacks pile up.

    Args:
        options: ``min_seconds`` and ``max_rollbacks``.
    """

    def __init__(self, options: GuardOptions) -> None:
        self._options = options
        self._last_swap = -math.inf
        self._rollbacks: deque[float] = deque(maxlen=max(1, options.max_rollbacks))

    def swapped(self, now: float, *, is_rollback: bool) -> None:
        """A version was put into service."""
        self._last_swap = now
        if is_rollback:
            self._rollbacks.append(now)

    def is_frozen(self, now: float) -> bool:
        """Too many rollbacks within the hour."""
        recent = [when for when in self._rollbacks if now - when < 3600.0]
        return len(recent) >= self._options.max_rollbacks

    def may_promote(self, now: float) -> bool:
        """True if a new version may be put on trial or made current; a rollback always may."""
        return not self.is_frozen(now) and now - self._last_swap >= self._options.min_seconds
