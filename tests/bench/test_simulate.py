from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from specdec.bench.peers import arctic_cache, replay_arctic
from specdec.bench.prior import COUNT_LIMIT, take_tokens, train_prior
from specdec.bench.simulate import SETTINGS, compare, run_ours, run_reference, run_sources
from specdec.bench.simulate_scaling import cache_scaling
from specdec.bench.simulate_speed import host_time, long_prompt, measure_stall
from specdec.bench.traces import TokenCall
from specdec.cli import app
from specdec.errors import ConfigError
from specdec.suffix_tree.suffix_decoding import CountingDrafts, ReferenceSuffixDecoding
from tests.tiny_models import byte_tokenizer


def calls(number: int = 8) -> list[TokenCall]:
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 50, 7) for _ in range(6)]
    text = [np.concatenate([words[i] for i in rng.integers(0, 6, 12)]).astype(np.int32) for _ in range(2 * number)]
    return [TokenCall(f"t{n // 2}", text[2 * n], text[2 * n + 1]) for n in range(number)]


def test_every_response_token_is_accounted_for():
    work = calls()
    for counts in (run_ours(work, threshold=0.1, as_tree=True), run_reference(work, SETTINGS[0])):
        steps, accepted, drafted = counts.T
        lengths = np.array([len(call.response_ids) for call in work])
        assert ((steps + accepted == lengths) | (steps + accepted == lengths + 1)).all()
        assert (accepted <= drafted).all()
        assert accepted.sum() > 0


def test_arms_are_compared_at_equal_drafts():
    work = {"a": calls(), "b": calls(4)}
    base = {name: run_reference(part, SETTINGS[0]) for name, part in work.items()}
    ours = [
        {name: run_ours(part, threshold=threshold, as_tree=False) for name, part in work.items()}
        for threshold in (0.4, 0.1)
    ]
    found = compare(work, base, ours)
    assert set(found) == {"all", "tuned half", "held-out half", "sources"}
    assert set(found["sources"]) == {"a", "b"}
    assert compare(work, base, [base])["all"]["gain_percent"] == pytest.approx(0)


def test_kept_counts_are_taken_only_for_the_same_work(tmp_path):
    done: list[str] = []

    def run(sources):
        done.clear()
        return run_sources(sources, parts=("ours",), jobs=1, kept=tmp_path, on_done=done.append)

    first = run({"a": calls(4)})
    (file,) = tmp_path.glob("ours-*.npz")
    written = file.stat().st_mtime_ns
    again = run({"a": calls(4)})
    assert done == ["ours of a"]
    assert file.stat().st_mtime_ns == written
    assert {arm: counts["a"].tolist() for arm, counts in first.items()} == {
        arm: counts["a"].tolist() for arm, counts in again.items()
    }
    run({"a": calls(6)})
    assert len(list(tmp_path.glob("ours-*.npz"))) == 2


def test_the_reference_drafts_what_counts_say():
    # After 1 came 2 three times and 3 once; the current 1 is counted too, so 2 has frequency 3/5.
    prompt = np.array([1, 2, 9, 1, 2, 8, 1, 2, 7, 1, 3, 6, 1], np.int32)
    reference = ReferenceSuffixDecoding()
    assert reference.replay(prompt, np.array([2, 5], np.int32), CountingDrafts(min_prob=0.6)) == (1, 1, 1)
    assert reference.replay(prompt, np.array([2, 5], np.int32), CountingDrafts(min_prob=0.61))[2] == 0


def test_the_reference_agrees_with_the_released_implementation():
    pytest.importorskip("arctic_inference.suffix_decoding")
    cache, reference = arctic_cache(), ReferenceSuffixDecoding()
    theirs, ours = np.zeros(3), np.zeros(3)
    for n, call in enumerate(calls(12)):
        theirs += replay_arctic(cache, n, call, {"max_spec_factor": 1.0})
        ours += reference.replay(call.prompt_ids, call.response_ids, CountingDrafts())
    assert np.abs(theirs - ours).max() <= 0.03 * theirs.max()  # ties between equal counts are broken differently


def test_a_call_that_keeps_all_threads_waiting_is_a_stall():
    numbers = np.random.default_rng(0).random(300_000).tolist()
    spent, longest = measure_stall(numbers.sort)  # one call that never lets another thread run
    assert longest > spent / 2


def test_timings_have_every_field():
    host = host_time(calls(), [1, 2], passes=1, with_peer=False)
    assert host["1"]["ours"] > 0
    assert host["2"]["ours"] > 0
    text = np.arange(5000, dtype=np.int32) % 777
    assert long_prompt(text, passes=1, with_peer=False)["ours"]["start_ms"] > 0


def test_caches_are_measured_at_the_sizes_asked_for():
    text = np.arange(5000, dtype=np.int32) % 777
    found = cache_scaling(text, [2000, 4000], passes=2, response=500, with_peer=False)
    assert [row["cached_tokens"] for row in found["ours"]] == [2000, 4000]
    assert all(value > 0 for row in found["ours"] for value in row.values())
    assert found["ours"][0]["bytes_per_token"] > found["ours"][1]["bytes_per_token"] > 20  # the tables are shared
    assert found["times_as_much"]["speculate_us_p50"] > 0


def test_a_trained_prior_has_learned():
    prior = train_prior([take_tokens(iter(calls()), 300)])
    assert 20 < prior.counts.max() <= COUNT_LIMIT
    assert ((prior.probs > 0) & (prior.probs < 1)).all()


def test_the_command_measures_traces(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    trace = tmp_path / "small.jsonl"
    line = {"prompt": "def f(x):\n    return x\n", "response": "def f(y):\n    return y\n" * 3}
    trace.write_text((json.dumps(line) + "\n") * 3)
    out = tmp_path / "result.json"
    arguments = ["bench", "-t", str(trace), "--tokenizer", str(tmp_path / "tokenizer"), "--parts", "reference", "-o",
                 str(out), "--no-peer"]  # fmt: skip
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "against SuffixDecoding reference" in done.output
    result = json.loads(out.read_text())
    assert result["sources"]["small"]["calls"] == 3
    assert result["peer"] == "left out: not asked for"
    with pytest.raises(ConfigError, match="parts must be of .*, got nonsense"):
        CliRunner().invoke(app, [*arguments[:6], "nonsense"], catch_exceptions=False)
