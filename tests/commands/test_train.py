"""``specdec regenerate`` and ``specdec train``, from prompts to a drafter that drafts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.errors import ConfigError
from tests.tiny_models import save_tiny_llama


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model")


def test_prompts_become_examples_and_examples_a_head(model: Path, tmp_path: Path):
    prompts, examples = tmp_path / "prompts.jsonl", tmp_path / "examples.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"text number {i}"}) + "\n" for i in range(6)))
    answer = ("regenerate", prompts, "-m", model, "-o", examples, "-n", 12)
    assert "6 answers of" in run(*answer)
    assert "0 answers of 0 tokens added" in run(*answer)
    train = ("train", "eagle3", "-m", model, "--data", examples, "-o", tmp_path / "head", "--depth", 2, "--epochs", 2,
             "--layers", "0,1,2", "--batch-tokens", 64, "--threads", 1)  # fmt: skip
    assert "stopped after step 1 of" in run(*train, "--stop-after", 1)
    assert not (tmp_path / "head").exists()
    assert "simulated acceptance length" in run(*train)
    text = run("generate", "-m", model, "-d", f"eagle:{tmp_path / 'head'}?probe=0", "-p", "text", "-n", 6, "--json")
    plain = run("generate", "-m", model, "-d", "none", "-p", "text", "-n", 6, "--json")
    assert _ids(text) == _ids(plain)


def _ids(output: str) -> list[int]:
    ids: list[int] = json.loads(output[output.index("{") : output.rindex("}") + 1])["token_ids"]
    return ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("eagle3", "--layers", "a"), "layers must be numbers"),
        (("eagle3", "--loss", "mse"), "loss must be among"),
        (("eagle3", "--layers", "0,9"), r"layers must be in 0\.\.2, got \(0, 9\)"),
        (("lm", "--layers", "0,1"), "layers belong to heads, not to lm"),
        (("lm", "--num-layers", "3"), "1 to 2 layers"),
        (("lm", "--max-length", "4096"), "context of 256"),
        (("lm", "--epochs", "0"), "epochs must be > 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options: tuple[str, ...], message: str, model: Path, tmp_path: Path):
    data = tmp_path / "a.jsonl"
    data.write_text('{"token_ids": [1, 2, 3, 4], "prompt_length": 1}\n' * 3)
    kind, *rest = options
    with pytest.raises(ConfigError, match=message):
        run("train", kind, "-m", model, "--data", data, "-o", tmp_path / "out", *rest)
