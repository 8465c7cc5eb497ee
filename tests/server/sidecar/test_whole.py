"""Answers that are not streamed: put together from an accelerated stream, with the bytes that the upstream writes."""

from __future__ import annotations

import json

import pytest

from specdec.server.sidecar.whole import Misfit, Parts, WholeShape
from tests.server.sidecar.recital import ANSWER, Reciter, Words, accelerated, asking, both, counts
from tests.server.sidecar.rig import exchange
from tests.server.sidecar.test_rounds import Scorer

CHAT = {"messages": [{"role": "user", "content": "x"}]}


def posts(up):
    return [asked for asked in up.asked if asked.method == "POST"]


@pytest.mark.parametrize("mode", ["grid", "rounds"])
@pytest.mark.parametrize("more", [{}, CHAT, {"max_tokens": 60}])
def test_a_whole_answer_has_the_plain_answers_bytes(more, mode):
    raw = asking(stream=False, **more)
    plain, got, sidecar, _ = accelerated(Scorer(), both(raw), mode=mode, known=ANSWER, tokenizer=Words())
    assert counts(sidecar).get("adopted", 0) >= 1, sidecar.health()
    assert got.body == plain.body
    assert dict(got.headers)["Content-Type"].startswith("application/json")
    count = json.loads(got.body)["usage"]
    assert (count["prompt_tokens"], count["completion_tokens"]) == (3, more.get("max_tokens", 120))


@pytest.mark.parametrize("trap", ["429", "503", "reset", "short", "garbage", "split", "slow", "no done", "hang up"])
def test_what_goes_wrong_with_a_branch_does_not_reach_the_client(trap):
    server = Reciter(traps={1: trap, 2: trap})
    plain, got, _, _ = accelerated(server, both(asking(stream=False)), known=ANSWER)
    assert got.body == plain.body
    assert server.continuations >= 1


class Odd(Reciter):
    """What it says in streams does not fit its whole answers, once the probe is over."""

    def event(self, body, some, done, **more):
        event = super().event(body, some, done, **more)
        if body["max_tokens"] > 8 and "delta" in event["choices"][0]:
            event["choices"][0]["delta"]["reasoning"] = "hm"
        elif body["max_tokens"] > 8:
            event.pop("model")
        return event


@pytest.mark.parametrize("more", [{}, CHAT])
def test_what_does_not_fit_is_asked_for_again_as_the_client_did(more):
    async def ask(url, up, sidecar):
        raw = asking(stream=False, max_tokens=60, **more)
        plain, before = await exchange(up.url, raw), len(up.asked)
        return plain, await exchange(url, raw), posts(up)[-1], len(up.asked) - before

    plain, got, last, count = accelerated(Odd(), ask, known=None)
    assert got.body == plain.body
    assert count == 2
    assert "return_token_ids" not in last.json
    assert last.json["stream"] is False


class Varying(Reciter):
    """Its whole answers hold something that its streams do not tell."""

    numbers = 0

    def answered(self, body, done):
        self.numbers += 1
        return {**super().answered(body, done), "took_ms": self.numbers}


def test_an_upstream_whose_whole_answers_hold_more_is_relayed():
    async def ask(url, up, sidecar):
        before = len(up.asked)
        await exchange(url, asking(stream=False))
        return up.asked[before:], sidecar

    asked, sidecar = accelerated(Varying(), ask, known=ANSWER)
    (one,) = asked
    assert one.json["stream"] is False
    assert sidecar.speed.capabilities.wholes == {}
    assert sidecar.speed.refused == {"the answer is not streamed": 1}


def test_shapes_that_cannot_be_written_again_are_no_shapes():
    good = {"id": "x", "created": 1, "model": "m", "choices": [{"text": "a", "finish_reason": "stop"}], "usage": {}}
    for raw in (b"", b"[]", json.dumps({**good, "choices": []}).encode(), json.dumps(good, indent=1).encode(),
                json.dumps({**good, "choices": [{"text": None}]}).encode()):  # fmt: skip
        with pytest.raises(Misfit):
            WholeShape.learned("text", raw)
    with pytest.raises(Misfit):
        WholeShape.learned("text", json.dumps(good).encode()).write(Parts())
