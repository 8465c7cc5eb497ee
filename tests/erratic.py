"""Overlap of drafting and verification by chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from specdec.types import DraftTree, RequestState

__all__ = ["Erratic", "Inline"]

_T = TypeVar("_T")


class Inline:
    """Work is done behind the forward, in the same thread, as a side stream is fed."""

    def start(self, work: Callable[[], _T]) -> Callable[[], _T]:
        return work

    def close(self) -> None:
        """Nothing is held."""


class Erratic:
    """Overlaps as the dice fall."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def splits(self, num_requests: int, context: float) -> bool:
        return bool(self.rng.random() < 0.6)

    def levels(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> int:
        return int(self.rng.integers(0, 4))

    def observe(self, events: Any) -> None:
        """Nothing to learn."""
