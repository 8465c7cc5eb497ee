"""Do two samples come from one law, and how different must two laws be for us to notice?

The test asks nothing of the law. Cells are continuations; those that are rare share a cell with others of the same
beginning. What is rare is decided by *pooled* counts, which do not look at the labels, so the test stays exact. The
statistic is the chi-square of homogeneity, and its null law is that of relabelling the pooled sample at random.

The power is computed against the least favourable alternative. For a given total variation the chi-square grows least
when every cell changes by the same relative amount (Cauchy-Schwarz), so any other defect of that size is found more
often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
Outcome = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TwoSampleTest:
    """What two samples of equal size say about their laws; see ``specdec.check.report.TwoSample``."""

    num_cells: int
    total_variation: float
    p_value: float
    detectable_tv: float | None


def two_sample_test(first: Sequence[Outcome], second: Sequence[Outcome], *, seed: int = 0) -> TwoSampleTest:
    """Test that two samples of equal size have one law.

    Args:
        first: [n] outcomes, of one length or not.
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


def _cells(first: Sequence[Outcome], second: Sequence[Outcome]) -> Counts:
    """[2, K] counts. An outcome that is rare in both samples together counts for its beginning, as short as need be."""
    one, two = Counter(first), Counter(second)
    for length in range(max(map(len, [*one, *two])), 0, -1):
        for cell in sorted({*one, *two}):
            if len(cell) == length and one[cell] + two[cell] < _MIN_POOLED:
                one[cell[:-1]] += one.pop(cell, 0)
                two[cell[:-1]] += two.pop(cell, 0)
    cells = sorted(cell for cell in {*one, *two} if one[cell] + two[cell])
    return np.array([[sample[cell] for cell in cells] for sample in (one, two)], dtype=np.int64)


def _chi_square(first: Counts, pooled: Counts) -> npt.NDArray[np.float64]:
    """[S] chi-square of homogeneity of tables with first rows [S, K] and column sums ``pooled`` [K] or [S, K].

    Rows have equal sums, so each column's two cells both deviate by ``first - pooled / 2``.
    """
    half = pooled / 2
    deviation = (first - half) ** 2
    terms = np.divide(2 * deviation, half, out=np.zeros_like(deviation), where=half > 0)
    statistic: npt.NDArray[np.float64] = terms.sum(axis=1)
    return statistic


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
