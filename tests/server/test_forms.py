"""Answers of a wanted form, tool calls, and predictions: the same text whatever drafts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import openai
import pytest
import torch

from specdec.server.grammar import GrammarCompiler
from specdec.server.tools import ToolText
from specdec.types import DraftTree, Request, RequestState
from tests.server.live import EOS, Live, tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["north", "south"]}, "sizes": {"type": "array", "items": {"type": "boolean"}}},
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: {"enum": [1, 2]}},
                "required": [key],
                "additionalProperties": False,
            },
        },
    }
    for name, key in (("open", "door"), ("close", "window"))
]
ASKED: dict[str, Any] = {
    "model": "tiny", "messages": [{"role": "user", "content": "go"}], "temperature": 0.9, "seed": 2, "max_tokens": 120,
}  # fmt: skip


def test_an_answer_follows_its_schema_whoever_drafts(client: openai.OpenAI):
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    texts = set()
    for options in ({"enabled": False}, {"drafter": "ngram"}, {"drafter": "suffix"}):
        done = client.chat.completions.create(**ASKED, response_format=form, extra_body={"speculative": options})
        assert done.choices[0].finish_reason == "stop"
        texts.add(done.choices[0].message.content)
    (text,) = texts
    answer = json.loads(text or "")
    assert set(answer) == {"name", "sizes"}
    assert answer["name"] in ("north", "south")


def test_a_forced_tool_is_called_and_streams_as_a_call(client: openai.OpenAI):
    whole = client.chat.completions.create(**ASKED, tools=TOOLS, tool_choice="required")
    calls = whole.choices[0].message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls"
    assert calls is not None
    (call,) = calls
    assert call.type == "function"
    assert (call.function.name, *json.loads(call.function.arguments)) in (("open", "door"), ("close", "window"))
    deltas = [
        chunk.choices[0].delta
        for chunk in client.chat.completions.create(**ASKED, tools=TOOLS, tool_choice="required", stream=True)
    ]
    assert "".join(delta.content or "" for delta in deltas) == ""
    streamed = [one.function for delta in deltas for one in delta.tool_calls or []]
    assert [(f.name, f.arguments) for f in streamed if f] == [(call.function.name, call.function.arguments)]
    named: Any = {"type": "function", "function": {"name": "close"}}
    done = client.chat.completions.create(**ASKED, tools=TOOLS, tool_choice=named)
    assert done.choices[0].message.tool_calls is not None
    assert done.choices[0].message.tool_calls[0].to_dict()["function"]["name"] == "close"  # type: ignore[index]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}, "cannot be enforced"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice must be none, auto, required or one of"),
        ({"tools": [{"type": "function"}]}, "a tool must be of type function"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "must be named once"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "exclude each other"),
        ({"prediction": {"type": "magic", "content": "x"}}, "prediction.type"),
    ],
)  # fmt: skip
def test_malformed_forms_are_refused(live: Live, more: dict[str, Any], said: str):
    answer = live.post("/v1/chat/completions", ASKED | more)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_prediction_is_drafted_from_and_changes_nothing(client: openai.OpenAI):
    plain = client.chat.completions.create(**ASKED, extra_body={"return_token_ids": True})
    ids = plain.choices[0].to_dict()["token_ids"]
    bias = {str(token): 100 for token in tokenizer()("abcdefghijklmnop")["input_ids"]}  # bytes that are text
    law = ASKED | {"logit_bias": bias}
    expected = client.chat.completions.create(**law)
    text = expected.choices[0].message.content or ""
    assert len(ids) == 120 == len(text)
    for drafter in ("ngram", "suffix"):
        done = client.chat.completions.create(
            **law, prediction={"type": "content", "content": text}, extra_body={"speculative": {"drafter": drafter}}
        )
        assert done.choices[0].message.content == text
        assert done.usage is not None
        assert done.usage.completion_tokens_details is not None
        assert done.usage.completion_tokens_details.accepted_prediction_tokens == 120
        block = done.to_dict()["metrics"]["speculative_decoding"]  # type: ignore[index]
        assert block["mean_acceptance_length"] > 5
    wrong = client.chat.completions.create(**law, prediction={"type": "content", "content": "nothing of it"})
    assert wrong.choices[0].message.content == text


def test_the_grammar_answers_the_same_in_whatever_order_it_is_asked():
    compiler = GrammarCompiler(tokenizer(), [EOS])
    encode = lambda text: tokenizer()(text)["input_ids"]  # noqa: E731
    grammar = compiler.json_schema(SCHEMA)
    prompt = encode("go: ")
    texts = ["", "{", '{"na', '{"name": "so', '{"name": "north", "sizes": [true', '{"name": "south", "sizes": []}']
    fresh = {}
    for text in texts:
        ids = torch.tensor([prompt + encode(text)])
        fresh[text] = compiler.processor(grammar, len(prompt))(ids, torch.zeros(1, 257))
    shared = compiler.processor(grammar, len(prompt))
    for text in [*texts[::-1], *texts, texts[3], texts[1], texts[4]]:
        ids = torch.tensor([prompt + encode(text)])
        assert torch.equal(shared(ids, torch.zeros(1, 257)), fresh[text])
    assert fresh[texts[-1]].argmax().item() == EOS
    broken = torch.tensor([prompt + encode("{]")])
    assert torch.equal(shared(broken, torch.zeros(1, 257)), torch.zeros(1, 257))
    state = RequestState(Request("r", np.array(prompt)))
    state.append(encode('{"name": "'))
    ok, bad = encode("south"), encode("sauce")
    ids = np.array([encode('"')[0], *ok, *bad[1:]], dtype=np.int32)
    parents = np.array([-1, 0, 1, 2, 3, 4, 1, 6, 7, 8], dtype=np.int32)
    trimmed = shared.trim(state, DraftTree(ids, parents))
    assert trimmed.token_ids.tolist() == [ids[0], *ok]
    assert trimmed.parents.tolist() == [-1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_found_in_pieces_of_any_size(size: int):
    text = 'a < b <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>mid<tool_call>junk</tool_call> <tool'
    finder, shown = ToolText(), ""
    for start in range(0, len(text), size):
        piece, _ = finder.feed(text[start : start + size], is_last=start + size >= len(text))
        shown += piece
    assert shown == "a < b mid<tool_call>junk</tool_call> <tool"
    assert [(call.name, call.arguments) for call in finder.calls] == [("f", '{"x": 1}')]
