"""The HTTP API against the official client and against the engine itself."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
import torch

from specdec.build import build_engine
from specdec.server.keys import Keyring, add_key
from specdec.types import Request, SamplingParams
from tests.server.live import EOS, Live, ServiceOptions, running, service, tokenizer
from tests.tiny_models import tiny_llama

PROMPT = "def add(a, b):\n    return a + b\n\n\ndef add("


def alone(prompt_ids, **sampling: Any) -> list[int]:
    """What the engine gives for one request by itself, without drafts."""
    with build_engine(tiny_llama(), "none", max_length=200) as engine:
        law = SamplingParams(stop_token_ids=(EOS,), **sampling)
        outputs = list(engine.generate([Request("r", np.asarray(prompt_ids), law)]))
    return [token for output in outputs for token in output.new_ids]


def complete(live: Live, **body: Any) -> dict[str, Any]:
    answer = live.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 24} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 40}])
@pytest.mark.parametrize(
    "speculative", [{}, {"enabled": False}, {"drafter": "suffix", "max_tokens": 3}, {"drafter": "none"}]
)
def test_a_completion_is_what_the_engine_gives_alone(live: Live, law: dict[str, Any], speculative: dict[str, Any]):
    choice = complete(live, **law, speculative=speculative, return_token_ids=True)["choices"][0]
    prompt_ids = tokenizer()(PROMPT)["input_ids"]
    assert choice["prompt_token_ids"] == prompt_ids
    assert choice["token_ids"] == alone(prompt_ids, max_new_tokens=24, **law)
    assert choice["text"] == tokenizer().decode([i for i in choice["token_ids"] if i != EOS])


def test_the_official_client_chats_and_streams_the_same_text(client: openai.OpenAI):
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "max_completion_tokens": 30,
        "temperature": 0.8,
        "seed": 11,
        "n": 2,
    }
    whole = client.chat.completions.create(**asked)
    texts = ["", ""]
    ends: dict[int, str] = {}
    usage = None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert whole.usage is not None
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_token_id_prompts_and_several_prompts(client: openai.OpenAI):
    ids = tokenizer()(PROMPT)["input_ids"]
    one = client.completions.create(model="tiny", prompt=ids, max_tokens=9, temperature=0)
    two = client.completions.create(model="tiny", prompt=[PROMPT, "x = "], max_tokens=9, temperature=0, n=2)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert one.choices[0].text == two.choices[0].text == two.choices[1].text
    assert two.usage is not None
    assert two.usage.prompt_tokens == len(ids) + len("x = ")
    assert two.usage.completion_tokens == 36


def test_a_stop_string_ends_the_text_and_is_not_shown(live: Live):
    bias = {str(token_id): 100 for token_id in tokenizer()("abcde")["input_ids"]}  # text of whole characters
    law = {"temperature": 1, "seed": 4, "logit_bias": bias}
    text = complete(live, **law)["choices"][0]["text"]
    stop = text[9:13]
    cut = text[: text.index(stop)]
    for stream in (False, True):
        body = {"prompt": PROMPT, "max_tokens": 24, "stop": [stop, "never"], "stream": stream} | law
        answer = live.post("/v1/completions", body)
        pieces = events(answer.text) if stream else [answer.json()]
        choices = [choice for piece in pieces for choice in piece["choices"]]
        assert "".join(choice["text"] for choice in choices) == cut
        assert choices[-1]["finish_reason"] == "stop"


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_log_probabilities_are_the_models_own(client: openai.OpenAI):
    done = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "abcabcabc"}], max_tokens=12, temperature=0.5, seed=3,
        logprobs=True, top_logprobs=3, extra_body={"return_token_ids": True},
    )  # fmt: skip
    choice = done.choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    ids = choice.to_dict()["token_ids"]
    prompt = choice.to_dict()["prompt_token_ids"]
    with torch.no_grad():
        table = tiny_llama()(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert len(choice.logprobs.content) == len(ids) == 12
    for row, (token_id, entry) in enumerate(zip(ids, choice.logprobs.content, strict=True)):
        assert entry.logprob == pytest.approx(float(table[row, token_id]), abs=1e-4)
        best = table[row].topk(3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
    with_offsets = client.completions.create(model="tiny", prompt="abc", max_tokens=5, temperature=0, logprobs=1)
    assert with_offsets.choices[0].logprobs is not None
    assert with_offsets.choices[0].logprobs.text_offset is not None
    assert with_offsets.choices[0].logprobs.text_offset[0] == 0


def test_an_answer_tells_what_speculation_did(live: Live):
    body = complete(live, temperature=0, prompt="abcabcabcabcabc", max_tokens=40, speculative={"trace": True})
    block = body["metrics"]["speculative_decoding"]
    trees = body["choices"][0]["speculative"]
    assert block["num_accepted_draft_tokens"] == sum(len(tree["accepted"]) for tree in trees) > 0
    assert block["num_draft_tokens"] == sum(len(tree["tokens"]) - 1 for tree in trees)
    assert sum(block["acceptance_histogram"]) == block["num_spec_steps"]
    plain = complete(live, temperature=0, prompt="abcabcabcabcabc", max_tokens=40, speculative={"enabled": False})
    assert plain["choices"][0]["text"] == body["choices"][0]["text"]
    assert plain["metrics"]["speculative_decoding"]["num_draft_tokens"] == 0
    assert complete(live, n=2)["metrics"]["speculative_decoding"] is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0, got -1"),
        ({"top_p": 0}, "top_p: Input should be greater than 0, got 0"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1, got 0"),
        ({"max_tokens": 500}, "max_tokens must fit the context of 200 tokens: 42 are the prompt, 500 were asked for"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt must not be empty"),
        ({"prompt": "x" * 300}, "the prompt must be shorter than the context of 200 tokens, got 300"),
        ({"prompt": [5, 999]}, "prompt token ids must be in [0, 257), got 999"),
        ({"prompt": [5, -1]}, "prompt_ids must be in [0, 2**31), got -1"),
        ({"logit_bias": {"999": 1}}, "999"),
        ({"logit_bias": {"9": 101}}, "logit_bias values must be in [-100, 100]"),
        ({"stop": [""]}, "non-empty"),
        ({"best_of": 3}, "best_of must equal n"),
        ({"echo": True}, "echo"),
        ({"stream_options": {"include_usage": True}}, "stream_options needs stream = true"),
        ({"min_tokens": 30}, "min_tokens must be at most max_tokens = 24, got 30"),
        ({"speculative": {"drafter": "magic"}}, "speculative.drafter must be one of ngram, suffix, none, got 'magic'"),
        ({"unheard_of": 1}, "unheard_of: Extra inputs are not permitted"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_get_one_clear_error(live: Live, body: dict[str, Any], said: str, stream: bool):
    more = {"stream": True} if stream and "stream_options" not in body else {}
    answer = live.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 24} | body | more)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_other_refusals(live: Live, client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError, match="model must be 'tiny', got 'gpt'"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="no tools here"):
        client.chat.completions.create(model="tiny", messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}])
    picture: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(openai.BadRequestError, match="message content must be text"):
        client.chat.completions.create(model="tiny", messages=picture)
    assert live.post("/v1/nowhere", {}).status_code == 404
    assert live.get("/v1/completions").status_code == 405


def test_many_mixed_requests_at_once_equal_each_alone(live: Live):
    def body(number: int) -> dict[str, Any]:
        law = {"temperature": 0.0} if number % 3 == 0 else {"temperature": 0.8, "seed": number, "min_p": 0.02}
        prompt = (PROMPT * 3)[number % 11 : 20 + 2 * number]
        drafter = ("ngram", "suffix", "none")[number % 3]
        return law | {"prompt": prompt, "max_tokens": 5 + number % 17, "speculative": {"drafter": drafter}}

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda number: complete(live, **body(number)), range(64)))
    for number in range(0, 64, 9):
        assert complete(live, **body(number))["choices"] == together[number]["choices"]
    live.wait_idle()


def test_metrics_have_the_names_that_tools_read(live: Live):
    complete(live, temperature=0)
    text = live.get("/metrics").text
    values = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    label = '{engine="0",model_name="tiny"}'
    drafts, accepted = (
        values[f"specdec:spec_decode_{name}_total{label}"] for name in ("num_drafts", "num_accepted_tokens")
    )
    at = [value for name, value in values.items() if "num_accepted_tokens_per_pos_total" in name]
    assert drafts > 0
    assert sum(at) == accepted
    assert max(at, default=0) <= drafts
    assert values[f"specdec:time_to_first_token_seconds_count{label}"] > 0
    assert live.get("/health").json() == {"status": "running"}
    assert live.get("/ready").status_code == 200
    assert live.get("/version").json()["version"]


def test_keys_decide_who_may_ask_and_as_whom(tmp_path):
    path = tmp_path / "keys"
    one, two = add_key(path, "one"), add_key(path, "two")
    assert one not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    made = service(keys=Keyring.load(path), service=ServiceOptions(has_metrics=False))
    with running(made) as live:
        body = {"prompt": "x", "max_tokens": 3}
        for headers in ({}, {"authorization": "Bearer nonsense"}, {"authorization": f"Basic {one}"}):
            answer = live.post("/v1/completions", body, **headers)
            assert answer.status_code == 401
            assert "API key is missing or unknown" in answer.json()["error"]["message"]
        assert live.get("/v1/models").status_code == 401
        for key in (one, two):
            answer = live.post("/v1/completions", body, authorization=f"Bearer {key}")
            assert answer.status_code == 200
            assert "metrics" not in answer.json()


def test_bodies_that_are_too_large_are_not_read(tmp_path):
    with running(service(service=ServiceOptions(max_body_bytes=2000))) as live:
        assert live.post("/v1/completions", {"prompt": "x" * 3000}).status_code == 413
        assert live.post("/v1/completions", {"prompt": "x", "max_tokens": 2}).status_code == 200


def test_a_request_that_takes_too_long_is_ended():
    with running(service(service=ServiceOptions(deadline_s=0.02))) as live:
        answer = live.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 150, "n": 8, "ignore_eos": True})
        assert answer.status_code == 504
        assert "longer than 0.02 s" in answer.json()["error"]["message"]
        live.wait_idle()


def test_a_full_queue_says_when_to_come_back():
    with running(service(max_in_flight=2)) as live:
        answer = live.post("/v1/completions", {"prompt": "x", "max_tokens": 2, "n": 3})
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert live.post("/v1/completions", {"prompt": "x", "max_tokens": 2, "n": 2}).status_code == 200


def test_a_trace_holds_what_was_emitted_and_no_more(live: Live):
    body = {"temperature": 0, "prompt": "abcabcabcabcabc", "max_tokens": 40, "return_token_ids": True}
    whole = complete(live, **body)["choices"][0]
    for stop in range(8, 30, 3):
        stopped = complete(live, **body, stop_token_ids=[whole["token_ids"][stop]], speculative={"trace": True})
        choice = stopped["choices"][0]
        trees = choice["speculative"]
        assert sum(len(tree["accepted"]) + (tree["bonus"] is not None) for tree in trees) == len(choice["token_ids"])


def test_the_options_of_the_server_are_checked():
    for options in ({"drafters": ()}, {"drafters": ("magic",)}, {"budget": -1}):
        with pytest.raises(ValueError, match=r"drafter|budget"):
            service(**options)
    made = service(metrics_prefix="a b")
    worker = made.make_worker(lambda _: None)
    with pytest.raises(ValueError, match="metrics_prefix"):
        made.make_metrics(worker)
