"""The guard: speculation that loses against plain decoding is paused, and tried again at ever longer distances.

Source: Cascade (2506.20675): a utility below 1 turns speculation off, with exponential back-off. Here the utility is
measured time against the measured time of plain steps, and the verdict a cumulative sum (Page 1954): what was lost
against the least speed is added up, what was won beyond it is taken off. Text is copied in stretches, so a window of a
few steps would condemn every drafter between two of them.
"""

from __future__ import annotations

from specdec.errors import ConfigError

__all__ = ["Floor"]

_MOST_LOST = 3.0  # plain steps that may be lost before a pause
_MOST_LOST_PROBING = 1.0  # and after a pause, until it has won
_MOST_CREDIT = 6.0  # plain steps that were won and may be lost again
_FIRST_PAUSE = 16  # steps
_MAX_PAUSE = 1024
_OUTLIER = 4.0  # a step that takes longer than so many plain ones was disturbed, and counts as that


class Floor:
    """Decides whether speculation may go on.

    Args:
        least: the least speed against plain decoding, in (0, 1].

    Raises:
        ConfigError: ``least`` is outside its rule.
    """

    def __init__(self, least: float = 0.97) -> None:
        if not 0 < least <= 1:
            raise ConfigError(f"floor must be in (0, 1], got {least}")
        self._least = least
        self._pause = _FIRST_PAUSE
        self._resting = 0  # steps left of a pause
        self._is_probing = False
        self._lost = 0.0  # plain steps of one request; negative: credit

    @property
    def is_resting(self) -> bool:
        """True while speculation is paused."""
        return self._resting > 0

    def may_draft(self) -> bool:
        """Asked once before each step."""
        if self._resting == 0:
            return True
        self._resting -= 1
        return False

    def observe(self, tokens: float, ms: float, plain_ms: float, *, has_drafted: bool) -> None:
        """Note what a step was worth.

        Args:
            tokens: emitted per request.
            ms: that the step took.
            plain_ms: that a plain step of the same requests takes.
            has_drafted: steps without a draft say nothing about speculation.
        """
        if not has_drafted:
            return
        spent = min(ms / max(plain_ms, 1e-9), _OUTLIER)
        self._lost = max(self._lost + self._least * spent - tokens, -_MOST_CREDIT)
        if self._lost > (_MOST_LOST_PROBING if self._is_probing else _MOST_LOST):
            self._resting, self._lost = self._pause, 0.0
            self._pause = min(2 * self._pause, _MAX_PAUSE)
            self._is_probing = True
        elif self._lost <= -1.0:
            self._pause = _FIRST_PAUSE
            self._is_probing = False
