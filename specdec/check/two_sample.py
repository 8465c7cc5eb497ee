"""Do two samples come from one law, and how different must two laws be for us to notice?

The test asks nothing of the law: cells are continuations, rare ones are put together by their *pooled* count (which
does not look at the labels, so the test stays exact), the statistic is the chi-square of homogeneity, and its null law
is that of relabelling the pooled sample at random.

The power is computed against the least favourable alternative. For a given total variation the chi-square grows least
when every cell changes by the same relative amount (Cauchy-Schwarz), so any other defect of that size is found more
often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["POWER", "SIGNIFICANCE", "TwoSampleTest", "two_sample_test"]

SIGNIFICANCE: Final = 1e-3
POWER: Final = 0.9
_MIN_POOLED: Final = 10  # expected 5 in each sample, the usual least count of a chi-square cell
_NUM_RELABELLINGS: Final = 20_000  # the smallest p-value is 1 / 20001; 20 of them lie beyond the significance
_NUM_SIMULATIONS: Final = 1_000  # per candidate: the simulated power is off by about 0.01
_NUM_BISECTIONS: Final = 10

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TwoSampleTest:
    """What two samples of equal size say about their laws; see ``specdec.check.report.TwoSample``."""

    num_cells: int
    total_variation: float
    p_value: float
    detectable_tv: float | None


def two_sample_test(first: Sequence[Hashable], second: Sequence[Hashable], *, seed: int = 0) -> TwoSampleTest:
    """Test that two samples of equal size have one law.

    Args:
        first: [n] outcomes.
        second: [n] outcomes.
        seed: of the relabellings; the same samples and seed give the same result.

    Raises:
        ValueError: the samples are empty or differ in size.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"two samples of equal size are needed, got {len(first)} and {len(second)}")
    rng = np.random.default_rng(seed)
    counts = _cells(first, second)
    pooled: Counts = counts.sum(axis=0)
    num = len(first)
    null = _chi_square(rng.multivariate_hypergeometric(pooled, num, size=_NUM_RELABELLINGS, method="marginals"), pooled)
    seen = float(_chi_square(counts[:1], pooled)[0])
    # Equal tables may differ in the last bit of the sum.
    beyond = int((null >= seen * (1 - 1e-9)).sum())
    return TwoSampleTest(
        num_cells=len(pooled),
        total_variation=float(np.abs(counts[0] - counts[1]).sum() / (2 * num)),
        p_value=(1 + beyond) / (1 + _NUM_RELABELLINGS),
        detectable_tv=_detectable(pooled / pooled.sum(), num, float(np.quantile(null, 1 - SIGNIFICANCE)), rng),
    )


def _cells(first: Sequence[Hashable], second: Sequence[Hashable]) -> Counts:
    """[2, K] counts, the commonest cell first; outcomes that are rare in both samples together share the last cell."""
    one, two = Counter(first), Counter(second)
    pooled = one + two
    common = [outcome for outcome, count in pooled.most_common() if count >= _MIN_POOLED]
    rows = [[sample[outcome] for outcome in common] for sample in (one, two)]
    rest = [len(first) - sum(rows[0]), len(second) - sum(rows[1])]
    table = np.array([[*row, other] for row, other in zip(rows, rest, strict=True)], dtype=np.int64)
    return table if sum(rest) else table[:, :-1]


def _chi_square(first: Counts, pooled: Counts) -> npt.NDArray[np.float64]:
    """[S] chi-square of homogeneity of tables with first rows [S, K] and column sums ``pooled`` [K] or [S, K].

    Rows have equal sums, so each column's two cells both deviate by ``first - pooled / 2``.
    """
    half = pooled / 2
    deviation = (first - half) ** 2
    return np.divide(2 * deviation, half, out=np.zeros_like(deviation), where=half > 0).sum(axis=1)


def _detectable(law: npt.NDArray[np.float64], num: int, critical: float, rng: np.random.Generator) -> float | None:
    """Smallest total variation found with probability ``POWER`` when the test rejects beyond ``critical``."""
    direction, largest = _spread(law)
    if largest == 0:
        return None

    def power(distance: float) -> float:
        first = rng.multinomial(num, law, size=_NUM_SIMULATIONS)
        other = np.clip(law + distance * direction, 0, None)
        second = rng.multinomial(num, other / other.sum(), size=_NUM_SIMULATIONS)
        return float((_chi_square(first, first + second) > critical).mean())

    low, high = 0.0, largest
    if power(high) < POWER:
        return None
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return high


def _spread(law: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], float]:
    """A change of total variation 1 that touches all cells by nearly one relative amount, and how far it can go."""
    grows = np.zeros(len(law), dtype=bool)
    for cell in np.argsort(-law):  # two halves of nearly equal mass
        grows[cell] = law[grows].sum() <= law.sum() / 2 - law[cell] / 2
    up, down = law[grows].sum(), law[~grows].sum()
    if up == 0 or down == 0:
        return np.zeros_like(law), 0.0
    return np.where(grows, law / up, -law / down), float(down)
