"""A whole run over a tiny model: replay, live, failing peers, interruption and resumption."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch

from specdec.bench import replay
from specdec.bench.arm_builder import ArcticDrafter, arm_names, build_arms
from specdec.bench.arms import EngineArm, GenerateArm
from specdec.bench.html_report import html_report
from specdec.bench.loaders import Skips
from specdec.bench.results_schema import read_result
from specdec.bench.run import BenchOptions, make_workload, run_bench
from specdec.bench.targets import load_target, random_target
from specdec.bench.workload import Limits, Workload
from specdec.build import build_engine
from specdec.errors import ConfigError, LoadError
from tests.tiny_models import byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.fixture(scope="module")
def target():
    torch.set_num_threads(1)
    return load_target(tiny_llama(), TOKENIZER, "tiny")


@pytest.fixture
def traces(tmp_path):
    file = tmp_path / "copies.jsonl"
    lines = [
        {"trace": f"t{i // 2}", "prompt": f"copy {i}: abcdefgh ijkl", "response": "abcdefgh ijkl abcdefgh"}
        for i in range(4)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def options(**given) -> BenchOptions:
    return BenchOptions(**{"rounds": 2, "budget": 4, **given})


def test_replay_gives_every_arm_the_same_work_and_an_error_free_result(target, traces, tmp_path):
    chosen = options(arms=("ngram", "plain", "generate", "prompt-lookup@4", "assisted", "arctic"), slo_ms=(1e4, 1e4))
    work = make_workload([traces], encode, chosen)
    output = tmp_path / "result.json"
    seen = []
    result = run_bench(target, work, chosen, output=output, on_progress=lambda done, all: seen.append((done, all)))
    assert read_result(output) == result
    assert seen[-1] == (8, 8)
    assert [arm.name for arm in result.arms][:2] == ["plain", "generate"]
    assert result.references == ["plain", "generate"]
    failures = {arm.name: arm.failure for arm in result.arms if arm.failure}
    assert failures == {
        "assisted": "UnsupportedError: no assistant model was given",
        "arctic": "UnsupportedError: arctic-inference is not installed",
    }
    assert {row.arm for row in result.rows} == {"plain", "generate", "ngram", "prompt-lookup@4"}
    assert len(result.rows) == 4 * 4 * 2
    assert all(row.same_output for row in result.rows)
    assert not [flag for flag in result.flags if flag.code == "different-output"]
    ngram, plain = result.summary("ngram"), result.summary("plain")
    assert ngram.acceptance_length > 1.5 > plain.acceptance_length == 1.0
    assert set(ngram.speedups) == {"plain", "generate"}
    assert ngram.goodput_per_s > 0
    assert [size for size, _ in result.cost_curve] == list(sorted({size for size, _ in result.cost_curve}))
    assert len(result.cost_curve) == 12
    assert {mark.arm for mark in result.timeline} == {"plain", "generate", "ngram", "prompt-lookup@4"}
    assert {mark.call for mark in result.timeline} == {0, 1}  # the first episode
    assert result.workload.files[0].name == "copies.jsonl"
    assert "/" not in json.dumps(result.workload.model_dump())
    assert result.memory["peak_process"] > 50e6  # bytes: torch alone takes more
    assert set(ngram.parts_ms_per_token) == {"draft", "target", "verify", "commit", "host"}
    assert sum(ngram.parts_ms_per_token.values()) == pytest.approx(1e3 / ngram.tokens_per_s)
    assert ngram.decode_tokens_per_s > 0
    assert {"date", "command", "commit", "cpu", "cores", "packages", "torch_threads"} <= set(result.environment)
    assert result.settings["seed"] == 0
    assert result.model.dtype == "float32"
    assert len(result.workload.files[0].sha256) == 64


def test_live_outputs_are_compared_with_the_baselines(target, traces, monkeypatch):
    chosen = options(mode="live", arms=("plain", "ngram", "generate"), max_new_tokens=12)
    result = run_bench(target, make_workload([traces], encode, chosen), chosen)
    assert all(row.same_output for row in result.rows)
    assert {row.output_tokens for row in result.rows} <= set(range(1, 13))

    right = EngineArm.run

    def wrong(self, jobs):
        (done,) = right(self, jobs)
        if self.name == "ngram":
            done.output_ids = [*done.output_ids[:-1], 0]
        return [done]

    monkeypatch.setattr(EngineArm, "run", wrong)
    flags = run_bench(target, make_workload([traces], encode, chosen), chosen).flags
    assert [f.severity for f in flags if f.code == "different-output"] == ["error"]


def test_open_turns_are_filled_with_live_answers(target, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question_id": 1, "category": "c", "turns": ["one?", "two?"]}) + "\n")
    chosen = options(mode="live", arms=("plain", "ngram"), max_new_tokens=5)
    work = make_workload([file], encode, chosen)
    assert [len(item.response_ids) for item in work.items] == [0, 0]
    result = run_bench(target, work, chosen)
    gap = len(encode("<|user|>\none?\n<|assistant|>\n\n<|user|>\ntwo?\n"))
    second = [row for row in result.rows if row.call == 1]
    assert all(row.prompt_tokens > gap for row in second)
    assert all(row.same_output for row in second)
    with pytest.raises(ConfigError, match="no call that can be used; passed over: 2 x empty response"):
        make_workload([file], encode, options())


def test_an_interrupted_run_keeps_what_it_has_and_resumes_from_whole_rounds(target, traces, tmp_path, monkeypatch):
    chosen = options(arms=("plain", "ngram"), rounds=3)
    work, output = make_workload([traces], encode, chosen), tmp_path / "result.json"
    count = 0
    right = EngineArm.run

    def interrupted(self, jobs):
        nonlocal count
        count += 1
        if count == 2 + 8 + 3:  # warm-up, a whole round, and a bit
            raise KeyboardInterrupt
        return right(self, jobs)

    monkeypatch.setattr(EngineArm, "run", interrupted)
    partial = run_bench(target, work, chosen, output=output)
    assert partial.is_partial
    assert read_result(output).is_partial
    assert len(partial.rows) == 8 + 2
    assert "partial" in [flag.code for flag in partial.flags]
    monkeypatch.setattr(EngineArm, "run", right)
    whole = run_bench(target, work, chosen, output=output, resume=True)
    assert not whole.is_partial
    assert len(whole.rows) == 3 * 8
    assert whole.rows[:8] == partial.rows[:8]  # measured before the interruption, kept
    assert whole.timeline == partial.timeline != []
    with pytest.raises(ConfigError, match="holds another run: its settings differs"):
        run_bench(target, work, options(arms=("plain",), rounds=3), output=output, resume=True)


def test_a_bug_of_ours_is_raised_and_a_peers_is_a_row(target, traces, monkeypatch):
    chosen = options(arms=("plain", "generate"))
    work = make_workload([traces], encode, chosen)
    monkeypatch.setattr(GenerateArm, "run", lambda *a: 1 / 0)
    result = run_bench(target, work, chosen)
    assert result.arms[1].failure == "ZeroDivisionError: division by zero"
    monkeypatch.setattr(EngineArm, "run", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_bench(target, work, chosen)


class Recorder:
    """An arm that notes in which order it was used."""

    kind = "test"
    concurrency = 1

    def __init__(self, name, log):
        self.name, self.log = name, log

    def reset(self):
        self.log.append((self.name, "reset"))

    def warm(self, jobs):
        self.log.append((self.name, f"warm {len(jobs)}"))

    def run(self, jobs):
        from specdec.bench.arms import JobResult

        (job,) = jobs
        self.log.append((self.name, int(job.prompt_ids[0])))
        return [JobResult(job.forced_ids.tolist(), 1.0, [1.0], [len(job.forced_ids)], [0])]


def order(warmth: str, **given) -> list:
    from specdec.bench.workload import WorkItem

    ids = np.arange(3, dtype=np.int32)
    work = Workload([WorkItem("s", str(i), ids + i, ids) for i in range(2)], [], Skips())
    log: list = []
    plan = replay.Plan(rounds=1, warmth=warmth, **given)
    replay.run_rounds([Recorder("A", log), Recorder("B", log)], work, plan)
    return log[2:]  # without the untimed answers


def test_arms_take_turns_call_by_call_and_stores_are_as_declared():
    assert order("self-warmed") == [("A", "reset"), ("B", "reset"), ("A", 0), ("B", 0), ("B", 1), ("A", 1)]
    cold = order("cold")
    assert cold == [(name, what) for name, call in (("A", 0), ("B", 0), ("B", 1), ("A", 1)) for what in ("reset", call)]
    from specdec.bench.workload import WorkItem

    ids = np.arange(3, dtype=np.int32)
    warmed = order("warmed", training=[WorkItem("s", "t", ids, ids)])
    assert warmed[:4] == [("A", "reset"), ("A", "warm 1"), ("B", "reset"), ("B", "warm 1")]


def test_the_workload_is_limited_and_its_digest_is_of_the_work(traces):
    whole = Workload.from_paths([traces], encode, Limits())
    short = Workload.from_paths([traces], encode, Limits(calls=3, prompt_tokens=5, response_tokens=4))
    assert [len(item.prompt_ids) for item in short.items] == [5, 5, 5]
    assert short.items[0].prompt_ids.tolist() == whole.items[0].prompt_ids[-5:].tolist()
    assert short.items[0].response_ids.tolist() == whole.items[0].response_ids[:4].tolist()
    assert whole.info() == Workload.from_paths([traces.parent], encode, Limits()).info()
    assert whole.info().tokens_sha256 != short.info().tokens_sha256


def test_what_does_not_fit_is_said_before_anything_runs(target, traces):
    work = make_workload([traces], encode, options())
    with pytest.raises(ConfigError, match="arm must be one of plain"):
        run_bench(target, work, options(arms=("eager",)))
    with pytest.raises(ConfigError, match="different names"):
        run_bench(target, work, options(arms=("plain", "plain")))
    with pytest.raises(ConfigError, match="budget >= 1"):
        run_bench(target, work, options(arms=("ngram@x",)))
    with pytest.raises(ConfigError, match="need training traces"):
        run_bench(target, work, options(warmth="warmed"))
    with pytest.raises(ConfigError, match="mode must be simulate, replay or live"):
        options(mode="fast")
    long = make_workload([traces], lambda text: encode(text) * 20, options())
    with pytest.raises(ConfigError, match="too long for a context of 256"):
        run_bench(target, long, options())
    foreign = make_workload([traces], lambda text: [i + 1000 for i in encode(text)], options())
    with pytest.raises(ConfigError, match="the model has 257"):
        run_bench(target, foreign, options())


def test_a_random_model_has_the_shape_of_its_configuration(tmp_path):
    config = {"model_type": "qwen2", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
              "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = random_target(str(tmp_path), dtype="bfloat16")
    assert made.info.has_random_weights
    assert (made.info.dtype, made.info.name) == ("bfloat16", tmp_path.name)
    assert made.model.config.vocab_size == 99
    with pytest.raises(ConfigError, match=r"shape must be one of qwen2.5-0.5b"):
        random_target("qwen9")
    with pytest.raises(ConfigError, match="dtype must be"):
        random_target(str(tmp_path), dtype="int8")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LoadError, match="no model_type"):
        random_target(str(tmp_path))


class FakeArctic:
    """The calls of arctic-inference's cache: proposes the two tokens that followed the last one before."""

    max_tree_depth = 64

    def __init__(self):
        self.log = []

    def start_request(self, request_id, prompt):
        self.text = list(prompt)
        self.log.append("start")

    def speculate(self, request_id, context, *, max_spec_tokens, max_spec_factor, min_token_prob, use_tree_spec):
        from types import SimpleNamespace

        last = int(context[-1])
        places = [i for i, token in enumerate(self.text[:-1]) if token == last][-1:]
        ids = [self.text[i + 1 : i + 1 + min(2, max_spec_tokens)] for i in places]
        flat = ids[0] if ids else []
        return SimpleNamespace(token_ids=flat, parents=list(range(-1, len(flat) - 1)))

    def add_active_response(self, request_id, token_ids):
        self.text += token_ids

    def stop_request(self, request_id):
        self.log.append("stop")


def test_arctics_tree_drafts_inside_our_engine(target, traces):
    (item, *_) = make_workload([traces], encode, options()).items
    cache = FakeArctic()
    make = partial(build_engine, target.model, kv_tokens=200)
    arm = EngineArm("arctic", make, lambda: ArcticDrafter(cache), budget=4, kind="arctic")
    from specdec.bench.arms import Job

    (done,) = arm.run([Job(item.prompt_ids, len(item.response_ids), item.response_ids)])
    assert done.output_ids == item.response_ids.tolist()
    assert sum(done.accepted) > 5
    assert cache.log == ["start", "stop"]
    assert cache.text == [*item.prompt_ids.tolist(), *item.response_ids.tolist()]


def test_a_draft_model_is_an_arm_and_its_folder_is_not_written_down(target, traces, tmp_path):
    target.model.save_pretrained(tmp_path / "small")
    chosen = options(mode="live", arms=("plain", f"lm:{tmp_path / 'small'}@3"), max_new_tokens=12, rounds=1)
    result = run_bench(target, make_workload([traces], encode, chosen), chosen)
    assert [arm.name for arm in result.arms] == ["plain", "lm:small@3"]
    assert all(row.same_output for row in result.rows)
    assert result.summary("lm:small@3").acceptance_length > 1.5  # it drafts for itself, with side branches
    assert str(tmp_path) not in result.model_dump_json()


def test_every_name_builds_an_arm(target):
    names = [name for name in arm_names() if name not in ("suffix", "lookahead", "recycling")]
    assert sorted(arm.name for arm in build_arms(names, target.model, kv_tokens=100)) == sorted(names)


def test_replay_and_simulation_agree_on_every_step(target, traces):
    """Only the counts of both can be equal: times are of different things."""
    names = ("plain", "ngram", "ngram@2", "suffix", "lookahead")
    work = make_workload([traces], encode, options())
    replayed = run_bench(target, work, options(arms=names, rounds=1))
    simulated = run_bench(None, work, options(mode="simulate", arms=names, rounds=1))
    shown = ("arm", "call", "output_sha256", "num_steps", "num_accepted", "num_drafted", "accepted_histogram",
             "reached", "reached_after", "num_drafting_steps", "same_output")  # fmt: skip
    by_key = {(row.arm, row.call): row for row in replayed.rows}
    assert len(simulated.rows) == len(replayed.rows) == 4 * len(names)
    for row in simulated.rows:
        other = by_key[row.arm, row.call]
        assert {name: getattr(row, name) for name in shown} == {name: getattr(other, name) for name in shown}
    assert simulated.summary("ngram").acceptance_length > 1.5


def test_a_fused_arm_shows_how_well_its_chances_are_calibrated(traces):
    chosen = options(mode="simulate", arms=("plain", "fused:ngram+suffix"), rounds=1)
    result = run_bench(None, make_workload([traces], encode, chosen), chosen)
    points = result.reliability["fused:ngram+suffix"]
    assert sum(count for _, _, count in points) > 10
    assert all(0 <= predicted <= 1 and 0 <= observed <= 1 for predicted, observed, _ in points)
    page = html_report(result)
    assert "Reliability" in page
    assert "perfect" in page


def test_a_simulation_has_no_speedups_and_says_which_arms_need_a_model(traces):
    chosen = options(mode="simulate", arms=("plain", "ngram", "recycling", "generate"), rounds=1)
    result = run_bench(None, make_workload([traces], encode, chosen), chosen)
    assert result.model is None
    assert result.references == []
    assert all(not summary.speedups for summary in result.summaries)
    failed = {arm.name: arm.failure for arm in result.arms if arm.failure}
    assert set(failed) == {"recycling", "generate"}
    assert all("needs a model" in reason for reason in failed.values())
    assert [flag.code for flag in result.flags] == ["arm-failed"] * 2
    with pytest.raises(ConfigError, match="mode simulate needs no model"):
        run_bench(load_target(tiny_llama(), TOKENIZER, "tiny"), make_workload([traces], encode, chosen), chosen)
    with pytest.raises(ConfigError, match="mode replay needs a model"):
        run_bench(None, make_workload([traces], encode, options()), options())


def test_a_sampled_replay_is_still_the_recording_and_a_sampled_live_run_is_the_same_for_all_our_arms(target, traces):
    law = {"temperature": 1.0, "top_p": 0.95, "rounds": 1}
    chosen = options(arms=("plain", "ngram", "generate", "prompt-lookup"), **law)
    replayed = run_bench(target, make_workload([traces], encode, chosen), chosen)
    assert {row.same_output for row in replayed.rows} == {True}
    assert replayed.summary("prompt-lookup").acceptance_length > 1.2

    chosen = options(mode="live", arms=("plain", "ngram", "generate"), max_new_tokens=12, **law)
    work = make_workload([traces], encode, chosen)
    first, again = run_bench(target, work, chosen), run_bench(target, work, chosen)
    ours = [row for row in first.rows if row.arm != "generate"]
    assert {row.same_output for row in ours} == {True}
    # transformers draws other noise: its text is another draw of the same law, so nothing is claimed about it.
    assert {row.same_output for row in first.rows if row.arm == "generate"} == {None}
    assert first.summary("generate").same_output is None
    assert [row.output_sha256 for row in first.rows] == [row.output_sha256 for row in again.rows]
    greedy = options(mode="live", arms=("plain",), max_new_tokens=12, rounds=1)
    assert {row.output_sha256 for row in run_bench(target, work, greedy).rows} != {row.output_sha256 for row in ours}
    other = options(mode="live", arms=("plain",), max_new_tokens=12, seed=99, **law)
    assert [r.output_sha256 for r in run_bench(target, work, other).rows] != [r.output_sha256 for r in ours[::2]]


def test_a_sweep_runs_plain_and_drafted_arms_at_every_concurrency(target, traces):
    chosen = options(arms=("plain", "ngram", "generate"), concurrency=(1, 3), rounds=3)
    result = run_bench(target, make_workload([traces], encode, chosen), chosen)
    assert {arm.name for arm in result.arms} == {"plain", "ngram", "generate", "plain x3", "ngram x3"}
    crowd = [row for row in result.rows if row.load == "x3"]
    assert len(crowd) == 2 * 4 * 3
    assert all(row.same_output for row in crowd)
    for number in range(3):
        rows = [row for row in crowd if row.arm == "ngram x3" and row.round == number]
        spans = [(row.start_s, row.start_s + row.seconds) for row in rows]
        alive = max(sum(a <= when < b for a, b in spans) for when, _ in spans)
        assert 2 <= alive <= 3  # they overlap, and never more than three do
    summary = result.summary("ngram x3")
    assert summary.load == "x3"
    assert set(summary.speedups) == {"plain"}  # at the same load; `generate` has no such point
    assert summary.decode_tokens_per_s is None
    wall = sum(
        max(r.start_s + r.seconds for r in rows) - min(r.start_s for r in rows)
        for number in range(3)
        if (rows := [r for r in crowd if r.arm == "ngram x3" and r.round == number])
    )
    assert summary.tokens_per_s == pytest.approx(summary.output_tokens / wall)
    with pytest.raises(ConfigError, match="not with cold"):
        options(concurrency=(2,), warmth="cold")
    with pytest.raises(ConfigError, match="different numbers >= 1"):
        options(concurrency=(0,))


def test_warmed_stores_learn_the_half_that_is_not_measured(traces, tmp_path):
    from specdec.bench.run import make_training
    from specdec.bench.traces import episode_half

    given = {"mode": "simulate", "arms": ("plain", "suffix"), "rounds": 1}
    chosen = options(held_out=True, warmth="warmed", **given)
    file = tmp_path / "many.jsonl"
    secret = "zyxwvutsrqponmlkjihgfedcba"  # answers repeat each other, and no prompt has them
    lines = [{"trace": f"e{i}", "prompt": f"say it, {i}", "response": secret} for i in range(12)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    work = make_workload([file], encode, chosen)
    training = make_training([], [file], encode, chosen)
    assert {episode_half(item.trace) for item in work.items} == {1}
    assert {episode_half(item.trace) for item in training.items} == {0}
    assert len(work.items) + len(training.items) == 12
    warmed = run_bench(None, work, chosen, training=training)
    cold = run_bench(None, work, options(held_out=True, warmth="cold", **given))
    assert min(row.num_accepted for row in warmed.rows if row.arm == "suffix") >= 15
    assert max(row.num_accepted for row in cold.rows) <= 2
    assert [arm.warmth for arm in warmed.arms] == ["cold", "warmed"]  # plain knows nothing
    with pytest.raises(ConfigError, match="held-out ones"):
        make_training([], [file], encode, options(warmth="warmed"))
    with pytest.raises(ConfigError, match="are for warmed stores"):
        make_training([file], [], encode, options())


def test_prompts_may_be_put_into_the_models_own_template(target, tmp_path):
    words = byte_tokenizer()
    with pytest.raises(ConfigError, match="has no chat template"):
        make_workload([], encode, options(chat_template=True), tokenizer=words)
    words.chat_template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}>"
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"question_id": 1, "category": "c", "turns": ["one?", "two?"]}) + "\n")
    chosen = options(mode="live", arms=("plain",), chat_template=True, rounds=1, max_new_tokens=5)
    work = make_workload([file], encode, chosen, tokenizer=words)
    assert TOKENIZER.decode(work.items[0].prompt_ids) == "[user:one?]>"
    result = run_bench(target, work, chosen, tokenizer=words)
    around = len(encode("[user:one?][assistant:][user:two?]>"))
    assert around < [row for row in result.rows if row.call == 1][0].prompt_tokens  # with the live answer in it
    words.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(ConfigError, match="refuses messages of user: never"):
        make_workload([file], encode, chosen, tokenizer=words)


def test_calls_may_be_spread_over_episodes(tmp_path):
    file = tmp_path / "long.jsonl"
    lines = [{"trace": f"e{i}", "prompt": f"{i}:{k}", "response": "r"} for i in range(3) for k in range(8)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    taken = make_workload([file], encode, options(per_episode=2, calls=5)).items
    assert [TOKENIZER.decode(item.prompt_ids) for item in taken] == ["0:2", "0:6", "1:2", "1:6", "2:2"]


def test_a_bug_of_a_drafter_is_no_result(target, traces, monkeypatch):
    from specdec.errors import InternalError

    def broken(self, jobs):
        raise InternalError("a broken invariant")

    monkeypatch.setattr(EngineArm, "run", broken)
    with pytest.raises(InternalError):
        run_bench(target, make_workload([traces], encode, options()), options(arms=("plain",)))


def test_without_traces_the_work_is_made_of_this_machines_standard_library():
    chosen = options(mode="simulate", arms=("plain", "ngram"), calls=3, rounds=1, max_response=80)
    work = make_workload([], encode, chosen)
    assert [item.trace for item in work.items] == ["stdlib-edit/0", "stdlib-edit/1", "stdlib-edit/2"]
    assert work.info().tokens_sha256 == make_workload([], encode, chosen).info().tokens_sha256
    result = run_bench(None, work, chosen)
    assert [(file.source, file.name) for file in result.workload.files] == [("stdlib-edits", "built-in")]
    assert result.summary("ngram").source == "all"
    assert result.summary("ngram").acceptance_length > 2  # an edit copies most of its file
