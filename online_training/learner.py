"""What learns inside the daemon, as the daemon sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from specdec.online_training.records import TraceRecord

__all__ = ["LearnReport", "Learner"]


@dataclass(frozen=True, slots=True)
class LearnReport:
    """One optimizer step.

    Args:
        loss: weighted mean.
        acceptance_length: simulated, of greedy chains, on what was learned from; NaN: nothing to judge.
        num_tokens: positions that taught.
    """

    loss: float
    acceptance_length: float
    num_tokens: int


class Learner(Protocol):
    """Weights that learn from requests."""

    kind: str

    @property
    def step(self) -> int:
        """Optimizer steps taken."""

    def learn(self, records: Sequence[TraceRecord]) -> LearnReport:
        """One optimizer step."""

    def judge(self, records: Sequence[TraceRecord], weights: Mapping[str, Tensor] | None = None) -> float:
        """Simulated acceptance length of the weights that would be published, or of others, without learning."""

    def weights(self) -> dict[str, Tensor]:
        """What would be published."""

    def export(self, folder: Path) -> None:
        """Write a checkpoint in the published format."""

    def reset(self, folder: Path, *, rate: float) -> None:
        """Go back to a version's weights, with ``rate`` times the learning rate."""

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, as tensors and numbers."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a state."""
