"""Acceleration over sockets: the client's bytes are those of the plain stream, whatever branches do."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.server.sidecar.app import Sidecar
from specdec.server.sidecar.gates import BudgetOptions
from specdec.server.sidecar.options import RelayOptions
from specdec.server.sidecar.plan import PlanOptions
from specdec.server.sidecar.service import SpeedOptions
from tests.server.sidecar.rig import chunked, exchange, front, piece, request, sse, upstream

PROMPT = [1, 2, 3]
ANSWER = [10 + i % 90 for i in range(120)]  # a recitation: token i follows from the tokens before it
PLAN = PlanOptions(max_branches=3, max_draft=96, min_segment=4, min_probability=0.2, min_gain_s=0.0)
ROOMY = BudgetOptions(ratio=10.0, burst=100_000, max_branches=64, max_branches_per_tenant=64)


@dataclass
class Reciter:
    """A server of one text, with token ids: what it says is a function of the prompt's ids alone.

    Args:
        step_s: per event.
        joins: tokens per event of client's streams.
        trap: number of the continuation -> what goes wrong with it.
        shape: how `token_ids` look when nobody asks.
    """

    step_s: float = 0.004
    joins: int = 1
    traps: dict[int, str] = field(default_factory=dict)
    shape: str = "absent"
    answer: list[int] = field(default_factory=lambda: list(ANSWER))
    continuations: int = 0
    most: int = 0

    async def __call__(self, asked, writer):
        if asked.target == "/v1/models":
            return self.whole(writer, {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]})
        if asked.method == "GET":
            return self.whole(writer, {"version": "0.33.0"})
        body = asked.json
        prompt = body.get("prompt", PROMPT)
        prompt = PROMPT if isinstance(prompt, str) or not isinstance(prompt[0], int) else prompt
        done = len(prompt) - len(PROMPT)
        trap = None
        if done and body["max_tokens"] + done == len(self.answer):
            self.continuations += 1
            trap = self.traps.get(self.continuations)
        if trap == "hang up":
            return writer.close()
        if trap in ("429", "503", "400"):
            return self.whole(writer, {"error": trap}, status=int(trap))
        if trap == "slow":
            await asyncio.sleep(0.3)
        writer.write(chunked("200 OK", "Content-Type: text/event-stream"))
        await self.events(writer, body, done, trap)
        writer.write(b"0\r\n\r\n")

    def whole(self, writer, value, status=200):
        raw = json.dumps(value).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(raw)) + raw)

    async def events(self, writer, body, done, trap):
        ids = self.answer[done : done + body["max_tokens"]]
        if body.get("prompt", PROMPT)[len(PROMPT) :] != self.answer[:done]:
            ids = [7] * len(ids)  # behind what was never said comes something else
        is_chat, wants = "messages" in body, body.get("return_token_ids", False)
        step = self.joins if not done else 1
        for at in range(0, len(ids), step):
            await asyncio.sleep(self.step_s)
            if trap == "reset" and at > 3:
                return writer.transport.abort()
            if trap == "short" and at > 3:
                return None
            if trap == "garbage" and at == 3:
                writer.write(piece(b"data: {half\n\n"))
            some = ids[at : at + step]
            is_last = at + step >= len(ids)
            choice = {"index": 0, **({"delta": {"content": say(some)}} if is_chat else {"text": say(some)}),
                      "finish_reason": "length" if is_last else None}  # fmt: skip
            if wants or self.shape == "null":
                choice["token_ids"] = some if wants else None
                choice["prompt_token_ids"] = PROMPT + self.answer[:done] if wants and not at else None
            choice = {k: v for k, v in choice.items() if v is not None or self.shape == "null" or k == "finish_reason"}
            raw = sse({"id": "x", "created": 7, "choices": [choice], "é": 1})
            for part in (raw[:9], raw[9:]) if trap == "split" else (raw,):
                writer.write(piece(part))
                await writer.drain()
        if (body.get("stream_options") or {}).get("include_usage"):
            count = {"prompt_tokens": len(PROMPT) + done, "completion_tokens": len(ids)}
            usage = {**count, "total_tokens": sum(count.values())}
            writer.write(piece(sse({"id": "x", "created": 7, "choices": [], "usage": usage, "é": 1})))
        if trap != "no done":
            writer.write(piece(sse("[DONE]")))


def say(ids):
    return "".join(f"<{i}é🦎>" for i in ids)


def asking(**more):
    body = {"model": "m", "max_tokens": len(ANSWER), "stream": True, "temperature": 0, **more}
    if "messages" not in body:
        body.setdefault("prompt", PROMPT)
    target = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return request(body, target=target, headers=("Authorization: Bearer k", "Content-Type: application/json"))


def accelerated(server, ask, *, mode="grid", plan=PLAN, known=None, **options):
    async def main():
        async with upstream(server) as up:
            speed = SpeedOptions(mode=mode, plan=plan, budget=ROOMY, is_single_tenant=True, **options)
            sidecar = Sidecar(RelayOptions(up.url), speed)
            async with front(sidecar) as url:
                sidecar.speed.shop.timing.open_s = 0.004
                cache = sidecar.speed.shop.cache
                for number in range(3 if known is not None else 0):
                    cache.insert(f"k{number}", np.array([*PROMPT, *known], np.int32), tenant="single")
                return await ask(url, up, sidecar)

    return asyncio.run(main())


def both(raw):
    """The same request, plain and through the sidecar."""

    async def ask(url, up, sidecar):
        plain = await exchange(up.url, raw)
        return plain, await exchange(url, raw), sidecar, up

    return ask


def counts(sidecar):
    samples = next(iter(sidecar.metrics.attempts.collect())).samples
    return {s.labels["result"]: int(s.value) for s in samples if s.name.endswith("_total")}


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


@settings(max_examples=8)
@given(
    st.lists(st.integers(3, 60), max_size=3),
    st.integers(1, 4),
    st.dictionaries(st.integers(1, 4), st.sampled_from(["429", "reset", "garbage", "split", "slow"]), max_size=3),
)
def test_whatever_is_known_and_goes_wrong_the_bytes_are_the_plain_streams(errors, joins, traps):
    known = [token if at not in errors else 5 for at, token in enumerate(ANSWER)]
    server = Reciter(step_s=0.001, joins=joins, traps=traps)
    plain, got, _, up = accelerated(server, both(asking()), known=known)
    ids = lambda got: [json.loads(e)["choices"] for e in got.body.split(b"data: ")[1:-1]]  # noqa: E731
    text = lambda got: "".join(c[0]["text"] for c in ids(got) if c)  # noqa: E731
    assert text(got) == text(plain) == say(ANSWER)
    if joins == 1:
        assert got.body == plain.body


@pytest.mark.parametrize(
    "more",
    [{"presence_penalty": 0.5}, {"n": 2}, {"response_format": {"type": "json_object"}}, {"logprobs": 1},
     {"stop": ["x"]}, {"tools": [{"type": "function"}]}, {"unheard_of": 1}, {"stream": False}, {"prompt": ["a", "b"]},
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
        got = []
        # How many branches a stream opens is a matter of timing; six in a row of clients' own would close the door.
        while len(got) < 3 or (counts(sidecar).get("failed", 0) < 6 and len(got) < 60):
            got.append(await exchange(url, asking()))
        return got, sidecar

    server = Reciter(step_s=0.001, traps=dict.fromkeys(range(1, 1000), "hang up"))
    got, sidecar = accelerated(server, ask, known=ANSWER)
    assert counts(sidecar)["failed"] >= 6
    assert {one.status for one in got} == {200}
    assert sidecar.upstream.breaker.state == "closed"


def test_a_client_that_goes_away_leaves_no_branch_behind():
    async def ask(url, up, sidecar):
        await exchange(url, asking(), stop_after=900)
        for _ in range(100):
            await asyncio.sleep(0.01)
            if not up.alive and not sidecar.num_in_flight:
                break
        return up, sidecar

    up, sidecar = accelerated(Reciter(step_s=0.02), ask, known=ANSWER)
    assert (up.alive, sidecar.num_in_flight) == (0, 0)
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
