"""What one tenant sends shows in nothing that another one can see: not in the text, not in how it is chunked."""

from __future__ import annotations

from typing import Any

import pytest

from specdec.server.keys import Keyring, hash_key
from tests.server.live import Live, ServiceOptions, running, service, tokenizer

KEYS = Keyring((("a", hash_key("key-a")), ("b", hash_key("key-b"))))
TEXT = "the quick brown fox jumps over the lazy dog and "
BIAS = {str(token_id): 100 for token_id in tokenizer()("abcdefgh ")["input_ids"]}


def ask(live: Live, key: str, prompt: str, seed: int) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 60, "seed": seed, "logit_bias": BIAS, "return_token_ids": True}
    answer = live.post("/v1/completions", body, authorization=f"Bearer {key}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def pattern(answer: dict[str, Any]) -> tuple[Any, ...]:
    """Everything that tells how a text came about, step by step."""
    block = answer["metrics"]["speculative_decoding"]
    return (answer["choices"][0]["token_ids"], *block.values())


@pytest.mark.parametrize("drafter", ["suffix", "ngram", "lookahead", "recycling"])
def test_a_tenants_steps_do_not_depend_on_anothers_text(drafter: str):
    options: dict[str, Any] = {"drafters": (drafter,), "service": ServiceOptions(has_metrics=True), "keys": KEYS}
    with running(service(**options)) as alone:
        expected = [pattern(ask(alone, "key-b", TEXT, seed)) for seed in (1, 2)]
    with running(service(**options)) as shared:
        for seed in (1, 2, 3, 1, 2):
            ask(shared, "key-a", TEXT, seed)
        again = pattern(ask(shared, "key-a", TEXT, 1))
        got = [pattern(ask(shared, "key-b", TEXT, seed)) for seed in (1, 2)]
    assert got == expected
    if drafter == "suffix":
        assert again != expected[0]  # the probe sees what a tenant's own store knows


def test_a_cached_beginning_serves_its_own_tenant_alone():
    with running(service(keys=KEYS)) as live:
        answers = [ask(live, key, TEXT, 1) for key in ("key-a", "key-b", "key-a")]
        metrics = live.get("/metrics").text
    cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert cached == [0, 0, answers[0]["usage"]["prompt_tokens"] - 1]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert f'specdec:prefix_cache_hits_total{{engine="0",model_name="tiny"}} {float(cached[2])}' in metrics
