"""A full upstream in virtual time: speculation is off within seconds, and clients wait no longer than without it."""

from __future__ import annotations

import asyncio
import selectors

import numpy as np

from specdec.server.sidecar import drafting
from specdec.server.sidecar.drafting import Drafting, Shop
from specdec.server.sidecar.events import Piece
from specdec.server.sidecar.gates import Budget, BudgetOptions, LoadGate
from specdec.server.sidecar.metrics import SidecarMetrics
from specdec.server.sidecar.plan import PlanOptions, Timing
from specdec.server.sidecar.splice import Splicer
from specdec.suffix_tree.cache import SuffixCache

ANSWER = list(range(100, 180))
STEP_S, ROOM = 0.02, 8  # a step takes this long for so many streams, and longer in proportion for more


class _Selector(selectors.DefaultSelector):
    """Waits by moving the clock."""

    now = 0.0

    def select(self, timeout=None):
        assert timeout is not None, "nothing will ever happen"
        self.now += max(timeout, 0)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.clock = _Selector()
        super().__init__(self.clock)

    def time(self):
        return self.clock.now


class Server:
    """Gives every stream one token per step."""

    def __init__(self):
        self.streams = {}  # in order, so that every run is the same
        self.branches = []  # when each was opened

    async def run(self):
        while True:
            await asyncio.sleep(STEP_S * max(1.0, len(self.streams) / ROOM))
            for stream in list(self.streams):
                stream.queue.put_nowait(True)

    async def open(self, output):
        self.branches.append(asyncio.get_running_loop().time())
        return Recital(self, len(output))


class Recital:
    def __init__(self, server, at, shop=None, wrong_from=10_000):
        self.server, self.at, self.shop, self.wrong_from = server, at, shop, wrong_from
        self.queue, self.last = asyncio.Queue(), None
        server.streams[self] = True

    async def next(self):
        if self.at >= len(ANSWER):
            return None
        await self.queue.get()
        now = asyncio.get_running_loop().time()
        if self.shop is not None and self.last is not None:
            self.shop.saw_gap(now - self.last, 1, was_crowded=self.was_crowded)
        self.was_crowded = self.shop is not None and self.shop.is_crowded
        self.last, self.at = now, self.at + 1
        is_last = self.at == len(ANSWER)
        if is_last:
            self.server.streams.pop(self, None)
        return Piece(token_ids=(ANSWER[self.at - 1],), text="x", finish_reason="length" if is_last else None)

    async def close(self):
        self.server.streams.pop(self, None)


def simulated(num_clients, *, speculates, seconds=25.0, **gating):
    """Latencies of answers, and when branches were opened."""

    async def main():
        loop, server, latencies = asyncio.get_running_loop(), Server(), []
        timing = Timing(open_s=0.02)
        gate = LoadGate(timing, clock=loop.time, **gating)
        budget = Budget(BudgetOptions(ratio=10.0, burst=100_000, max_branches=8, max_branches_per_tenant=8))
        shop = Shop(SuffixCache(), PlanOptions(max_branches=4, min_gain_s=0.0), timing, gate, budget, SidecarMetrics())
        for number in range(3):
            shop.cache.insert(number, np.array([1, *ANSWER], np.int32), tenant="t")

        async def client(name):
            count = 0
            await asyncio.sleep(name * 0.11)
            while loop.time() < seconds:
                start, count = loop.time(), count + 1
                mine = Drafting(
                    shop, f"{name}-{count}", "t", limit=len(ANSWER) + 1, may_learn=False, is_sampled=False,
                    may_write=lambda: speculates,
                )  # fmt: skip
                mine.begin([1])
                splicer = Splicer(Recital(server, 0, shop), server, mine, split=lambda piece, n: None)
                ids = [i async for spliced in splicer.pieces() for i in spliced.piece.token_ids]
                mine.close()
                assert ids == ANSWER
                latencies.append(loop.time() - start)

        steps = asyncio.ensure_future(server.run())
        await asyncio.gather(*map(client, range(num_clients)))
        steps.cancel()
        assert not server.streams
        return latencies, server.branches

    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


def p99(latencies):
    return float(np.quantile(latencies, 0.99))


def test_an_idle_upstream_is_used():
    plain, none = simulated(1, speculates=False)
    fast, branches = simulated(1, speculates=True)
    assert none == []
    assert len(branches) > 5
    assert p99(fast) < 0.8 * p99(plain)


def test_a_full_upstream_is_left_alone_within_seconds(monkeypatch):
    # Drafts that are sure of themselves and always wrong, and a budget that would pay for them.
    monkeypatch.setattr(drafting, "drafts_of", lambda *_, limit, **__: ([7] * limit, [0.9] * limit))
    plain, _ = simulated(24, speculates=False)
    full, branches = simulated(24, speculates=True)
    reckless, many = simulated(24, speculates=True, max_inflation=1e9, max_own_inflation=1e9)
    assert p99(reckless) > 1.05 * p99(plain)  # what the gate is there for
    assert len(many) > 8 * len(branches) > 0
    # It looks again after 5, 10 s and so on; between that there is nothing.
    assert len({int(at // 2) for at in branches}) <= 5
    assert p99(full) < 1.03 * p99(plain)
