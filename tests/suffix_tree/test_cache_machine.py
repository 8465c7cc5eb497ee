"""The suffix cache against a naive model, under every operation that it has."""

from __future__ import annotations

import os

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from specdec.suffix_tree import _layout as at
from specdec.suffix_tree.cache import SuffixCache
from specdec.suffix_tree.index import BYTES_PER_PAGE
from tests.suffix_tree.naive import NaiveCache

JIT = os.environ.get("NUMBA_DISABLE_JIT") != "1"  # interpreted kernels are slow: fewer examples
TENANTS = ("north", "south")
NAMES = tuple("abcdefgh")
texts = st.lists(st.integers(0, 3), min_size=1, max_size=90)


def of_tenant(tokens: list[int], tenant: str) -> list[int]:
    """Tenants write in disjoint alphabets, so any leak shows."""
    return [token + 10 * TENANTS.index(tenant) for token in tokens]


class CacheMachine(RuleBasedStateMachine):
    @initialize(pages=st.integers(2, 40))
    def begin(self, pages: int) -> None:
        self.cache = SuffixCache(max_bytes=pages * BYTES_PER_PAGE)
        self.naive = NaiveCache()

    def sync_evictions(self) -> None:
        """What the cache evicted to keep its bound is gone from the model too; it may only evict finished ones."""
        for request_id, request in self.naive.requests.items():
            live = self.cache._live[request_id]
            if live.key is None or self.cache._table.rows[live.slot, at.R_SEQUENCE] < 0:
                request.cached = False  # the index was full: this response is cached no further
        for tenant, key in list(self.naive.responses):
            if key not in self.cache.index(tenant).responses:
                request = self.naive.requests.get(key)
                assert request is None or request.tenant != tenant or not request.cached
                del self.naive.responses[tenant, key]
        for tenant in TENANTS:  # where the index was full, only a beginning of the response was kept
            index = self.cache.index(tenant)
            arrays = dict(index.arrays())
            for key, number in index.responses.items():
                kept = int((arrays["tokens"].reshape(-1, 64)[arrays["page_owner"] == number] >= 0).sum())
                self.naive.responses[tenant, key] = self.naive.responses[tenant, key][:kept]

    @rule(name=st.sampled_from(NAMES), tenant=st.sampled_from(TENANTS), prompt=texts)
    def start(self, name: str, tenant: str, prompt: list[int]) -> None:
        if name in self.naive.requests:
            return
        ids = of_tenant(prompt, tenant)
        self.cache.start(name, ids, tenant=tenant)
        self.naive.start(name, ids, tenant)
        self.sync_evictions()

    @rule(data=st.data(), new=st.lists(texts, min_size=len(NAMES), max_size=len(NAMES)))
    def extend(self, data: st.DataObject, new: list[list[int]]) -> None:
        names = data.draw(st.lists(st.sampled_from(NAMES), unique=True))
        names = [name for name in names if name in self.naive.requests]
        ids = [of_tenant(new[i], self.naive.requests[name].tenant) for i, name in enumerate(names)]
        self.cache.extend(names, [np.array(x, np.int32) for x in ids])
        for name, tokens in zip(names, ids, strict=True):
            self.naive.extend(name, tokens)
        self.sync_evictions()

    @precondition(lambda self: self.naive.requests)
    @rule(data=st.data(), as_tree=st.booleans(), budget=st.integers(0, 12))
    def speculate(self, data: st.DataObject, as_tree: bool, budget: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.naive.requests)))
        drafts = self.cache.speculate([name], [budget], threshold=0.0, as_tree=as_tree)
        tokens, parents, values = drafts.token_ids, drafts.parents, drafts.values
        assert drafts.offsets.tolist() == [0, len(tokens)]
        assert len(tokens) - 1 <= budget
        found = self.naive.occurrences(name)
        paths: list[list[int]] = [[]]
        for node in range(1, len(tokens)):
            assert 0 <= parents[node] < node
            assert 0 < values[node] <= values[parents[node]] <= 1
            if not as_tree:
                assert parents[node] == node - 1
            paths.append([*paths[parents[node]], int(tokens[node])])
            assert any(rest[: len(paths[node])] == paths[node] for _, rest, _ in found), "a draft that nobody wrote"
        assert len({(int(p), int(t)) for p, t in zip(parents[1:], tokens[1:], strict=True)}) == len(tokens) - 1
        if budget:
            longest = max((length for length, _, searchable in found if searchable), default=0)
            assert self.cache.match_length(name) <= max((length for length, _, _ in found), default=0)
            if len(found) <= 16 and not any(i.header[at.X_NUM_RECYCLED] for i in self.cache.tenants.values()):
                assert self.cache.match_length(name) == longest
                assert len(tokens) > 1 or not longest

    @precondition(lambda self: self.naive.requests)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.naive.requests)))
        self.cache.finish(name)
        self.naive.finish(name)

    @rule(name=st.sampled_from(NAMES), tenant=st.sampled_from(TENANTS), tokens=texts)
    def insert(self, name: str, tenant: str, tokens: list[int]) -> None:
        if name in self.naive.requests:
            return
        ids = of_tenant(tokens, tenant)
        self.cache.insert(name, ids, tenant=tenant)
        self.naive.insert(name, ids, tenant)
        self.sync_evictions()

    @precondition(lambda self: self.naive.responses)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        tenant, key = data.draw(st.sampled_from(sorted(self.naive.responses)))
        self.cache.forget(key, tenant=tenant)
        self.naive.forget(key, tenant)

    @rule(tenant=st.sampled_from(TENANTS))
    def forget_tenant(self, tenant: str) -> None:
        self.cache.index(tenant)
        self.cache.forget_tenant(tenant)
        self.naive.forget_tenant(tenant)

    @invariant()
    def memory_is_whole_and_bounded(self) -> None:
        for index in self.cache.tenants.values():
            index.check_integrity()
            assert index.nbytes <= index.max_bytes + 4 * 4 * 1024  # the first buckets come on top of tiny bounds


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=60 if JIT else 5, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
