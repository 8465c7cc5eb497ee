"""Each problem is found where it is, and not where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from specdec.doctor.problems import find_problems
from specdec.doctor.report import Problem
from tests.tiny_models import byte_tokenizer, tiny_llama


def problems(
    *, name: str = "tiny", tokenizer: Any = None, dtype: torch.dtype = torch.float32, **generation: Any
) -> Any:
    model = tiny_llama().to(dtype)
    model.generation_config = GenerationConfig(**{"eos_token_id": 256, **generation})
    return find_problems(model, tokenizer or byte_tokenizer(), name)


def found(entries: list[Problem], area: str, words: str) -> Problem:
    [entry] = [entry for entry in entries if entry.area == area and words in entry.message]
    return entry


def test_a_sound_model_has_no_problems():
    assert problems() == []


def test_a_missing_tokenizer_is_an_error():
    entries = find_problems(tiny_llama(), None, "tiny")
    assert found(entries, "tokenizer", "no usable tokenizer").severity == "error"


def test_a_vocabulary_larger_than_the_embedding_is_an_error_with_both_numbers():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<one>", "<two>"])
    entry = found(problems(tokenizer=tokenizer), "tokenizer", "goes up to id 258")
    assert entry.severity == "error"
    assert "ids below 257" in entry.message


def test_a_tokenizer_without_an_end_is_a_warning():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert found(problems(tokenizer=tokenizer), "tokenizer", "no end-of-sequence token").severity == "warning"


def test_padding_with_the_end_of_sequence_is_noted():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert found(problems(tokenizer=tokenizer), "tokenizer", "padding token is the end").severity == "note"


@pytest.mark.parametrize(
    ("generation", "words", "severity"),
    [
        ({"eos_token_id": 3}, "eos_token_id is [3], but the tokenizer's is 256", "warning"),
        ({"eos_token_id": [256, 900]}, "eos_token_id 900 is not in the vocabulary of 257", "error"),
        ({"eos_token_id": None}, "there is no eos_token_id; the tokenizer's is 256", "warning"),
        ({"do_sample": True, "temperature": 0.6}, "do_sample=True, temperature=0.6", "note"),
        ({"repetition_penalty": 1.05}, "repetition_penalty=1.05", "note"),
        ({"num_beams": 4}, "num_beams=4", "warning"),
    ],
)
def test_generation_configs_that_surprise(generation: dict[str, Any], words: str, severity: str):
    assert found(problems(**generation), "generation config", words).severity == severity


def test_an_end_among_several_is_no_disagreement():
    assert problems(eos_token_id=[3, 256]) == []


def test_a_model_made_for_chats_should_have_a_template():
    assert (
        found(problems(name="acme/Tiny-Instruct"), "chat template", "made for chats ('instruct')").severity == "warning"
    )


@pytest.mark.parametrize(
    ("template", "words", "severity"),
    [
        ("{{ raise_exception('only pairs') }}", "does not render one user message", "error"),
        ("{{ messages[0].nothing.at.all }}", "does not render one user message", "error"),
        ("hi", "leaves out the user's message", "error"),
    ],
)
def test_templates_that_do_not_work(template: str, words: str, severity: str):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    assert found(problems(tokenizer=tokenizer), "chat template", words).severity == severity


def test_a_template_that_renders_is_no_problem():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    assert problems(tokenizer=tokenizer) == []


def test_half_precision_on_a_cpu_is_noted():
    entries = problems(dtype=torch.bfloat16)
    assert found(entries, "dtype", "bfloat16 on a CPU is slow").severity == "note"
    assert found(entries, "dtype", "near-ties").severity == "note"


def test_errors_come_first():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<one>"])
    tokenizer.pad_token = tokenizer.eos_token
    severities = [entry.severity for entry in problems(tokenizer=tokenizer, eos_token_id=3)]
    assert severities == ["error", "warning", "note"]
