"""Where calibration starts: tables trained on recorded traffic, shipped with the package.

Only what does not depend on a tokenizer is shipped: cells of match lengths, votes, depths and histories, and the
weights of the mixer. Cells of tokens and token pairs start as "unknown".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from specdec.suffix_tree.calibration import (
    C_COUNT,
    C_PROB,
    C_STRETCHED,
    CELL_WIDTH,
    NUM_WEIGHTS,
    SET_WIDTH,
    SETS_BY_DEPTH,
    T_TOKEN,
)
from specdec.suffix_tree.surroundings import BEYONDS, DISTANCES

__all__ = ["Prior", "load_prior", "untrained_prior"]

FloatArray = npt.NDArray[np.float32]
_PATH = Path(__file__).with_name("prior.npz")


@dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """Starting values.

    Args:
        probs: [T_TOKEN] float32 in (0, 1): acceptance probability of each cell.
        counts: [T_TOKEN] float32: how many outcomes it stands for, so how fast it moves.
        weights: [NUM_WEIGHTS] float32: of the mixer.
    """

    probs: FloatArray
    counts: FloatArray
    weights: FloatArray

    def write(self, cells: FloatArray, weights: FloatArray) -> None:
        """Fill the tables of a new index; cells of tokens stay zero, which means unknown."""
        first = cells[: T_TOKEN * CELL_WIDTH].reshape(T_TOKEN, CELL_WIDTH)
        first[:, C_STRETCHED] = np.log(self.probs / (1 - self.probs))
        first[:, C_PROB] = self.probs - np.float32(0.5)
        first[:, C_COUNT] = self.counts
        weights[:NUM_WEIGHTS] = self.weights

    def save(self, path: Path) -> None:
        """Write the starting values, as ``load_prior`` reads them."""
        np.savez_compressed(path, probs=self.probs, counts=self.counts, weights=self.weights)


def load_prior(path: Path = _PATH) -> Prior:
    """Read starting values; by default the shipped ones.

    Raises:
        ValueError: the file is of another version of the tables.
    """
    with np.load(path) as saved:
        prior = Prior(saved["probs"], saved["counts"], saved["weights"])
    if prior.probs.shape != (T_TOKEN,) or prior.weights.shape != (NUM_WEIGHTS,):
        raise ValueError(f"{path} has {prior.probs.shape} cells, these tables have {T_TOKEN}")
    return prior


def untrained_prior() -> Prior:
    """Starting values by rule of thumb: longer matches and more agreement are likelier. Training starts here."""
    length = np.array([1, 2, 3, 4, 5.5, 7.5, 10.5, 14.5, 20, 28, 48, 90, 0.3])
    by_length = np.clip(1 - 0.8 / (length**0.9 + 0.35), 0.05, 0.98)
    by_share = np.array([0.95, 1, 1.05, 1.1, 1.1, 0.08, 0.2, 0.36, 0.55, 0.75, 0.9, 1, 1.1])
    share = np.tile(np.outer(by_length, by_share).ravel(), 3)
    start = np.repeat(by_length, 8 * 4)
    rank = np.tile(np.repeat(by_length, 2), 5)
    history = np.tile(by_length, 6 * 8)
    beyond = np.repeat(by_length, BEYONDS * 3 * DISTANCES)
    probs = np.clip(np.concatenate([share, start, rank, history, beyond]), 0.03, 0.98).astype(np.float32)
    weights = np.zeros((NUM_WEIGHTS // SET_WIDTH, SET_WIDTH), np.float32)
    weights[:SETS_BY_DEPTH, :-1] = 0.25  # all but the bias; the other sets are what is learned on top
    return Prior(probs, np.zeros(T_TOKEN, np.float32), weights.ravel())
