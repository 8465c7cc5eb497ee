"""The overhead benchmark measures what it says: full trees, the second branch taken, and a result file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specdec.attention import StepAttention
from specdec.bench import engine_overhead


def test_every_request_drafts_eight_nodes_and_takes_three() -> None:
    attend = StepAttention.attend
    row = engine_overhead.measure(engine_overhead.copying_model(128), 2, 16, num_steps=3)
    assert (row["batch_size"], row["context_length"], row["num_steps"]) == (2, 16, 3)
    assert row["tokens_per_request_step"] == 4
    assert 0 < row["overhead_ms"] < 1000
    assert 0 < row["attention_ms"] < row["model_ms"]
    assert StepAttention.attend is attend


def test_the_command_writes_its_result_and_says_which_bar_was_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_overhead, "BATCH_SIZES", (1,))
    monkeypatch.setattr(engine_overhead, "CONTEXT_LENGTHS", (16,))
    monkeypatch.setattr(engine_overhead, "GRID_LENGTH", 16)
    monkeypatch.setattr(engine_overhead, "BARS_MS", {1: 0.0})
    assert engine_overhead.main(["--steps", "2", "--json", str(tmp_path / "result.json")]) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["batch_size"] for row in result["rows"]] == [1]
    assert result["environment"]["commit"]
    assert "ms > 0.0 ms" in capsys.readouterr().out
