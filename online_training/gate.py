"""Whether learning still pays: who gains nothing sleeps until traffic changes (after TIDE, arXiv 2602.05145).

Asleep means that shards pass by unlearned. They are still watched, and remembered for replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.errors import ConfigError
from specdec.online_training.records import TraceRecord

__all__ = ["GateOptions", "TrainGate"]


@dataclass(frozen=True, slots=True)
class GateOptions:
    """When to sleep and when to wake.

    Args:
        half_life: of the mean over served requests, in requests.
        patience: publications in a row without gain before it sleeps.
        min_gain: relative gain on held-out requests that counts as one.
        close: sleep only if served requests are within this share of their best,
        wake: and wake if they fall by more than this share below what they were when it fell asleep.
    """

    half_life: float = 200.0
    patience: int = 4
    min_gain: float = 0.005
    close: float = 0.02
    wake: float = 0.05

    def __post_init__(self) -> None:
        if not self.half_life > 0 or self.patience < 1 or min(self.min_gain, self.close, self.wake) < 0:
            raise ConfigError("half_life must be > 0, patience >= 1, min_gain, close and wake >= 0")


class TrainGate:
    """Follows tokens per round of served requests, and the gains of publications."""

    def __init__(self, options: GateOptions | None = None) -> None:
        self._options = options or GateOptions()
        self._decay = 0.5 ** (1 / self._options.half_life)
        self._mean = self._weight = self._best = self._asleep_at = 0.0
        self._num_idle = 0
        self.is_open = True

    @property
    def served(self) -> float:
        """Moving mean of tokens per round; 0 before the first round."""
        return self._mean / self._weight if self._weight else 0.0

    def observe(self, records: Sequence[TraceRecord]) -> None:
        """Take in served requests."""
        for record in records:
            rounds = record.rounds
            if not len(rounds):
                continue
            tokens = float(rounds.num_accepted.sum()) / len(rounds) + 1
            self._mean = self._decay * self._mean + (1 - self._decay) * tokens
            self._weight = self._decay * self._weight + (1 - self._decay)
        self._best = max(self._best, self.served)
        if not self.is_open and self.served < self._asleep_at * (1 - self._options.wake):
            self.is_open, self._num_idle, self._best = True, 0, self.served

    def judged(self, now: float, before: float) -> None:
        """Take in the figures of new and published weights on held-out requests."""
        options = self._options
        self._num_idle = 0 if now > before * (1 + options.min_gain) else self._num_idle + 1
        if self._num_idle >= options.patience and self.served >= self._best * (1 - options.close):
            self.is_open, self._asleep_at = False, self.served
