"""Drafts that are sent along, and checks of what acceleration gave."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from specdec.errors import ConfigError
from specdec.server.sidecar.app import Sidecar
from specdec.server.sidecar.corpora import CorpusFeeder
from specdec.server.sidecar.feed import Feeder
from specdec.server.sidecar.options import RelayOptions
from specdec.server.sidecar.requests import Asked
from specdec.server.sidecar.service import SpeedOptions
from specdec.server.sidecar.tokens import Tokens
from specdec.suffix_tree.cache import SuffixCache
from tests.server.live import running, service, tokenizer
from tests.server.sidecar.recital import ANSWER, Reciter, accelerated, asking, counts, prompt_of
from tests.server.sidecar.rig import exchange, front, request, upstream

CHAT = {"messages": [{"role": "user", "content": "again and again"}], "max_tokens": 40, "temperature": 0}


def asked(**more):
    return Asked("chat", {**CHAT, **more})


def feeder(kind="prediction", answer="the same words once more, every single time"):
    cache, tokens = SuffixCache(), Tokens(tokenizer())
    text = [*tokens.prompt_ids(asked()), *tokens.encode(answer)]
    for number in range(3):
        cache.insert(number, np.array(text, np.int32), tenant="t")
    return Feeder(kind, cache, tokens)


def test_what_was_answered_before_is_predicted_for_the_same_tenant_only():
    made = feeder()
    (prediction,) = made.fields(asked(), "t").values()
    assert prediction["type"] == "content"
    assert "the same words once more".startswith(prediction["content"][:20])
    assert made.fields(asked(), "u") == {}
    args = feeder("vllm-plugin").fields(asked(), "t")["vllm_xargs"]
    assert args["specdec_tenant"] == "t"
    assert tokenizer().decode(args["specdec_draft"]).startswith("the same words")


@pytest.mark.parametrize(
    "more", [{"prediction": {"type": "content", "content": "x"}}, {"tools": [{}]}, {"n": 2}, {"logprobs": True},
             {"presence_penalty": 1}, {"response_format": {"type": "json_object"}}],
)  # fmt: skip
def test_where_a_prediction_is_refused_or_the_clients_own_none_is_added(more):
    assert feeder().fields(asked(**more), "t") == {}


def test_a_tenant_whose_predictions_fail_is_left_alone_for_a_while():
    made = feeder()
    for _ in range(5):
        assert made.fields(asked(), "t")
        made.answered("t", b'{"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 40}')
    assert [bool(made.fields(asked(), "t")) for _ in range(40)].count(True) == 2
    made.answered("t", b'{"accepted_prediction_tokens": 100, "rejected_prediction_tokens": 4}')
    assert made.fields(asked(), "t")


def test_a_real_server_takes_what_is_fed_and_says_the_same():
    raw = request({**CHAT, "user": "u"}, target="/v1/chat/completions", headers=("Content-Type: application/json",))

    async def main(plain):
        speed = SpeedOptions(mode="feed", is_single_tenant=True)
        sidecar = Sidecar(RelayOptions(plain.url), speed, tokens=Tokens(tokenizer()))
        async with front(sidecar) as url:
            answers = []
            for _ in range(4):
                answers.append(json.loads((await exchange(url, raw)).body))
                await sidecar.speed.learner.idle()
            direct = json.loads((await exchange(plain.url, raw)).body)
        return direct, answers

    with running(service(drafters=("ngram",))) as plain:
        direct, answers = asyncio.run(main(plain))
    texts = {answer["choices"][0]["message"]["content"] for answer in (direct, *answers)}
    assert len(texts) == 1
    details = answers[-1]["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] >= 8
    assert "completion_tokens_details" not in answers[0]["usage"]


class Audited(Reciter):
    """Tells scores, and may lie in continuations or change its mind."""

    def __init__(self, *, lies=False, gap=1.0, changes=False):
        super().__init__()
        self.lies, self.gap, self.changes, self.count = lies, gap, changes, 0

    async def __call__(self, asked, writer):
        if asked.method == "POST" and asked.json.get("logprobs") == 2:
            top = [{"a": -0.1, "b": -0.1 - self.gap}]
            return self.whole(writer, {"choices": [{"logprobs": {"top_logprobs": top}}]})
        return await super().__call__(asked, writer)

    def text(self, body, done):
        if self.lies and done and body["max_tokens"] > 8:
            return ANSWER[: len(prompt_of(body))] + [9] * 200
        if self.changes and body["max_tokens"] == len(ANSWER):
            self.count += 1
            return ANSWER[:110] + [self.count % 3] * 10
        return super().text(body, done)


def verdicts(server):
    async def ask(url, up, sidecar):
        for _ in range(2):
            await exchange(url, asking())
            await asyncio.gather(*sidecar.speed._audits)
        health = json.loads((await exchange(url, request(method="GET", target="/health"))).body)
        return health["speed"], sidecar

    health, sidecar = accelerated(server, ask, known=ANSWER, audit_share=1.0)
    samples = next(iter(sidecar.metrics.audits.collect())).samples
    assert counts(sidecar).get("adopted")
    return {s.labels["result"]: int(s.value) for s in samples if s.name.endswith("_total")}, health


def test_an_honest_upstream_matches_and_stays_accelerated():
    found, health = verdicts(Audited())
    assert found == {"match": 2}
    assert health["fault"] is None


def test_a_difference_that_is_no_tie_ends_acceleration():
    found, health = verdicts(Audited(lies=True))
    assert found == {"fault": 1}  # the second request was not accelerated any more
    assert "audit" in health["fault"]
    assert sum(health["not_accelerated"].values()) == 1


def test_ties_and_an_upstream_that_differs_from_itself_are_no_fault():
    found, health = verdicts(Audited(lies=True, gap=0.001))
    assert set(found) == {"tie"}
    assert health["fault"] is None
    found, health = verdicts(Audited(changes=True))
    assert set(found) == {"unstable"}
    assert health["fault"] is None


class Corpora:
    """SGLang's routes for corpora, and a text."""

    def __init__(self, *, refuses=False):
        self.refuses, self.loaded, self.most = refuses, {}, 0

    async def __call__(self, asked, writer):
        body, status = asked.json if asked.method == "POST" else {}, 200
        said = {"success": True, "message": ""}
        if asked.target == "/add_external_corpus" and self.refuses:
            said, status = {"success": False, "message": "no budget"}, 400
        elif asked.target == "/add_external_corpus":
            self.loaded[body["corpus_id"]] = body["documents"]
            self.most = max(self.most, len(self.loaded))
        elif asked.target == "/remove_external_corpus":
            del self.loaded[body["corpus_id"]]
        elif asked.method == "POST":
            said = {"choices": [{"index": 0, "text": f"the answer to {body['prompt']}, " * 4, "finish_reason": "stop"}]}
        raw = json.dumps(said).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(raw)) + raw)


def fed_to_sglang(server, ask):
    async def main():
        async with upstream(server) as up:
            speed = SpeedOptions(mode="feed", feed="sglang-corpus", is_single_tenant=True, probe_key="admin")
            sidecar = Sidecar(RelayOptions(up.url), speed)
            async with front(sidecar) as url:
                for prompt in ("one", "two"):
                    await exchange(url, request({"prompt": prompt, "max_tokens": 4}))
                    await sidecar.speed.learner.idle()
                    await sidecar.speed.corpora.load()
                return await ask(sidecar, up)

    return asyncio.run(main())


def test_sglang_gets_one_corpus_of_what_was_answered_and_it_is_removed_at_the_end():
    server = Corpora()

    async def ask(sidecar, up):
        (documents,) = server.loaded.values()
        keys = {dict(one.headers).get("Authorization") for one in up.asked if "corpus" in one.target}
        return documents, keys, sidecar.health()["speed"]["corpus"]

    documents, keys, health = fed_to_sglang(server, ask)
    assert [text[:17] for text in documents] == ["the answer to one", "the answer to two"]
    assert keys == {"Bearer admin"}
    assert (health["loaded"], health["last_error"]) == (2, None)
    assert (server.most, server.loaded) == (2, {})


def test_a_corpus_that_is_refused_is_reported_and_nothing_else_suffers():
    async def ask(sidecar, up):
        return sidecar.health()["speed"]["corpus"]

    assert fed_to_sglang(Corpora(refuses=True), ask)["last_error"] == "/add_external_corpus: 400 no budget"


def test_a_corpus_stays_below_its_bound_and_needs_a_single_tenant():
    made = CorpusFeeder(None, None, max_chars=100)
    for number in range(9):
        made.take(str(number) * 40)
    assert list(made._texts) == ["7" * 40, "8" * 40]
    with pytest.raises(ConfigError, match="one tenant"):
        SpeedOptions(mode="feed", feed="sglang-corpus")
