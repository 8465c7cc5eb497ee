"""Where drafts end, against a search over all lengths."""

from __future__ import annotations

import numpy as np
import pytest

from specdec.suffix_tree.cache import SuffixCache
from specdec.suffix_tree.stopping import is_worth_drafting


def cost_of_a_token(length: int, right: float, threshold: float) -> float:
    """Of text drafted in pieces of ``length`` tokens, each right with probability ``right``; drafting one costs 1."""
    accepted = sum(right**i for i in range(1, length + 1))
    return (1 / threshold + length) / (1 + accepted)


@pytest.mark.parametrize("right", [0.2, 0.5, 0.8, 0.95, 0.99, 0.998])
@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3, 0.6, 0.9])
def test_a_steady_copy_is_cut_where_that_costs_least(right: float, threshold: float):
    length = 0
    while is_worth_drafting(right ** (length + 1), length + 1, threshold):
        length += 1
    best = min(cost_of_a_token(n, right, threshold) for n in range(2000))
    assert cost_of_a_token(length, right, threshold) <= 1.03 * best


def test_a_threshold_of_zero_drafts_everything_and_of_one_nothing():
    assert all(is_worth_drafting(value, 9, 0.0) for value in (0.0, 1e-30, 0.5, 0.999))
    assert not any(is_worth_drafting(value, 9, 1.0) for value in (1e-30, 0.5, 0.999))


@pytest.mark.parametrize("as_tree", [False, True])
def test_long_copies_are_drafted_in_pieces_that_grow_with_the_cost_of_a_step(as_tree: bool):
    text = np.random.default_rng(0).integers(0, 1000, 400).astype(np.int32)
    cache = SuffixCache(max_bytes=1 << 20)
    cache.start("r", np.concatenate([text, text[:100]]))
    got = [cache.speculate(["r"], [256], threshold=t, as_tree=as_tree).values[1:] for t in (0.5, 0.1, 0.02)]
    lengths = [len(values) for values in got]
    assert 4 < lengths[0] < lengths[1] < lengths[2] <= 256
    assert got[0][-1] > 0.6, "the last token of a copy is far surer than the threshold"
