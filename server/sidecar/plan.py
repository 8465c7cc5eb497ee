"""How much a branch can save: measured times of the upstream, and the choice of what to launch.

Times in seconds: ``step_s`` per token of a running stream, ``open_s`` from sending a continuation to its first token,
less one step. The segment rule: a branch at offset x has produced ``x - open_s / step_s`` tokens when the base stream
gets there, provided that the base stream repeats the draft up to x.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.errors import ConfigError

__all__ = ["Layout", "PlanOptions", "Timing", "best_layout", "best_round"]

_FIRST_OPEN_S = 0.03  # until one was measured: a fast server's own cost and some network
_SMOOTHING = 0.1
_KEPT_GAPS = 512


@dataclass(slots=True)
class Timing:
    """What is known of the upstream's speed.

    Args:
        step_s: smoothed seconds per token; None before the first.
        open_s: smoothed seconds until a continuation's first token, less a step.
    """

    step_s: float | None = None
    open_s: float = _FIRST_OPEN_S
    _gaps: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_GAPS))
    _has_opened: bool = False

    def saw_gap(self, seconds: float, num_tokens: int) -> None:
        """Time between two events of one stream, of which the later one carries so many tokens."""
        gap = seconds / max(num_tokens, 1)
        self._gaps.append(gap)
        self.step_s = gap if self.step_s is None else self.step_s + _SMOOTHING * (gap - self.step_s)

    def saw_open(self, seconds: float) -> None:
        """Time from sending a continuation to its first token."""
        own = max(0.0, seconds - (self.step_s or 0.0))
        self.open_s = self.open_s + 0.3 * (own - self.open_s) if self._has_opened else own
        self._has_opened = True

    @property
    def usual_step_s(self) -> float | None:
        """A quick step of the upstream: the lower quartile of the last ones."""
        if len(self._gaps) < 8:
            return None
        return sorted(self._gaps)[len(self._gaps) // 4]


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What may be launched.

    Args:
        max_branches: beside the base stream: 1 races one long draft, more make a grid.
        max_draft: most draft tokens ahead, at most 256.
        min_segment: least tokens between two offsets.
        min_probability: that the base stream reaches a branch's offset.
        min_gain_s: least expected saving.
    """

    max_branches: int = 1
    max_draft: int = 128
    min_segment: int = 4
    min_probability: float = 0.1
    min_gain_s: float = 0.04

    def __post_init__(self) -> None:
        if not 1 <= self.max_branches <= 64:
            raise ConfigError(f"max_branches must be in [1, 64], got {self.max_branches}")
        if not 1 <= self.min_segment <= self.max_draft <= 256:
            raise ConfigError(
                f"1 <= min_segment <= max_draft <= 256 must hold, got {self.min_segment} and {self.max_draft}"
            )
        if not 0 < self.min_probability <= 1:
            raise ConfigError(f"min_probability must be in (0, 1], got {self.min_probability}")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where branches start, counted from the base stream's position.

    Args:
        offsets: ascending; each is a whole number of segments.
        gain_s: expected saving.
    """

    offsets: tuple[int, ...] = ()
    gain_s: float = 0.0


def best_layout(reach: Sequence[float], timing: Timing, options: PlanOptions) -> Layout:
    """The branches with the largest expected saving; none if it is too small.

    Args:
        reach: probability that the base stream repeats the draft up to and with token i; not increasing.
        timing: of the upstream.
        options: what may be launched.
    """
    best = Layout()
    step_s = timing.step_s
    if step_s is None:
        return best
    likely = sum(1 for probability in reach[: options.max_draft] if probability >= options.min_probability)
    # A branch that opens later than the base stream arrives saves nothing.
    shortest = max(options.min_segment, int(timing.open_s / step_s) + 2)
    for segment in range(shortest, likely + 1):
        offsets = tuple(range(segment, min(likely, segment * options.max_branches) + 1, segment))
        gain_s = sum(reach[offset - 1] for offset in offsets) * segment * step_s - reach[segment - 1] * timing.open_s
        if gain_s > best.gain_s:
            best = Layout(offsets, gain_s)
    return best if best.gain_s >= options.min_gain_s else Layout()


def best_round(reach: Sequence[float], timing: Timing, options: PlanOptions) -> Layout:
    """The draft to have verified in one pass, as a single offset at its end; none if it saves too little.

    While it is verified and the request is opened again behind it, the client's own stream flows on. So what is saved
    is the time of the accepted tokens less that of these two requests.

    Args:
        reach: probability that the stream repeats the draft up to and with token i; not increasing.
        timing: of the upstream.
        options: what may be launched.
    """
    likely = sum(1 for probability in reach[: options.max_draft] if probability >= options.min_probability)
    if timing.step_s is None or likely < options.min_segment:
        return Layout()
    gain_s = sum(reach[:likely]) * timing.step_s - 2 * (timing.open_s + timing.step_s)
    return Layout((likely,), gain_s) if gain_s >= max(options.min_gain_s, 0.0) else Layout()
