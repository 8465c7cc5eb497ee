"""Greedy drafts verified by the upstream's scores: what is accepted, and that the bytes stay the plain ones."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.server.sidecar.events import Piece
from specdec.server.sidecar.rounds import Rounds
from specdec.server.sidecar.splice import Guess, StreamBroken
from specdec.server.sidecar.verify import Verdict, judge, read_verdict, verify_request
from tests.server.sidecar.recital import ANSWER, PROBE, PROMPT, Reciter, Words, accelerated, asking, both, counts
from tests.server.sidecar.rig import exchange

DRAFT = [4, 5, 6]
GOOD = [{4: -0.1, 9: -3.0}, {5: -0.2, 9: -2.0}, {6: -0.3, 9: -2.5}]


def test_the_longest_beginning_that_alone_scores_highest_is_accepted():
    assert judge(GOOD, DRAFT, 8) == Verdict((4, 5, 6, 8), 3)
    assert judge(GOOD, DRAFT, None) == Verdict((4, 5, 6), 3)
    assert judge([GOOD[0], {5: -2.0, 9: -0.2}, GOOD[2]], DRAFT, 8) == Verdict((4, 9), 1)


@pytest.mark.parametrize(
    "row",
    [None, {}, {5: -0.2}, {8: -0.1, 9: -2.0}, {5: -0.7, 9: -0.7}, {5: -9999.0, 9: -9999.0}, {5: float("nan"), 9: -1.0},
     {5: 0.4, 9: -1.0}, {5: -0.2, 9: -0.1, 3: -0.1}, {5: -0.01, 9: -0.02}],
)  # fmt: skip
def test_a_row_in_doubt_ends_what_is_accepted_and_tells_no_token(row):
    assert judge([GOOD[0], row, GOOD[2]], DRAFT, 8) == Verdict((4,), 1)


def vllm_rows(rows):
    return [None if row is None else {str(i): {"logprob": p, "rank": r, "decoded_token": "x"}
                                      for r, (i, p) in enumerate(row.items(), 1)} for row in rows]  # fmt: skip


def test_the_wire_format_of_vllm():
    route, body = verify_request("generate", "m", [1, 2], DRAFT, salt="s", has_start=False)
    sent = json.loads(body)
    assert route == "/inference/v1/generate"
    assert (sent["token_ids"], sent["cache_salt"]) == ([1, 2, *DRAFT], "s")
    assert sent["sampling_params"] == {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 2,
                                       "skip_reading_prefix_cache": False, "detokenize": False}  # fmt: skip
    choice = {"index": 0, "token_ids": [8], "finish_reason": "length"}

    def read(rows, cached, way="generate"):
        usage = {"prompt_tokens": 5, "prompt_tokens_details": None if cached is None else {"cached_tokens": cached}}
        own = {"choices": [{**choice, "prompt_logprobs": rows}]} if way == "completions" else {
            "choices": [choice], "prompt_logprobs": rows}  # fmt: skip
        return read_verdict(way, json.dumps({**own, "usage": usage}).encode(), 2, DRAFT)

    every = vllm_rows([None, {2: -1.0, 3: -2.0}, *GOOD])
    right = Verdict((4, 5, 6, 8), 3)
    assert read(every, 0) == right
    assert read(vllm_rows([None, *GOOD]), 1) == right  # rows that were computed only, counted from the end
    assert read(vllm_rows([None, *GOOD[1:]]), 2) is None  # the draft itself was cached, and has no rows
    assert read(every, 3) is None  # there, but nobody computed them
    assert read(every, None) is None  # nobody says whether they were computed
    assert read(every, None, "completions") == right  # that route computes all of them
    assert read([], 0) is None
    assert read_verdict("generate", b"{half", 2, DRAFT) is None


def test_the_wire_format_of_sglang():
    route, body = verify_request("sglang", "m", [1, 2], DRAFT, salt="s", has_start=False)
    sent = json.loads(body)
    assert route == "/generate"
    assert (sent["input_ids"], sent["logprob_start_len"], sent["extra_key"]) == ([1, 2, *DRAFT], 1, "s")
    own = [[None, 2, None], [-0.1, 4, None], [-0.2, 5, None], [-0.3, 6, None]]
    top = [None, [[-0.1, 4, None], [-3.0, 9, None]], [[-0.2, 5, None], [-2.0, 9, None]],
           [[-0.3, 6, None], [-2.5, 9, None]]]  # fmt: skip

    def read(own, top):
        meta = {"input_token_logprobs": own, "input_top_logprobs": top}
        return read_verdict("sglang", json.dumps({"output_ids": [8], "meta_info": meta}).encode(), 2, DRAFT)

    assert read(own, top) == Verdict((4, 5, 6, 8), 3)
    rejected = [*own[:2], [-1.2, 5, None], own[3]]
    assert read(rejected, [*top[:2], [[-0.5, 9, None], [-1.2, 5, None]], top[3]]) == Verdict((4, 9), 1)
    assert read(own, [*top[:2], None, top[3]]) == Verdict((4,), 1)
    assert read([*own[:2], [-0.2, 3, None], own[3]], top) is None  # of other tokens than were asked about
    assert read(own[1:], top[1:]) is None


# --- the law ----------------------------------------------------------------------------------------------------------

V, N = 3, 5


def scores(context):
    a, b = (*(V,) * 2, *context)[-2:]
    x = np.random.default_rng(100 * a + b).normal(size=V) * 1.5
    if (a, b) == (V, 0):
        x[:2] = x.max() + 1  # a tie, of which the server's own steps take the first
    return x - np.log(np.exp(x).sum())


def greedy(context):
    return int(np.argmax(scores(context)))


class Decoded:
    """A greedy stream of events of one or two tokens."""

    def __init__(self, at, *, pace, joins=1, breaks_at=None, say=greedy):
        self.context, self.pace, self.joins, self.breaks_at, self.say = list(at), pace, joins, breaks_at, say

    async def next(self):
        for _ in range(self.pace):
            await asyncio.sleep(0)
        if len(self.context) >= N:
            return None
        if self.breaks_at is not None and len(self.context) >= self.breaks_at:
            raise StreamBroken("scripted")
        ids = []
        while len(ids) < self.joins and len(self.context) < N:
            ids.append(self.say(self.context))
            self.context.append(ids[-1])
        end = "length" if len(self.context) == N else None
        return Piece(token_ids=tuple(ids), text="x" * len(ids), finish_reason=end)

    async def close(self):
        pass


def spoken(draft, *, base, fresh, delay, rule=judge, fails=()):
    """What the client gets, and what became of drafts."""
    results, told = [], []

    class Opener:
        count = 0

        async def open(self, output):
            self.count += 1
            if self.count in fails:
                raise StreamBroken("scripted")
            return Decoded(output, **fresh)

    class Accounts:
        seen = 0

        def extend(self, ids):
            self.seen += len(ids)

        def guess(self):
            ids = draft[: N - self.seen - 1]
            return Guess(tuple(ids), (len(ids),)) if ids else Guess()

        def ended(self, result, **_):
            results.append(result)

    async def verify(output, ids):
        for _ in range(delay):
            await asyncio.sleep(0)
        context, rows = list(output), []
        for token in ids:
            rows.append(dict(enumerate(scores(context))))
            context.append(token)
        return rule(rows, ids, greedy(context))

    async def main():
        out = []
        rounds = Rounds(
            Decoded((), **base), Opener(), Accounts(), verify=verify, contradicted=lambda: told.append(1),
            show=lambda ids: [Piece(token_ids=(i,), text="x") for i in ids[: max(0, N - 1 - len(out))]],
            split=lambda piece, n: Piece(token_ids=piece.token_ids[:n], text="x" * n), is_worth=lambda n: True,
        )  # fmt: skip
        async for spliced in rounds.pieces():
            assert len(spliced.piece.text) == len(spliced.piece.token_ids)
            out += spliced.piece.token_ids
        return out

    return asyncio.run(main()), results, bool(told)


def plain():
    context = []
    while len(context) < N:
        context.append(greedy(context))
    return context


CASES = list(itertools.product([1, 3], [1, 2], [0, 2, 6], [1, 5]))


def every(**more):
    """All drafts of up to three tokens at all paces."""
    got, results, told = Counter(), Counter(), 0
    for length in (1, 2, 3):
        for draft in itertools.product(range(V), repeat=length):
            for pace, joins, delay, fresh in CASES:
                out, ended, contradicted = spoken(
                    list(draft), base={"pace": pace, "joins": joins}, fresh={"pace": fresh}, delay=delay, **more
                )
                got[tuple(out)] += 1
                results.update(ended)
                told += contradicted
    return got, results, told


def test_every_draft_at_every_pace_gives_the_one_greedy_text():
    got, results, told = every()
    assert set(got) == {tuple(plain())}
    assert not told
    assert {"adopted", "miss", "late"} <= set(results)


def test_continuations_that_fail_leave_the_clients_own_stream():
    assert set(every(fails={1})[0]) == {tuple(plain())}
    assert set(every(fails={1, 2})[0]) == {tuple(plain())}
    for breaks_at in (2, 3, 4):  # the client's own stream breaks while it is ahead of it, or everything does
        for pace, joins, delay, fresh in CASES:
            base = {"pace": pace, "joins": joins, "breaks_at": breaks_at}
            try:
                out = spoken(plain()[1:4], base=base, fresh={"pace": fresh}, delay=delay)[0]
            except StreamBroken:
                continue
            assert out == plain()


def test_a_rule_that_takes_ties_or_runners_up_does_not_give_that_text():
    def second_best(rows, draft, bonus):
        said = list(
            itertools.takewhile(lambda x: x[1] in sorted(x[0], key=x[0].get)[-2:], zip(rows, draft, strict=True))
        )
        return Verdict(tuple(token for _, token in said), len(said))

    got, _, told = every(rule=second_best)
    assert set(got) != {tuple(plain())}
    assert told  # and the streams say so


# --- over sockets -----------------------------------------------------------------------------------------------------


class Scorer(Reciter):
    """Also scores prompts; ``score_traps``: number of the verification -> what is wrong with it."""

    def __init__(self, score_traps=None, *, scale_out=False, is_wrong=False, **more):
        super().__init__(**more)
        self.score_traps, self.scale_out, self.is_wrong = score_traps or {}, scale_out, is_wrong
        self.verifications = 0

    async def __call__(self, asked, writer):
        body = asked.json if asked.method == "POST" else {}
        is_generate = asked.target == "/inference/v1/generate"
        if not is_generate and "prompt_logprobs" not in body:
            return await super().__call__(asked, writer)
        if is_generate and not self.scale_out:
            return self.whole(writer, {"error": "Scale-out endpoints are disabled"}, status=403)
        ids = body["token_ids"] if is_generate else body["prompt"]
        trap = None
        if len(ids) > len(PROMPT) + PROBE:
            self.verifications += 1
            trap = self.score_traps.get(self.verifications, self.score_traps.get(0))
        if trap is not None:
            self.unopened += 1  # whether or not the sidecar takes it for an answer
        if trap == "hang up":
            return writer.close()
        if trap in ("429", "503", "400"):
            return self.whole(writer, {"error": trap}, status=int(trap))
        if trap == "slow":
            await asyncio.sleep(60)
        if trap == "half":
            writer.write(b'HTTP/1.1 200 X\r\nContent-Length: 9\r\n\r\n{"choices')
            return None
        rows = [None, *(self.row(ids[:at], ids[at], trap) for at in range(1, len(ids)))]
        rows = rows[:-3] if trap == "missing" else [] if trap == "none" else rows
        choice = {"index": 0, "token_ids": [self.next(ids)], "finish_reason": "length"}
        own = {"prompt_logprobs": rows} if is_generate else {}
        usage = {"prompt_tokens": len(ids), "prompt_tokens_details": {"cached_tokens": 0}}
        return self.whole(writer, {"choices": [choice if own else {**choice, "prompt_logprobs": rows}], **own,
                                   "usage": usage})  # fmt: skip

    def next(self, ids):
        done = len(ids) - len(PROMPT)
        right = ids[len(PROMPT) :] == self.answer[:done]
        token = self.answer[done] if right and 0 <= done < len(self.answer) else 7
        return 9 if self.is_wrong and done > 40 else token

    def row(self, ids, token, trap):
        if trap == "null":
            return None
        best, listed = self.next(ids), -3.0
        top = {"-9999": -9999.0, "positive": 2.5}.get(trap, -0.1)
        row = {best: (top, 1), (8 if best != 8 else 9): (top if trap == "tie" else listed, 2)}
        row.setdefault(token, (-6.0, 40))
        if trap == "unnamed":
            row = {i + 1000: entry for i, entry in row.items()}
        return {str(i): {"logprob": p, "rank": r, "decoded_token": "x"} for i, (p, r) in row.items()}


def verified(server, raw=None, known=ANSWER):
    return accelerated(server, both(raw or asking()), mode="rounds", known=known, tokenizer=Words())


@pytest.mark.parametrize("scale_out", [False, True])
@pytest.mark.parametrize("shape", ["absent", "null"])
@pytest.mark.parametrize("more", [{}, {"messages": [{"role": "user", "content": "x"}]},
                                  {"stream_options": {"include_usage": True}}])  # fmt: skip
def test_a_verified_stream_has_the_plain_streams_bytes(more, shape, scale_out):
    server = Scorer(shape=shape, scale_out=scale_out)
    plain, got, sidecar, _ = verified(server, asking(**more))
    assert sidecar.speed.capabilities.verifies == ("generate" if scale_out else "completions")
    assert counts(sidecar).get("adopted", 0) >= 1, sidecar.health()
    assert got.body == plain.body
    assert got.is_whole
    assert sidecar.speed.fault is None


TRAPS = ["429", "503", "400", "hang up", "slow", "half", "missing", "none", "null", "tie", "-9999", "positive",
         "unnamed"]  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_scores_that_cannot_be_trusted_leave_the_plain_stream(trap):
    server = Scorer({0: trap})
    plain, got, sidecar, _ = verified(server)
    assert got.body == plain.body
    assert server.verifications >= 1
    assert "adopted" not in counts(sidecar)


@settings(max_examples=12)
@given(
    st.lists(st.integers(3, 60), max_size=3), st.integers(1, 4),
    st.dictionaries(st.integers(1, 3), st.sampled_from(TRAPS), max_size=2),
    st.dictionaries(st.integers(1, 2), st.sampled_from(["429", "reset", "garbage", "split", "hang up"]), max_size=2),
)  # fmt: skip
def test_whatever_is_known_and_goes_wrong_the_text_is_the_plain_one(errors, joins, score_traps, traps):
    known = [token if at not in errors else 5 for at, token in enumerate(ANSWER)]
    plain, got, sidecar, _ = verified(Scorer(score_traps, joins=joins, traps=traps), known=known)
    text = lambda got: "".join(  # noqa: E731
        c["text"] for e in got.body.split(b"data: ")[1:-1] for c in json.loads(e)["choices"])  # fmt: skip
    assert text(got) == text(plain)
    if joins == 1:
        assert got.body == plain.body
    assert sidecar.speed.fault is None


def test_scores_that_contradict_what_the_server_says_end_it_all():
    async def ask(url, up, sidecar):
        raw = asking(max_tokens=60)
        for _ in range(20):  # the client's own stream is heard only where it speaks before the continuation takes over
            await exchange(url, raw)
            if sidecar.speed.fault:
                break
        return sidecar, await exchange(url, raw), await exchange(up.url, raw)

    sidecar, second, plain = accelerated(
        Scorer(is_wrong=True, lag=3000), ask, mode="rounds", known=[*ANSWER[:41], *[9] * 79], tokenizer=Words()
    )
    assert "scores" in (sidecar.speed.fault or "")
    assert second.body == plain.body


def test_a_server_without_right_scores_and_requests_that_are_not_greedy_are_relayed():
    plain, got, sidecar, up = verified(Reciter())  # it answers verification with an ordinary stream
    assert sidecar.speed.capabilities.verifies is None
    assert got.body == plain.body
    for more in ({"temperature": 0.7}, {"logit_bias": {"5": 1}}):
        plain, got, sidecar, up = verified(Scorer(), asking(**more))
        assert got.body == plain.body
        assert "scores verify greedy" in next(iter(sidecar.speed.refused))
