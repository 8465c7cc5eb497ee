"""``specdec doctor`` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import T5Config, ViTConfig
from typer.testing import CliRunner, Result

from specdec.cli import app
from specdec.errors import LoadError
from tests.tiny_models import save_tiny_llama


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_a_model_is_described_for_people(tmp_path: Path):
    result = run(str(save_tiny_llama(tmp_path)), "--context", "40", "--batch", "2", "--seconds", "2")
    assert result.exit_code == 0, result.output
    for words in (
        "LlamaForCausalLM, float32 on cpu",
        "tree: whole draft trees",
        "2 x full: 4 query and 2 key heads of width 8",
        "KV 256 B per token",
        "batch 2, context 40: 10.0 KiB per request",
        "breaks even at an acceptance length of",
        "if 70% of draft tokens are right: budget",
        "Problems  ",
    ):
        assert words in result.stdout


def test_json_is_one_object_on_stdout(tmp_path: Path):
    result = run(str(save_tiny_llama(tmp_path, has_tokenizer=False)), "--seconds", "0", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["path"] == "tree"
    assert report["costs"] is None
    assert report["problems"][0]["area"] == "tokenizer"


@pytest.mark.parametrize(
    ("config", "words"), [(T5Config(), "encoder-decoder"), (ViTConfig(hidden_size=32), "no causal language model")]
)
def test_something_that_is_no_causal_model_is_refused_with_status_0(tmp_path: Path, config: T5Config, words: str):
    config.save_pretrained(tmp_path)
    result = run(str(tmp_path), "--seconds", "0")
    assert result.exit_code == 0, result.output
    assert "refused" in result.stdout
    assert words in result.stdout


def test_a_model_that_is_not_there_is_an_error():
    result = run("./nowhere")
    assert isinstance(result.exception, LoadError)
    assert "no directory './nowhere'" in str(result.exception)
