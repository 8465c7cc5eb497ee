"""Makes a head's confidences true: one temperature per place of a block, fitted on rounds that were verified.

Sequential temperature scaling (DSpark, arXiv 2607.05147, section 3): from the first place to the last, the temperature
of a place is the one for which the chance of the whole prefix, ``prod sigmoid(logit_j / T_j)``, is best calibrated:
smallest expected calibration error against "the prefix was accepted".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from specdec.errors import ConfigError, LoadError

__all__ = ["CalibrationLog", "Temperatures", "calibration_error", "reliability"]

Floats = npt.NDArray[np.float64]
_GRID = np.exp(np.linspace(np.log(0.1), np.log(10.0), 93))  # 1 is one of them
_BINS = 10


def calibration_error(chances: Floats, happened: npt.NDArray[np.bool_], *, bins: int = _BINS) -> float:
    """Expected calibration error: mean |share that happened - mean chance| over equal bins of the chance.

    Args:
        chances: [N] in [0, 1].
        happened: [N].
        bins: how many.

    Returns:
        A number in [0, 1]; 0 for N = 0.
    """
    if len(chances) == 0:
        return 0.0
    rows = reliability(chances, happened, bins=bins)
    return sum(count * abs(share - mean) for mean, share, count in rows) / len(chances)


def reliability(
    chances: Floats, happened: npt.NDArray[np.bool_], *, bins: int = _BINS
) -> list[tuple[float, float, int]]:
    """The reliability curve: (mean chance, share that happened, how many) of each bin that is not empty."""
    which = np.minimum((chances * bins).astype(np.int64), bins - 1)
    return [
        (float(chances[which == one].mean()), float(happened[which == one].mean()), int((which == one).sum()))
        for one in range(bins)
        if (which == one).any()
    ]


@dataclass(frozen=True, slots=True)
class Temperatures:
    """One temperature per place of a block; places behind the last one share its temperature.

    Args:
        values: K numbers > 0.

    Raises:
        ConfigError: there are none, or one is not positive and finite.
    """

    values: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.values or not all(0 < value < np.inf for value in self.values):
            raise ConfigError(f"temperatures must be positive and finite, got {self.values}")

    def chances(self, logits: Floats) -> Floats:
        """[R, K] chances from logits [R, K]."""
        last = len(self.values) - 1
        scale = np.array([self.values[min(place, last)] for place in range(logits.shape[1])])
        return np.asarray(1.0 / (1.0 + np.exp(-(logits / scale).clip(-60, 60))))

    def save(self, path: Path) -> None:
        """Write them as JSON."""
        path.write_text(json.dumps({"temperatures": list(self.values)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Temperatures:
        """What ``save`` wrote.

        Raises:
            LoadError: the file cannot be read, or holds something else.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))["temperatures"]
            return cls(tuple(float(value) for value in values))
        except (OSError, ValueError, TypeError, KeyError, ConfigError) as error:
            raise LoadError(f"cannot read temperatures from {path}: {error}") from error


@dataclass(slots=True, eq=False)
class CalibrationLog:
    """Rounds to fit on: what was drafted as a chain, the logits of its confidences, and what was accepted."""

    logits: list[Floats] = field(default_factory=list)  # [K] each
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def add(self, logits: Floats, drafted: int, accepted: int) -> None:
        """One round: logits [K] of a block of which the first ``drafted`` tokens were sent."""
        self.logits.append(logits)
        self.drafted.append(drafted)
        self.accepted.append(accepted)

    def prefixes(self, temperatures: Temperatures) -> list[tuple[Floats, npt.NDArray[np.bool_]]]:
        """For each place: the chances that the prefix up to it is accepted, and whether it was, where it was sent."""
        if not self.logits:
            return []
        reach = temperatures.chances(np.stack(self.logits)).cumprod(axis=1)
        drafted, accepted = np.array(self.drafted), np.array(self.accepted)
        sent = [drafted > place for place in range(reach.shape[1])]
        return [(reach[rows, place], accepted[rows] > place) for place, rows in enumerate(sent) if rows.any()]

    def errors(self, temperatures: Temperatures) -> list[float]:
        """Expected calibration error of the prefix at each place."""
        return [calibration_error(chances, happened) for chances, happened in self.prefixes(temperatures)]

    def fit(self, grid: Sequence[float] = tuple(_GRID)) -> Temperatures:
        """The temperatures that calibrate these rounds, from the first place to the last.

        Raises:
            ConfigError: there are no rounds.
        """
        if not self.logits:
            raise ConfigError("temperatures are fitted on drafted rounds, and there are none")
        found: list[float] = []
        for place in range(max(self.drafted)):
            trials = [(self.errors(Temperatures((*found, value)))[place], abs(np.log(value)), value) for value in grid]
            found.append(float(min(trials)[2]))
        return Temperatures(tuple(found))
