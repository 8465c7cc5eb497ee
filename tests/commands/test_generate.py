from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.errors import ConfigError, LoadError, RequestError, SpecdecError, UnsupportedError
from tests.tiny_models import byte_tokenizer, save_tiny_llama

PROMPT = "def add(a, b):\n    return a + b\n\n\ndef add("


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("model")))


def run(*words: str, stdin: str | None = None):
    return CliRunner().invoke(app, ["generate", *words], input=stdin)


def run_json(*words: str) -> dict[str, object]:
    done = run(*words, "--json")
    assert done.exit_code == 0, done.exception
    values = json.loads(done.stdout)
    assert isinstance(values, dict)
    return values


def failure(*words: str) -> BaseException:
    error = run(*words).exception
    assert isinstance(error, SpecdecError), error
    return error


@pytest.mark.parametrize("law", [(), ("--temperature", "0.8", "--top-k", "20", "--top-p", "0.9", "--seed", "7")])
def test_text_is_the_same_whoever_drafts(model_dir: str, law: tuple[str, ...]):
    common = ("--model", model_dir, "--prompt", PROMPT, "--max-new-tokens", "24", "--ignore-eos", *law)
    plain = run_json(*common, "--drafter", "none")
    drafted = run_json(*common, "--drafter", "ngram", "--budget", "6")
    assert plain["token_ids"] == drafted["token_ids"]
    assert plain["num_output_tokens"] == 24
    assert plain["num_drafted"] == 0
    assert plain["acceptance_length"] == 1.0
    assert drafted["num_drafted"] != 0


def test_a_lossy_verifier_is_marked_wherever_its_result_shows(model_dir: str):
    common = ("-m", model_dir, "-p", "x = 1", "-n", "4")
    assert run_json(*common)["is_lossless"] is True
    assert run_json(*common, "--verifier", "typical")["is_lossless"] is False
    assert "LOSSY" in run(*common, "--verifier", "typical").stderr
    assert "LOSSY" not in run(*common).stderr


def test_budget_zero_is_plain_decoding(model_dir: str):
    values = run_json("-m", model_dir, "-p", PROMPT, "-n", "5", "--drafter", "ngram", "--budget", "0")
    assert (values["num_drafted"], values["acceptance_length"]) == (0, 1.0)


def test_json_holds_what_a_script_reads_and_nothing_else_is_on_stdout(model_dir: str):
    values = run_json("-m", model_dir, "-p", "x = 1", "-n", "4", "--ignore-eos")
    assert values["text"] == byte_tokenizer().decode(values["token_ids"], skip_special_tokens=True)
    assert (values["finish_reason"], values["num_prompt_tokens"]) == ("length", 5)
    assert values["tokens_per_second"] > 0  # type: ignore[operator]


def test_text_streams_to_stdout_and_statistics_to_stderr(model_dir: str):
    words = ("-m", model_dir, "-p", PROMPT, "-n", "8", "--ignore-eos")
    done = run(*words)
    assert done.exit_code == 0, done.exception
    assert done.stdout == f"{run_json(*words)['text']}\n"
    assert "8 tokens in" in done.stderr
    assert "tokens/s; acceptance length" in done.stderr


def test_prompt_can_come_from_a_file_or_from_stdin(model_dir: str, tmp_path: Path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    common = ("-m", model_dir, "-n", "4")
    expected = run(*common, "--prompt", PROMPT).stdout
    assert run(*common, "--prompt-file", str(file)).stdout == expected
    assert run(*common, "--prompt-file", "-", stdin=PROMPT).stdout == expected


def test_stop_string_ends_the_text(model_dir: str):
    common = ("-m", model_dir, "-p", PROMPT, "-n", "16", "--ignore-eos")
    text = str(run_json(*common)["text"])
    stop = next(character for character in text[2:] if character != "\ufffd")
    values = run_json(*common, "--stop", stop)
    assert str(values["text"]).endswith(stop)
    assert values["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (("-p", "x", "-f", "y"), ConfigError, "exactly one of them"),
        ((), ConfigError, "exactly one of them"),
        (("-f", "/no/such/file"), LoadError, "cannot read the prompt file '/no/such/file'"),
        (("-p", "x", "--drafter", "crystal-ball"), ConfigError, "ngram, .*got 'crystal-ball'"),
        (("-p", "x", "--top-p", "1.3"), RequestError, r"top_p must be in \(0, 1\], got 1.3"),
        (("-p", "x", "--seed", str(2**64)), RequestError, "seed must be"),
    ],
)
def test_wrong_option_is_refused_before_the_model_loads(words: tuple[str, ...], kind: type, message: str):
    with pytest.raises(kind, match=message):
        raise failure("-m", "/no/such/model", *words)


@pytest.mark.parametrize(
    "words", [("--budget", "-1"), ("--max-new-tokens", "0"), ("--temperature", "-1"), ("--dtype", "x")]
)
def test_option_outside_its_range_is_a_usage_error(words: tuple[str, ...]):
    done = run("-m", "anything", "-p", "x", *words)
    assert done.exit_code == 2
    assert words[0] in done.stderr


def test_empty_prompt_and_too_long_prompt_are_refused(model_dir: str):
    with pytest.raises(RequestError, match="prompt_ids must be a non-empty list"):
        raise failure("-m", model_dir, "-p", "")
    with pytest.raises(RequestError, match="256"):
        raise failure("-m", model_dir, "-p", "x" * 300)


def test_chat_needs_a_template(model_dir: str, tmp_path: Path):
    with pytest.raises(UnsupportedError, match="needs a chat template"):
        raise failure("-m", model_dir, "-p", "x", "--chat")
    save_tiny_llama(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    assert run_json("-m", str(tmp_path), "-p", "hello", "--chat", "-n", "2")["num_prompt_tokens"] == len("<user>hello")
