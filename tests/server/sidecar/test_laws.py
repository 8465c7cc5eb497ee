"""The law of what a client gets, enumerated: every random draw of every stream, over the real splicer.

The streams are scripted, so every draw is made by an oracle that walks through all outcomes with their probabilities.
The exact rules give the plain stream's law to the last bit; recipes that are known to be biased fail the same test.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict

import numpy as np
import pytest

from specdec.server.sidecar.events import Piece
from specdec.server.sidecar.splice import Guess, Splicer, StreamBroken

V, N = 3, 4
EXACT = 1e-12


def law(context):
    """The processed law of the next token: temperature 0.7 and top-p 0.9 over scores that depend on the last two."""
    a, b = (*(V,) * 2, *context)[-2:]
    scores = np.random.default_rng(100 * a + b).normal(size=V) * 1.5
    p = np.exp(scores / 0.7 - (scores / 0.7).max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    keep = order[: int(np.searchsorted(np.cumsum(p[order]), 0.9)) + 1]
    q = np.zeros(V)
    q[keep] = p[keep]
    return q / q.sum()


class Oracle:
    """Makes every draw; run after run it goes through all outcomes, depth first."""

    def __init__(self):
        self.path, self.at, self.weight = [], 0, 1.0

    def draw(self, p):
        support = [int(x) for x in np.flatnonzero(p)]
        if self.at == len(self.path):
            self.path.append([support, 0])
        support, index = self.path[self.at]
        self.at += 1
        self.weight *= float(p[support[index]])
        return support[index]

    def advance(self):
        self.at, self.weight = 0, 1.0
        while self.path and self.path[-1][1] + 1 == len(self.path[-1][0]):
            self.path.pop()
        if self.path:
            self.path[-1][1] += 1
        return bool(self.path)


def is_over(context):
    """Token 2 ends an output, unless it is the first; so do N tokens."""
    return len(context) >= N or (len(context) > 1 and context[-1] == 2)


def alone(context, token, following):
    return False


class Scripted:
    """A stream that draws its tokens as they are asked for; ``pace`` turns of the event loop per token.

    ``joins(context, token, following)``: the following token comes in the same event.
    """

    def __init__(self, oracle, context, *, pace=1, joins=alone, breaks_at=None, shared=None):
        self.oracle, self.context, self.pace, self.joins = oracle, list(context), pace, joins
        self.breaks_at, self.shared, self.held = breaks_at, shared, None

    def _draw(self):
        p = law(self.context)
        if self.shared is not None:  # the same uniform number for the first draw of every stream: a copied seed
            cells = self.shared["cells"]
            if "u" not in self.shared:
                self.shared["u"] = cells[self.oracle.draw(np.diff([0, *cells]))] - 1e-9
            token, self.shared = int(np.searchsorted(np.cumsum(p), self.shared["u"])), None
        else:
            token = self.oracle.draw(p)
        self.context.append(token)
        return token

    async def next(self):
        for _ in range(self.pace):
            await asyncio.sleep(0)
        if self.held is None and is_over(self.context):
            return None
        if self.breaks_at is not None and len(self.context) >= self.breaks_at:
            raise StreamBroken("scripted")
        ids = [self._draw() if self.held is None else self.held]
        self.held = None
        while self.joins is not alone and not is_over(self.context):
            before = self.context[: len(self.context) - 1]
            self.held = self._draw()
            if not self.joins(before, ids[-1], self.held):
                break
            ids.append(self.held)
            self.held = None
        is_last = self.held is None and is_over(self.context)
        return Piece(token_ids=tuple(ids), text="x" * len(ids), finish_reason="stop" if is_last else None)

    async def close(self):
        pass


def exact_law():
    got = {}

    def go(context, weight):
        if is_over(context):
            got[context] = weight
            return
        for token, p in enumerate(law(context)):
            if p:
                go((*context, token), weight * float(p))

    go((), 1.0)
    return got


class Accounts:
    """Drafts that may depend on everything the client has, and on nothing else."""

    def __init__(self, offsets):
        self.offsets, self.seen, self.results = offsets, [], []

    def extend(self, ids):
        self.seen += ids

    def guess(self):
        draft = list(self.seen)
        for _ in range(max(self.offsets)):
            draft.append(int(np.argmax(law(draft))))
        ids = tuple(draft[len(self.seen) :])
        offsets = tuple(x for x in self.offsets if len(self.seen) + x < N)
        return Guess(ids[: max(offsets, default=0)], offsets)

    def ended(self, result, *, num_ready, num_wasted):
        self.results.append(result)


def cut(piece, n):
    return Piece(token_ids=piece.token_ids[:n], text="x" * n)


def enumerated(offsets, *, splicer=Splicer, split=cut, base=None, branch=lambda count: {}, fails=(), shared=False):
    """TV distance of the spliced law from the plain one, and what became of branches."""
    exact, got, results = exact_law(), defaultdict(float), set()
    oracle = Oracle()
    contexts = [(), *((i,) for i in range(V)), *itertools.product(range(V), repeat=2)]
    cells = sorted({round(float(x), 12) for context in contexts for x in np.cumsum(law(context))} - {1.0}) + [1.0]

    async def one():
        common = {"cells": cells} if shared else None
        count = itertools.count(1)

        class Opener:
            async def open(self, output):
                number = next(count)
                if number in fails:
                    raise StreamBroken("scripted")
                return Scripted(oracle, output, shared=common, **branch(number))

        accounts = Accounts(offsets)
        made = splicer(Scripted(oracle, (), shared=common, **(base or {})), Opener(), accounts, split=split)
        out = []
        async for spliced in made.pieces():
            out += spliced.piece.token_ids
        results.update(accounts.results)
        return tuple(out)

    async def every():
        for _ in range(200_000):
            ids = await one()
            got[ids] += oracle.weight
            if not oracle.advance():
                return
        raise AssertionError("too many outcomes")

    asyncio.run(every())
    assert sum(got.values()) == pytest.approx(1)
    return 0.5 * sum(abs(got[ids] - exact.get(ids, 0)) for ids in {*got, *exact}), results


@pytest.mark.parametrize(
    ("offsets", "options"),
    [
        ((1,), {}),  # a race
        ((2,), {}),
        ((2,), {"base": {"pace": 3}}),  # the branch is done before the base stream
        ((1,), {"branch": lambda count: {"pace": 4}}),  # the branch is behind
        ((1, 2), {"base": {"pace": 2}}),  # a grid of segments of one token
        ((1, 2, 3), {"branch": lambda count: {"pace": 2}}),
    ],
)
def test_race_and_grid_have_the_plain_law(offsets, options):
    distance, results = enumerated(offsets, **options)
    assert distance < EXACT
    assert "adopted" in results
    assert "miss" in results


def test_failures_at_any_time_keep_the_law():
    for fails in ({1}, {2}, {1, 3}):
        assert enumerated((1, 2), fails=fails)[0] < EXACT
    # A branch that breaks after the base stream was let go is continued once more.
    distance, results = enumerated((1,), branch=lambda count: {"breaks_at": 2} if count == 1 else {})
    assert distance < EXACT
    assert "adopted" in results


def after_a_hit(context, token, following):
    """An upstream that speculates itself: what follows a token that it guessed comes with it."""
    return token == int(np.argmax(law(context)))


def before_a_runner_up(context, token, following):
    """An upstream whose events depend on what comes next: sent together with the second likeliest token."""
    return following == int(np.argsort(-law([*context, token]), kind="stable")[1])


@pytest.mark.parametrize("joins", [after_a_hit, before_a_runner_up])
def test_events_of_several_tokens_are_cut_where_the_branch_begins(joins):
    for offsets in ((1,), (2,), (1, 2)):
        distance, results = enumerated(offsets, base={"joins": joins, "pace": 3})
        assert distance < EXACT
        assert "adopted" in results


class FirstFinisher(Splicer):
    """Biased: the branch is taken only if it is done already, which short outputs are sooner."""

    def _took(self, piece):
        if self._branches:
            branch = self._branches[0]
            branch.is_open = bool(branch._queue.qsize()) and branch._task.done()
        super()._took(piece)


class Choosy(Splicer):
    """Biased: the branch is taken only if its next token looks likely."""

    def _took(self, piece):
        if self._branches:
            branch, reached = self._branches[0], (*self._output, *piece.token_ids)
            waiting = list(branch._queue._queue)
            branch.is_open = bool(waiting and waiting[0]) and waiting[0].token_ids[0] == int(np.argmax(law(reached)))
        super()._took(piece)


def test_known_biased_recipes_fail_the_same_test():
    assert enumerated((1,), shared=True)[0] > 0.02
    assert enumerated((1,), splicer=Choosy, base={"pace": 6})[0] > 0.02
    assert enumerated((1,), splicer=FirstFinisher, base={"pace": 3})[0] > 0.02
    uncut, results = enumerated((1,), base={"joins": before_a_runner_up, "pace": 3}, split=lambda piece, n: None)
    assert "uncut" in results
    assert uncut > 0.02


def logprob_law(accept, residual):
    """The law of 'accept a draft with p(x) from prompt log-probabilities, else ban it', for one draft of two tokens."""

    def raw(context):
        a, b = (*(V,) * 2, *context)[-2:]
        scores = np.random.default_rng(100 * a + b).normal(size=V) * 1.5
        p = np.exp(scores)
        return p / p.sum()

    got = defaultdict(float)

    def go(context, weight):
        if len(context) == 2:
            got[context] += weight
            return
        x = int(np.argmax(raw(context)))
        q = law(context)
        a = min(1.0, float((raw(context) if accept == "raw" else q)[x]))
        rest = q.copy()
        if residual == "banned":  # the nucleus is chosen anew among the others
            rest = raw(context) ** (1 / 0.7)
        rest[x] = 0
        go((*context, x), weight * a)
        for y in np.flatnonzero(rest):
            go((*context, int(y)), weight * (1 - a) * float(rest[y] / rest.sum()))

    go((), 1.0)
    exact = {(i, j): float(law(())[i] * law((i,))[j]) for i in range(V) for j in range(V)}
    return 0.5 * sum(abs(got[ids] - p) for ids, p in exact.items())


def test_logprob_acceptance_with_a_ban_is_biased_and_is_not_offered():
    assert logprob_law("raw", "banned") > 0.05
    assert logprob_law("processed", "banned") > 0.01
