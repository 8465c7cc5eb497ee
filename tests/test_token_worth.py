"""What an accepted token saves, by where it stands."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.token_worth import attainable_speedups, token_worths

CHAIN = np.array([-1, 0, 1, 2], np.int32)


def worths(conditional: list[float], *, speedup: float, price: float = 0.05) -> np.ndarray:
    values = np.cumprod([1.0, *conditional]).astype(np.float32)
    parents = np.arange(-1, len(conditional)).astype(np.int32)
    return token_worths(parents, values, attainable_speedups(price), speedup)[1:]


def test_the_attainable_speedup_is_that_of_the_best_length() -> None:
    for price in (0.0, 0.05, 0.4):
        found = attainable_speedups(price)
        for row in (0, 8, 16, 31):
            q = min(row / 32, 0.98)
            best = max(sum(q**j for j in range(n + 1)) / (1 + price * n) for n in range(9))
            assert found[row] == pytest.approx(best, rel=1e-5)
    assert (np.diff(attainable_speedups(0.1)) >= 0).all()
    assert attainable_speedups(2.0).max() == 1.0  # where drafting cannot pay, it is as fast as plain decoding


def test_a_token_inside_a_copy_is_worth_less_than_one_before_hard_text() -> None:
    copied, hard = worths([0.5, 0.95], speedup=2.0)[0], worths([0.5, 0.1], speedup=2.0)[0]
    assert copied < 0.5 < hard
    assert hard > 1.5 * copied


def test_without_a_speedup_anywhere_worths_are_chances() -> None:
    assert worths([0.9, 0.8, 0.3], speedup=1.0, price=2.0) == pytest.approx([0.9, 0.72, 0.216], rel=1e-5)


def test_no_node_is_worth_more_than_its_parent() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        parents = np.array([-1, *(rng.integers(0, node) for node in range(1, 12))], np.int32)
        values = np.ones(12, np.float32)
        for node in range(1, 12):
            values[node] = values[parents[node]] * rng.random()
        found = token_worths(parents, values, attainable_speedups(0.05), 3.0)
        assert (found[1:] <= found[parents[1:]]).all()
        assert (found[1:] >= 0).all()


def test_values_that_rise_along_a_path_are_read_as_sure() -> None:
    found = token_worths(CHAIN, np.array([1, 0.2, 0.9, 0.9], np.float32), attainable_speedups(0.05), 2.0)
    assert np.isfinite(found[1:]).all()
    assert (np.diff(found) <= 0).all()
