"""``specdec check`` from the outside: statuses, what it says, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import specdec.build
from specdec.check.controls import CarelessVerifier
from specdec.cli import app
from specdec.errors import SpecdecError
from specdec.verifier.match import MatchVerifier
from tests.tiny_models import save_tiny_llama

QUICK = ["-n", "8", "--seeds", "1", "--samples", "60", "--batch-size", "2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("model")))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"abcabcabc"\n{"prompt": "the cat sat on the mat"}\n')
    return str(file)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["check", *arguments])


def test_a_lossless_model_ends_with_status_0_and_says_what_was_compared(tiny: str, prompts: str):
    result = run(tiny, "--prompts", prompts, *QUICK)
    assert result.exit_code == 0, result.output
    assert "random-tree = plain decoding in 2 of 2 outputs" in result.stdout
    assert "ngram = model.generate in 2 of 2 outputs" in result.stdout
    assert "found with probability 0.9" in result.stdout
    assert result.stdout.count("caught") >= 2
    assert "lossless: no bug in" in result.stdout


def test_json_is_one_object_on_stdout(tiny: str, prompts: str):
    result = run(tiny, "--prompts", prompts, *QUICK, "--drafter", "random-tree", "--no-self-test", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["is_lossless"] is True
    assert {c["decoder"] for c in report["comparisons"]} == {"plain", "random-tree"}
    assert report["controls"] == []


def test_a_bug_ends_with_status_1_and_is_described(tiny: str, prompts: str, monkeypatch: pytest.MonkeyPatch):
    def careless(*args: Any, **options: Any) -> Any:
        return CarelessVerifier(MatchVerifier(*args, **options), every=1)

    monkeypatch.setattr(specdec.build, "MatchVerifier", careless)
    result = run(tiny, "--prompts", prompts, "-n", "8", "--seeds", "0", "--samples", "0", "--no-self-test")
    assert result.exit_code == 1, result.output
    assert "NOT LOSSLESS" in result.stdout
    assert "at output token" in result.stdout
    assert "margin of the best two" in result.stdout
    assert "rule: a first difference is a numeric tie if" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drafter", "nonsense"], "drafter must be one of"),
        (["--budget", "0"], "budget must be >= 1, got 0"),
        (["--prompts", "nowhere.txt"], "cannot read the prompts in 'nowhere.txt'"),
        (["--dtype", "float32", "-n", "300"], "max_new_tokens must leave room"),
    ],
)
def test_bad_input_is_one_clear_error(tiny: str, arguments: list[str], message: str):
    result = run(tiny, *arguments)
    assert isinstance(result.exception, SpecdecError)  # ``main`` makes one line and status 2 of it
    assert message in str(result.exception)


def test_a_model_that_is_not_there_is_an_error():
    result = run("./nowhere")
    assert "no directory './nowhere'" in str(result.exception)
