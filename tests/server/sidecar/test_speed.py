"""Acceleration over sockets: the client's bytes are those of the plain stream, whatever branches do."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.sidecar.recital import ANSWER, Reciter, accelerated, asking, both, counts, say
from tests.server.sidecar.rig import exchange, until


@pytest.mark.parametrize("shape", ["absent", "null"])
@pytest.mark.parametrize("more", [{}, {"messages": [{"role": "user", "content": "x"}]},
                                  {"stream_options": {"include_usage": True}}])  # fmt: skip
def test_a_spliced_stream_has_the_plain_streams_bytes(more, shape):
    plain, got, sidecar, _ = accelerated(Reciter(shape=shape), both(asking(**more)), known=ANSWER)
    assert counts(sidecar).get("adopted", 0) >= 2, sidecar.health()
    assert got.body == plain.body
    assert got.is_whole


def test_usage_and_length_are_the_clients_own():
    raw = asking(max_tokens=60, stream_options={"include_usage": True})
    server = Reciter(answer=ANSWER)
    plain, got, sidecar, up = accelerated(server, both(raw), known=ANSWER)
    assert got.body == plain.body
    assert counts(sidecar)["adopted"] >= 1
    assert json.loads(got.body.split(b"data: ")[-2])["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 60, "total_tokens": 63,
    }  # fmt: skip


@pytest.mark.parametrize(
    "trap", ["429", "503", "400", "reset", "short", "garbage", "split", "slow", "no done", "hang up"]
)
@pytest.mark.parametrize("number", [1, 2])
def test_what_goes_wrong_with_a_branch_does_not_reach_the_client(trap, number):
    server = Reciter(traps={number: trap})
    plain, got, sidecar, up = accelerated(server, both(asking()), known=ANSWER)
    # An upstream that forgets its [DONE] forgets it for whoever reads it.
    ends = (b"", b"data: [DONE]\n\n") if trap == "no done" else (b"",)
    assert any(got.body + end == plain.body for end in ends)
    assert got.is_whole
    assert server.continuations >= 1


@settings(max_examples=12)
@given(
    st.lists(st.integers(3, 60), max_size=3),
    st.integers(1, 4),
    st.dictionaries(st.integers(1, 4), st.sampled_from(["429", "reset", "garbage", "split", "slow"]), max_size=3),
    st.integers(0, 9),
)
def test_whatever_is_known_and_goes_wrong_the_bytes_are_the_plain_streams(errors, joins, traps, lag):
    known = [token if at not in errors else 5 for at, token in enumerate(ANSWER)]
    server = Reciter(joins=joins, traps=traps, lag=lag)
    plain, got, _, up = accelerated(server, both(asking()), known=known)
    ids = lambda got: [json.loads(e)["choices"] for e in got.body.split(b"data: ")[1:-1]]  # noqa: E731
    text = lambda got: "".join(c[0]["text"] for c in ids(got) if c)  # noqa: E731
    assert text(got) == text(plain) == say(ANSWER)
    if joins == 1:
        assert got.body == plain.body


@pytest.mark.parametrize(
    "more",
    [{"presence_penalty": 0.5}, {"n": 2}, {"response_format": {"type": "json_object"}}, {"logprobs": 1},
     {"stop": ["x"]}, {"tools": [{"type": "function"}]}, {"unheard_of": 1}, {"prompt": ["a", "b"]},
     {"temperature": 0.7}, {"seed": 1, "temperature": 0.7}, {"frequency_penalty": True}],
)  # fmt: skip
def test_requests_whose_law_a_continuation_would_change_pass_as_they_are(more):
    async def ask(url, up, sidecar):
        before = len(up.asked)
        await exchange(url, asking(**more))
        return up.asked[before:], sidecar

    asked, sidecar = accelerated(Reciter(), ask, known=ANSWER)
    (one,) = asked
    assert "return_token_ids" not in one.json
    assert sum(sidecar.speed.refused.values()) == 1


def test_branches_that_fail_never_close_the_door_to_clients():
    async def ask(url, up, sidecar):
        return [await exchange(url, asking()) for _ in range(3)], sidecar

    server = Reciter(traps=dict.fromkeys(range(1, 1000), "hang up"))
    got, sidecar = accelerated(server, ask, known=ANSWER)
    assert counts(sidecar)["failed"] >= 6  # as many of clients' own would close it
    assert {one.status for one in got} == {200}
    assert sidecar.upstream.breaker.state == "closed"


def test_a_client_that_goes_away_leaves_no_branch_behind():
    async def ask(url, up, sidecar):
        await exchange(url, asking(), stop_after=3000)
        assert sidecar.speed.shop.budget.num_launched  # branches were under way
        await until(lambda: not up.alive and not sidecar.num_in_flight)
        return up, sidecar

    up, sidecar = accelerated(Reciter(traps=dict.fromkeys(range(1, 100), "slow")), ask, known=ANSWER)
    assert not sidecar.speed.shop.cache.active_requests
    assert sidecar.speed.shop.budget._branches == {}


def test_the_clients_own_words_and_headers_decide():
    async def ask(url, up, sidecar):
        before = len(up.asked)
        raw = asking().replace(b"Host: client", b"Host: client\r\nX-Spec: off")
        await exchange(url, raw)
        learn = asking().replace(b"Host: client", b"Host: client\r\nX-Spec-Learn: off")
        await exchange(url, learn)
        await sidecar.speed.learner.idle()
        return up.asked[before:], sidecar.speed.shop.cache

    asked, cache = accelerated(Reciter(), ask, known=None)
    assert "return_token_ids" not in asked[0].json
    assert asked[1].json["return_token_ids"] is True
    assert not any(len(index.responses) for index in cache.tenants.values())
