"""What a drafter would have proposed at every position of recorded answers, and how much of it was right.

One pass with nothing verified visits every position, so the record says what any policy would have got there: the
values of the drafted nodes, best first, and how many tokens the best k of them bring. Load simulations replay it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from specdec.errors import ConfigError, LoadError
from specdec.tree import DraftTree, FloatArray, IntArray

__all__ = ["Answer", "RecordedAcceptance", "accepted_by_size", "made_up_acceptance"]


def accepted_by_size(tree: DraftTree, truth: IntArray) -> tuple[FloatArray, npt.NDArray[np.uint8]]:
    """Values [N] of a tree's nodes, best first, and accepted tokens [N + 1] if the best 0, 1, ... N are verified.

    Args:
        tree: with values that fall along every path.
        truth: [G] int32: the tokens that come behind the root.
    """
    values = np.asarray(tree.values if tree.values is not None else np.ones(len(tree)), np.float32)[1:]
    order = np.argsort(-values, kind="stable")
    rank = np.empty(len(values) + 1, dtype=np.int64)
    rank[order + 1] = np.arange(1, len(values) + 1)
    gains = np.zeros(len(values) + 1, dtype=np.uint8)
    node = 0
    for depth, token_id in enumerate(truth.tolist(), start=1):
        children = np.flatnonzero((tree.parents == node) & (tree.token_ids == token_id))
        if not len(children):
            break
        node = int(children[0])
        gains[rank[node] :] = depth
    return values[order], gains


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One answer: at position p the nodes are ``values[starts[p] : starts[p + 1]]``.

    Args:
        starts: [P + 1] int64.
        values: [nodes] float32, best first at each position.
        gains: [nodes + P] uint8: at each position one more entry than nodes, for none of them.
    """

    starts: npt.NDArray[np.int64]
    values: FloatArray
    gains: npt.NDArray[np.uint8]

    @property
    def num_positions(self) -> int:
        """P: output tokens."""
        return len(self.starts) - 1

    def at(self, position: int) -> tuple[FloatArray, npt.NDArray[np.uint8]]:
        """Values and gains of one position; behind the end it starts again."""
        p = position % self.num_positions
        first, last = int(self.starts[p]), int(self.starts[p + 1])
        return self.values[first:last], self.gains[first + p : last + p + 1]

    @classmethod
    def of(cls, positions: Sequence[tuple[FloatArray, npt.NDArray[np.uint8]]]) -> Answer:
        """The answer with these (values, gains) at its positions."""
        starts = np.zeros(len(positions) + 1, dtype=np.int64)
        np.cumsum([len(values) for values, _ in positions], out=starts[1:])
        return cls(
            starts,
            np.concatenate([values for values, _ in positions], dtype=np.float32),
            np.concatenate([gains for _, gains in positions], dtype=np.uint8),
        )


@dataclass(frozen=True, slots=True, eq=False)
class RecordedAcceptance:
    """Answers that requests of a simulation give.

    Args:
        answers: at least one, none of them empty.

    Raises:
        ConfigError: there is none, or one is empty.
    """

    answers: tuple[Answer, ...]

    def __post_init__(self) -> None:
        if not self.answers or not all(answer.num_positions for answer in self.answers):
            raise ConfigError("recorded acceptance needs at least one answer, and every answer a position")

    def save(self, path: Path) -> None:
        """Write all to one compressed numpy file."""
        arrays = {f"{name}{i}": getattr(a, name) for i, a in enumerate(self.answers) for name in Answer.__slots__}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> RecordedAcceptance:
        """The answers of a file.

        Raises:
            LoadError: it cannot be read.
        """
        try:
            with np.load(path) as saved:
                count = sum(name.startswith("starts") for name in saved.files)
                parts = [tuple(saved[f"{name}{i}"] for name in ("starts", "values", "gains")) for i in range(count)]
        except (OSError, ValueError, KeyError) as error:
            raise LoadError(f"cannot read recorded acceptance from {path}: {error}") from error
        return cls(tuple(Answer(*part) for part in parts))


def made_up_acceptance(
    rates: Sequence[float], *, depth: int = 8, num_answers: int = 8, length: int = 200, seed: int = 0
) -> RecordedAcceptance:
    """Chains whose tokens are accepted with known chances, for proofs: each answer has stretches of the given rates.

    Args:
        rates: chance that a token is accepted, given the ones before; one stretch of about 40 positions each.
        depth: nodes of every chain.
        num_answers: how many.
        length: positions of an answer.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    answers = []
    for _ in range(num_answers):
        positions = []
        for position in range(length):
            rate = rates[(position // 40) % len(rates)]
            values = (rate ** np.arange(1, depth + 1)).astype(np.float32)
            right = int(np.argmin(np.append(rng.random(depth) < rate, False)))
            positions.append((values, np.minimum(np.arange(depth + 1), right).astype(np.uint8)))
        answers.append(Answer.of(positions))
    return RecordedAcceptance(tuple(answers))
