"""The two-sample test: its level, its power, and what it says when it can see nothing."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.check.two_sample import SIGNIFICANCE, two_sample_test


def draw(rng: np.random.Generator, law: np.ndarray, num: int) -> list[tuple[int, ...]]:
    """Pairs of tokens; the law is over the pairs."""
    return [(int(cell) // 10, int(cell) % 10) for cell in rng.choice(len(law), num, p=law)]


@pytest.fixture
def law() -> np.ndarray:
    return np.random.default_rng(1).dirichlet(np.ones(40))


def test_equal_laws_give_p_values_that_are_spread_evenly(law: np.ndarray):
    rng = np.random.default_rng(2)
    p_values = [two_sample_test(draw(rng, law, 100), draw(rng, law, 100)).p_value for _ in range(30)]
    # Uniform p-values have mean 1/2 with deviation 0.053, and 7.5 of 30 lie below 1/4 with deviation 2.4.
    assert 0.3 < np.mean(p_values) < 0.7
    assert 1 <= sum(p < 0.25 for p in p_values) <= 16
    assert min(p_values) > SIGNIFICANCE


def test_a_law_that_is_off_by_the_stated_distance_is_found_nine_times_of_ten(law: np.ndarray):
    rng = np.random.default_rng(3)
    stated = two_sample_test(draw(rng, law, 500), draw(rng, law, 500)).detectable_tv
    assert stated is not None
    assert 0.05 < stated < 0.4
    order = np.argsort(-law)
    up = np.zeros(len(law), dtype=bool)
    up[order[::2]] = True
    other = np.where(up, law * (1 + stated / law[up].sum()), law * (1 - stated / law[~up].sum()))
    found = [two_sample_test(draw(rng, law, 500), draw(rng, other, 500)).p_value < SIGNIFICANCE for _ in range(12)]
    assert sum(found) >= 8  # 10.8 are expected


def test_more_samples_detect_smaller_distances(law: np.ndarray):
    rng = np.random.default_rng(4)
    few, many = (two_sample_test(draw(rng, law, num), draw(rng, law, num)).detectable_tv for num in (200, 2000))
    assert few is not None
    assert many is not None
    assert many < few / 2


def test_one_concentrated_wrong_outcome_is_found(law: np.ndarray):
    rng = np.random.default_rng(5)
    wrong = [(3, 3) if rng.random() < 0.1 else pair for pair in draw(rng, law, 500)]
    assert two_sample_test(draw(rng, law, 500), wrong).p_value < SIGNIFICANCE


def test_a_flat_law_is_said_to_be_out_of_sight():
    result = two_sample_test([(i,) for i in range(50)], [(i,) for i in range(50, 100)])
    assert result.detectable_tv is None
    assert result.p_value == 1
    assert result.num_cells == 1


def test_rare_continuations_count_for_their_beginning():
    # No pair comes twice, but the first tokens differ between the samples.
    first = [(1, i) for i in range(60)] + [(2, i) for i in range(20)]
    second = [(1, 100 + i) for i in range(20)] + [(2, 100 + i) for i in range(60)]
    result = two_sample_test(first, second)
    assert result.num_cells == 2
    assert result.total_variation == pytest.approx(0.5)
    assert result.p_value < SIGNIFICANCE


def test_the_same_samples_give_the_same_result(law: np.ndarray):
    rng = np.random.default_rng(6)
    samples = draw(rng, law, 100), draw(rng, law, 100)
    assert two_sample_test(*samples) == two_sample_test(*samples)


def test_samples_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="equal size"):
        two_sample_test([(1,)], [])
