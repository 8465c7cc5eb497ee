from __future__ import annotations

import inspect

import numpy as np
import pytest

from specdec.server.integrations.suffix_cache import SuffixDecodingCache


def test_the_signatures_are_those_of_arctic():
    expected = {
        "__init__": ["self", "max_tree_depth", "max_cached_requests"],
        "start_request": ["self", "req_id", "prompt_token_ids"],
        "stop_request": ["self", "req_id"],
        "add_active_response": ["self", "req_id", "token_ids"],
        "evict_cached_response": ["self", "req_id"],
        "speculate": ["self", "req_id", "context", "max_spec_tokens", "max_spec_factor", "max_spec_offset",
                      "min_token_prob", "use_tree_spec"],
    }  # fmt: skip
    for name, arguments in expected.items():
        parameters = inspect.signature(getattr(SuffixDecodingCache, name)).parameters.values()
        assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == arguments


def test_a_life_of_two_requests():
    cache = SuffixDecodingCache()
    cache.start_request("a", [1, 2, 3])
    cache.add_active_response("a", [4, 5, 6])
    assert list(cache.active_requests) == ["a"]
    cache.stop_request("a")
    assert list(cache.cached_requests) == ["a"]
    cache.start_request("b", np.array([9, 4], np.int32))
    draft = cache.speculate("b", [9, 4], min_token_prob=0)  # max_spec_tokens has a working default
    assert draft.token_ids == [5, 6]
    assert draft.parents == [-1, 0]
    assert 0 < draft.probs[1] <= draft.probs[0] <= 1
    assert draft.score == pytest.approx(sum(draft.probs))
    assert draft.match_len == 1
    cache.evict_cached_response("a")
    assert cache.speculate("b", [9, 4]).token_ids == []


def test_limits_hold():
    cache = SuffixDecodingCache(limit_by_match=True)
    cache.start_request("a", [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3])
    assert len(cache.speculate("a", [1, 2, 3], min_token_prob=0).token_ids) == 3
    assert len(cache.speculate("a", [1, 2, 3], max_spec_factor=2, min_token_prob=0).token_ids) == 6
    assert len(cache.speculate("a", [1, 2, 3], max_spec_offset=1, min_token_prob=0).token_ids) == 4
    assert len(cache.speculate("a", [1, 2, 3], 2, min_token_prob=0).token_ids) == 2
    tree = cache.speculate("a", [1, 2, 3], use_tree_spec=True, min_token_prob=0)
    assert all(parent < i for i, parent in enumerate(tree.parents))


def test_a_foreign_context_is_looked_up_by_itself():
    cache = SuffixDecodingCache()
    cache.start_request("a", [1])
    cache.add_active_response("a", [4, 5, 6])
    assert cache.speculate("a", [7, 4], min_token_prob=0).token_ids[:2] == [5, 6]
    assert cache.speculate("a", []).token_ids == []


def test_cached_requests_are_bounded_and_may_be_none():
    cache = SuffixDecodingCache(max_cached_requests=2)
    for name in range(4):
        cache.start_request(name, [1])
        cache.add_active_response(name, [2, 3])
        cache.stop_request(name)
    assert len(cache.cached_requests) == 2
    none = SuffixDecodingCache(max_cached_requests=0)
    none.start_request("a", [1])
    none.add_active_response("a", [2])
    assert list(none.cached_requests) == []
    cache.start_request(3, [1])  # the id of a kept response: that one is evicted
    assert 3 in cache.active_requests


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.start_request("a", [1]), "Request 'a' is already active"),
        (lambda c: c.stop_request("x"), "Request 'x' is not active"),
        (lambda c: c.add_active_response("x", [1]), "Request 'x' is not active"),
        (lambda c: c.speculate("x", [1]), "Request 'x' is not active"),
        (lambda c: c.evict_cached_response("x"), "Request 'x' is not cached"),
        (lambda c: c.start_request("y", np.zeros((2, 2), np.int32)), "ndim=1"),
        (lambda c: c.start_request("y", np.zeros(2, np.int64)), "dtype=int32"),
        (lambda c: c.start_request("y", np.zeros(8, np.int32)[::2]), "contiguous"),
        (lambda c: SuffixDecodingCache(max_cached_requests=1 << 31), "at most 2"),
    ],
)
def test_errors_are_those_of_arctic(call, message):
    cache = SuffixDecodingCache()
    cache.start_request("a", [1])
    with pytest.raises(ValueError, match=message):
        call(cache)
