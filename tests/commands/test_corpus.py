from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.drafters.store import RetrievalStore
from specdec.errors import ConfigError
from tests.tiny_models import byte_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["corpus", "build", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_responses_of_a_trace_warm_a_tenant(tmp_path, tokenizer):
    trace = tmp_path / "trace.jsonl"
    lines = [{"prompt": "hi", "response": "hello world"}, {"messages": [{"role": "user"}], "response": "good bye"}]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "store"
    assert "2 texts, 19 tokens in tenant 'north'" in run(str(trace), "--tokenizer", tokenizer, "-o", str(out),
                                                         "--tenant", "north")  # fmt: skip
    store = RetrievalStore.load(out)
    assert list(store.suffix.index("north").responses) == ["corpus:trace.jsonl:0", "corpus:trace.jsonl:1"]
    encode = byte_tokenizer().encode
    store.suffix.start("r", encode("hello w"), tenant="north")
    draft = store.suffix.speculate(["r"], [8], threshold=0.0, as_tree=False)
    assert draft.token_ids[1:].tolist() == encode("orld")


def test_text_files_fill_the_shared_tier_and_a_store_is_extended(tmp_path, tokenizer):
    text = tmp_path / "notes.txt"
    text.write_text("abc " * 2000)
    out = tmp_path / "store"
    assert "in the shared tier" in run(str(text), "--tokenizer", tokenizer, "-o", str(out), "--shared")
    run(str(text), "--tokenizer", tokenizer, "-o", str(out))
    store = RetrievalStore.load(out)
    assert store.suffix.shared is not None
    assert store.suffix.shared.num_tokens == store.suffix.index("").num_tokens == 8000


def test_shared_text_has_no_tenant(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="not both, got tenant 'x'"):
        CliRunner().invoke(
            app, ["corpus", "build", "f", "--tokenizer", tokenizer, "-o", "o", "--shared", "--tenant", "x"],
            catch_exceptions=False,
        )  # fmt: skip
