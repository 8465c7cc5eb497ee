"""What a level of a draft tree costs beside the rest of a step, measured while the drafter serves."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from specdec.drafters.tree_search import LevelCosts
from specdec.types import StepEvent

__all__ = ["DraftCosts"]

_WINDOW = 15  # steps that the medians are taken over: a busy moment does not move them
_LEAST = 3


class DraftCosts:
    """Medians over the newest steps."""

    def __init__(self) -> None:
        self._level_ms: deque[float] = deque(maxlen=_WINDOW)
        self._rest_ms: deque[float] = deque(maxlen=_WINDOW)
        self._levels_ms = 0.0  # of the step that is under way

    def searched(self, seconds: float, num_levels: int) -> None:
        """Note a search of a batch that scored so many levels after the first."""
        self._levels_ms = 1e3 * seconds
        if num_levels:
            self._level_ms.append(self._levels_ms / num_levels)

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Note what the step cost as a whole; its parts are the whole batch's."""
        if events:
            trace = events[0].trace
            spent = trace.draft_ms + trace.target_ms + trace.verify_ms + trace.commit_ms
            self._rest_ms.append(max(spent - self._levels_ms, 0.0))

    @property
    def costs(self) -> LevelCosts | None:
        """None until a few steps were seen."""
        if min(len(self._level_ms), len(self._rest_ms)) < _LEAST:
            return None
        return LevelCosts(median(self._level_ms), median(self._rest_ms))
