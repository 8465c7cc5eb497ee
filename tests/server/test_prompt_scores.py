"""Scores of a prompt's own tokens: the reference's log-softmax, whatever is cached, drafted and cut into pieces."""

from __future__ import annotations

import pytest
import torch

from tests.server.live import running, service
from tests.tiny_models import tiny_llama

PROMPT = [5, 9, 5, 9, 5, 7, 30, 31, 32, 5, 9, 5]


@pytest.fixture(scope="module")
def live():
    with running(service(drafters=("ngram", "none"))) as made:
        yield made


def asked(live, **more):
    answer = live.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, **more})
    answer.raise_for_status()
    return answer.json()


def test_rows_are_the_references(live):
    with torch.inference_mode():
        table = tiny_llama()(torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    for _ in range(2):  # the second time the prompt is cached
        rows = asked(live, prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
        assert rows[0] is None
        assert len(rows) == len(PROMPT)
        for at in range(1, len(PROMPT)):
            token, scores = PROMPT[at], table[at - 1]
            mine = rows[at][str(token)]
            assert mine["logprob"] == pytest.approx(float(scores[token]), abs=1e-4)
            assert mine["rank"] == int((scores >= scores[token]).sum())
            best = int(scores.argmax())
            assert rows[at][str(best)]["rank"] == 1


def test_a_start_leaves_rows_out_and_the_answer_is_the_plain_one(live):
    plain = asked(live, return_token_ids=True)
    scored = asked(live, return_token_ids=True, prompt_logprobs=1, prompt_logprob_start=8)
    rows = scored["choices"][0].pop("prompt_logprobs")
    assert [row is None for row in rows] == [True] * 9 + [False] * 3
    assert scored["choices"] == plain["choices"]
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [scored["usage"][name] for name in names] == [plain["usage"][name] for name in names]


def test_scoring_is_no_speculation(live):
    live.wait_idle()
    before = live.service.worker.totals.num_draft_tokens
    asked(live, prompt_logprobs=0)
    assert live.service.worker.totals.num_draft_tokens == before


@pytest.mark.parametrize(
    ("more", "text"),
    [({"stream": True}, "stream = false"), ({"prompt": [[1], [2]]}, "one prompt"),
     ({"prompt_logprob_start": 99}, "prompt_logprob_start")],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused(live, more, text):
    body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 1, **more}
    answer = live.post("/v1/completions", body)
    assert answer.status_code == 400
    assert text in answer.text
