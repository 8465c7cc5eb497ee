"""A sidecar before a real server: the tiny model behind sockets, greedy, sampled and chatting."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest

from specdec.server.sidecar.app import Sidecar
from specdec.server.sidecar.options import RelayOptions
from specdec.server.sidecar.plan import PlanOptions
from specdec.server.sidecar.service import SpeedOptions
from specdec.server.sidecar.tokens import Tokens
from tests.server.live import running, service, tokenizer
from tests.server.sidecar.recital import ROOMY, counts, steady
from tests.server.sidecar.rig import exchange, front, request

EAGER = PlanOptions(max_branches=2, max_draft=48, min_segment=4, min_probability=0.05, min_gain_s=0.0)


@pytest.fixture(scope="module")
def plain():
    with running(service(drafters=("none",))) as live:
        yield live


def through(plain, raws, *, mode="grid"):
    """Answers of the server itself and of a sidecar before it, and the sidecar."""

    async def main():
        speed = SpeedOptions(mode=mode, plan=EAGER, budget=ROOMY, is_single_tenant=True)
        sidecar = Sidecar(RelayOptions(plain.url), speed, tokens=Tokens(tokenizer()))
        async with front(sidecar) as url:
            steady(sidecar, open_s=0.0)
            pairs = [(await exchange(plain.url, raw), await exchange(url, raw)) for raw in raws]
            for _ in range(60):  # whether a branch is open in time is the machine's matter: until one was
                if counts(sidecar).get("adopted"):
                    break
                pairs.append((pairs[0][0], await exchange(url, raws[0])))
            pairs.append((await exchange(plain.url, raws[-1]), await exchange(url, raws[-1])))
            health = json.loads((await exchange(url, request(method="GET", target="/health"))).body)
        return pairs, sidecar, health

    return asyncio.run(main())


def text_of(got):
    events = [json.loads(event) for event in got.body.split(b"data: ")[1:] if event.strip() != b"[DONE]"]
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice.get("text") or (choice.get("delta") or {}).get("content") or "" for choice in choices)
    return text, [choice["finish_reason"] for choice in choices if choice["finish_reason"]]


def asking(**more):
    target = "/v1/chat/completions" if "messages" in more else "/v1/completions"
    body = {"max_tokens": 60, "stream": True, "temperature": 0, **more}
    return request(body, target=target, headers=("Content-Type: application/json",))


def test_the_real_server_is_recognised_and_its_texts_stay_what_they_are(plain):
    usage = {"stream_options": {"include_usage": True}}
    raws = [
        *[asking(prompt="abcabcabc")] * 3,
        asking(prompt="hello hello", seed=3, temperature=0.8),
        asking(prompt="hello hello", seed=3, temperature=0.8),
        *[asking(messages=[{"role": "user", "content": "again and again"}])] * 3,
        asking(prompt="abcabcabc", **usage),
    ]
    pairs, sidecar, health = through(plain, raws)
    able = health["speed"]["capabilities"]
    assert (able["kind"], able["has_ids"], able["continues"], able["is_keyed"]) == ("specdec", True, True, True)
    assert able["waiting_metric"] == "specdec:num_requests_waiting"
    for direct, got in pairs:
        assert text_of(got) == text_of(direct)
        assert b"token_ids" not in got.body
    assert counts(sidecar).get("adopted"), health["speed"]
    last = [json.loads(event) for event in pairs[-1][1].body.split(b"data: ")[1:-1]][-1]
    direct = [json.loads(event) for event in pairs[-1][0].body.split(b"data: ")[1:-1]][-1]
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [last["usage"][name] for name in names] == [direct["usage"][name] for name in names]
    assert last["usage"]["prompt_tokens_details"]["cached_tokens"] <= last["usage"]["prompt_tokens"]
    plain.wait_idle()


def test_the_official_client_does_not_notice(plain):
    async def main():
        speed = SpeedOptions(mode="race", plan=EAGER, budget=ROOMY)
        async with front(Sidecar(RelayOptions(plain.url), speed, tokens=Tokens(tokenizer()))) as url:
            client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="k", max_retries=0)
            async with client:
                models = [model.id async for model in client.models.list()]
                stream = await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=20, stream=True, temperature=0
                )
                streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
                whole = await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=20, temperature=0
                )
                with pytest.raises(openai.BadRequestError):
                    await client.completions.create(model="tiny", prompt="x", temperature=-1)
        return models, streamed, whole.choices[0].message.content

    models, streamed, whole = asyncio.run(main())
    assert models == ["tiny"]
    assert streamed == whole


def test_what_passes_is_learned_and_estimated_by_tenant(plain):
    async def main():
        sidecar = Sidecar(RelayOptions(plain.url), SpeedOptions(plan=EAGER), tokens=Tokens(tokenizer()))
        async with front(sidecar) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
            sidecar.speed.shop.timing.open_s = 0.0
            body = {"prompt": "abcabcabc", "max_tokens": 60, "stream": True, "temperature": 0}
            for key in ("a", "a", "a", "b", None):
                headers = {"Authorization": f"Bearer {key}"} if key else {}
                (await client.post("/v1/completions", json=body, headers=headers)).raise_for_status()
                await sidecar.speed.learner.idle()
            health = (await client.get("/health")).json()
            cache = sidecar.speed.shop.cache
            return health, {tenant: len(index.responses) for tenant, index in cache.tenants.items()}, str(vars(sidecar))

    health, sizes, dump = asyncio.run(main())
    assert sorted(sizes.values()) == [0, 1, 3]  # nobody's, b's, a's: and the one without a key is nowhere
    assert "Bearer" not in dump
    shadow = health["speed"]["shadow"]
    assert shadow["answers"] == 4
    assert 0 < shadow["saved_seconds"]["race"] < shadow["plain_seconds"]


def test_a_repeated_greedy_request_is_answered_from_memory(plain):
    async def main():
        speed = SpeedOptions(cache_ttl_s=60, is_single_tenant=True)
        sidecar = Sidecar(RelayOptions(plain.url), speed)
        async with front(sidecar) as url:
            raw = asking(prompt="abc", max_tokens=8)
            first, second = await exchange(url, raw), await exchange(url, raw)
            hits = sidecar.metrics.cache_hits._value.get()
            drawn = asking(prompt="abc", max_tokens=8, temperature=1)
            await exchange(url, drawn)
            await exchange(url, drawn)
        return first, second, hits, sidecar.metrics.cache_hits._value.get()

    first, second, hits, after = asyncio.run(main())
    assert first.body == second.body
    assert (hits, after) == (1, 1)
