"""Load on a real socket: times, percentiles, failures, arrival patterns, and what the server was sent."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from specdec.bench.arrivals import Arrival
from specdec.bench.http_client import Endpoint, request_body
from specdec.bench.results_schema import read_result
from specdec.bench.serve import Load, poisson_load, trace_load
from specdec.bench.serve_run import ServeOptions, make_loads, make_questions, run_serve
from specdec.bench.tables import result_table
from specdec.bench.traces import messages_of
from specdec.cli import app
from specdec.errors import ConfigError
from tests.bench.http_server import running


def traces_of(tmp_path, *prompts):
    file = tmp_path / "asked.jsonl"
    lines = [{"trace": f"t{i}", "prompt": prompt, "response": "r"} for i, prompt in enumerate(prompts)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def measured(tmp_path, url, prompts, *, loads=None, endpoints=None, **given):
    options = ServeOptions(**{"rounds": 1, "max_new_tokens": 6, "timeout_s": 30.0, **given})
    questions, info = make_questions([traces_of(tmp_path, *prompts)], options)
    ends = endpoints or [Endpoint("one", url, "m")]
    loads = loads or make_loads(options, len(questions))
    return run_serve(ends, questions, info, loads, options, output=tmp_path / "served.json")


def test_times_tokens_and_goodput_of_a_steady_server(tmp_path):
    with running(first_s=0.06, step_s=0.02) as (url, recorder):
        result = measured(tmp_path, url, ["a b", "c"], concurrency=(1,), slo_ms=(30_000, 30_000), rounds=2)
    assert read_result(tmp_path / "served.json") == result
    (summary, _) = result.summaries
    assert (summary.arm, summary.load, summary.num_runs, summary.output_tokens) == ("one x1", "x1", 4, 24)
    assert 60 <= summary.ttft_ms.p50 < 1e3 * max(row.seconds for row in result.rows)
    assert 20 <= summary.tpot_ms.p50 < 1e3 * max(row.seconds for row in result.rows) / 5
    assert summary.ttft_ms.p50 <= summary.ttft_ms.p90 <= summary.ttft_ms.p99
    assert 0 < summary.tokens_per_s <= 1.001 * 24 / sum(r.seconds for r in result.rows)  # one client
    assert summary.goodput_per_s == pytest.approx(summary.requests_per_s)
    assert summary.acceptance_length is None  # this server does not say
    assert [row.prompt_tokens for row in result.rows] == [2, 1, 2, 1]
    assert recorder.most_alive == 1
    body = recorder.bodies[0]
    assert (body["model"], body["prompt"], body["max_tokens"], body["temperature"]) == ("m", "a b", 6, 0.0)
    assert body["stream_options"] == {"include_usage": True}
    slow = ServeOptions(slo_ms=(1, 1000), rounds=1, concurrency=(1,))
    from specdec.bench.metrics import summarize

    assert summarize(result.rows, [], slo_ms=slow.slo_ms)[0].goodput_per_s == 0


def test_every_way_to_fail_is_counted_by_name_and_counts_in_no_other_figure(tmp_path):
    prompts = ["fine", "refuse", "cut", "late error", "garbage", "no usage", "hang", "fine too"]
    with running() as (url, _):
        result = measured(tmp_path, url, prompts, concurrency=(8,), timeout_s=4.0)
    (summary, _) = result.summaries
    assert summary.errors == {
        "HTTP 503": 1, "stream cut short": 1, "error in the stream": 1, "malformed event": 1, "no usage": 1,
        "timeout": 1,
    }  # fmt: skip
    assert summary.num_runs == 2
    assert summary.output_tokens == 12
    assert summary.ttft_ms.p99 < 4000  # the one that timed out is not among them
    assert "failed-requests" in [flag.code for flag in result.flags]
    nobody = measured(tmp_path, "http://127.0.0.1:9", ["x"], concurrency=(1,))
    assert nobody.summaries[0].errors == {"ConnectError": 1}
    assert nobody.summaries[0].tokens_per_s == 0
    assert result_table(nobody)[1][1:3] == ["0", "1"]


def test_a_closed_load_keeps_its_clients_busy_and_an_open_one_does_not_wait(tmp_path):
    prompts = [f"p{i}" for i in range(9)]
    with running(first_s=0.05, step_s=0.01) as (url, recorder):
        measured(tmp_path, url, prompts, concurrency=(3,))
        assert recorder.most_alive == 3
        recorder.times.clear()
        load = Load("trace", tuple(0.01 * i for i in range(9)))
        result = measured(tmp_path, url, prompts, loads=[load])
        assert recorder.most_alive > 5  # sent on time, although no answer had ended
    sent = [row.start_s for row in result.rows]
    assert all(at >= time for at, time in zip(sent, load.times_s, strict=True))
    with pytest.raises(ConfigError, match="9 requests need as many times, got 2"):
        measured(tmp_path, "http://localhost", prompts, loads=[Load("trace", (0.0, 1.0))])


def test_poisson_arrivals_have_the_asked_rate_and_repeat_with_the_seed():
    load = poisson_load(4.0, 4001, seed=3)
    gaps = np.diff(load.times_s)
    assert np.mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert np.std(gaps) == pytest.approx(0.25, rel=0.1)  # an exponential law has its mean as its deviation
    assert load == poisson_load(4.0, 4001, seed=3)
    assert load != poisson_load(4.0, 4001, seed=4)
    for bad in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="rate must be above 0"):
            poisson_load(bad, 3)


def test_recorded_arrivals_give_times_and_lengths(tmp_path):
    times = [Arrival(2.0, 10, 3), Arrival(0.0, 10, 500), Arrival(1.0, 10, 0)]
    assert trace_load(times, time_scale=0.1).times_s == pytest.approx((0.0, 0.1, 0.2))
    options = ServeOptions(max_new_tokens=50)
    questions, info = make_questions([traces_of(tmp_path, "a", "b", "c", "d")], options, arrivals=times)
    assert [q.max_tokens for q in questions] == [3, 50, 1]
    assert info.num_calls == 3
    with pytest.raises(ConfigError, match="time_scale must be above 0"):
        trace_load(times, time_scale=0)
    with pytest.raises(ConfigError, match="say how requests come"):
        make_loads(options, 3)
    with pytest.raises(ConfigError, match="loads must be different"):
        make_loads(ServeOptions(rates=(1, 1)), 3)


def test_two_servers_are_compared_at_the_same_load_and_must_say_the_same(tmp_path):
    prompts = ["a", "b", "c"]
    with running(step_s=0.03) as (slow, _), running(step_s=0.002) as (fast, _):
        ends = [Endpoint("slow", slow, "m"), Endpoint("fast", fast, "m")]
        result = measured(tmp_path, "", prompts, endpoints=ends, concurrency=(1, 2), rounds=3)
        other = measured(tmp_path, "", ["a", "b", "loop"], endpoints=ends, concurrency=(1,), temperature=0.7)
    summary = result.summary("fast x2")
    ratio = summary.tokens_per_s / result.summary("slow x2").tokens_per_s  # of this very run, whatever it was
    assert summary.speedups["slow"].value == pytest.approx(ratio, rel=1e-6)
    assert result.summary("slow x2").speedups.keys() == {"fast"}
    assert summary.same_output == 1.0
    assert all(row.same_output is None for row in other.rows)  # sampled: nothing is claimed
    changed = result.rows[0].model_copy(update={"output_sha256": "other", "arm": "fast x1", "load": "x1"})
    from specdec.bench.serve_run import _compared

    assert [r.same_output for r in _compared([*result.rows, changed], "slow")].count(False) == 1


def test_a_server_that_shows_its_speculation_gets_an_acceptance_length(tmp_path):
    with running() as (url, _):
        result = measured(tmp_path, url, ["speculate"], concurrency=(1,), max_new_tokens=12)
    (row,) = result.rows
    assert (row.num_accepted, row.num_drafted, row.num_drafting_steps, row.num_steps) == (6, 9, 3, 6)
    assert result.summaries[0].acceptance_length == 2.0
    assert result.summaries[0].acceptance_length_drafting == 3.0


def test_looped_answers_are_flagged_also_over_http(tmp_path):
    with running(first_s=0.0, step_s=0.0) as (url, _):
        result = measured(tmp_path, url, ["loop"], concurrency=(1,), max_new_tokens=80)
    assert "looped-output" in [flag.code for flag in result.flags]


def test_chats_get_their_messages_back_and_keys_go_into_the_header_only(tmp_path):
    parts = ("<|system|>\nbe brief\n", "<|user|>\nline 1\nline 2\n", "no frame")
    assert messages_of(parts) == [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "line 1\nline 2"},
        {"role": "user", "content": "no frame"},
    ]  # fmt: skip
    chat = Endpoint("n", "https://host/v1/", "m", "chat", "secret")
    assert chat.address == "https://host/v1/chat/completions"
    assert "secret" not in repr(chat)
    with pytest.raises(ConfigError, match="a chat needs text"):
        request_body(chat, ((1, 2),))
    assert request_body(Endpoint("n", "http://h", "m"), ((1, 2), (3,)))["prompt"] == [1, 2, 3]
    with pytest.raises(ConfigError, match="not a mixture"):
        request_body(Endpoint("n", "http://h", "m"), ((1, 2), "a"))
    with pytest.raises(ConfigError, match="url must begin"):
        Endpoint("n", "localhost:80", "m")
    with pytest.raises(ConfigError, match="api must be"):
        Endpoint("n", "http://h", "m", "images")
    with running() as (url, recorder):
        result = measured(
            tmp_path, url, ["hi"], endpoints=[Endpoint("n", url, "m", "chat", "secret")], concurrency=(1,)
        )
    assert recorder.headers[0]["authorization"] == "Bearer secret"
    assert recorder.bodies[0]["messages"] == [{"role": "user", "content": "hi"}]
    assert result.summaries[0].output_tokens == 6
    assert "secret" not in (tmp_path / "served.json").read_text()


def test_an_interrupted_load_is_partial_and_resumes_with_whole_runs(tmp_path, monkeypatch):
    from specdec.bench import serve_run

    prompts, right, count = ["a", "b"], serve_run.run_load, 0

    async def interrupted(*args, **given):
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        await right(*args, **given)

    with running() as (url, recorder):
        options = ServeOptions(rounds=3, max_new_tokens=4, concurrency=(1,))
        questions, info = make_questions([traces_of(tmp_path, *prompts)], options)
        ends, loads, out = [Endpoint("one", url, "m")], make_loads(options, 2), tmp_path / "r.json"
        monkeypatch.setattr(serve_run, "run_load", interrupted)
        partial = run_serve(ends, questions, info, loads, options, output=out)
        assert partial.is_partial
        assert read_result(out).is_partial
        assert len(partial.rows) == 2
        monkeypatch.setattr(serve_run, "run_load", right)
        whole = run_serve(ends, questions, info, loads, options, output=out, resume=True)
        assert not whole.is_partial
        assert len(whole.rows) == 6
        assert whole.rows[:2] == partial.rows
        assert len(recorder.bodies) == 6
        with pytest.raises(ConfigError, match="holds another run: its settings differs"):
            run_serve(ends, questions, info, loads, ServeOptions(concurrency=(1,)), output=out, resume=True)


def test_the_command_measures_a_server_and_reports(tmp_path, monkeypatch):
    arrivals = tmp_path / "a.csv.gz"
    arrivals.write_bytes(gzip.compress(b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
                                       b"2023-11-16 18:15:46.6,10,3\n2023-11-16 18:15:46.7,9,2\n"))  # fmt: skip
    traces, out = traces_of(tmp_path, "a", "b", "c"), tmp_path / "r.json"
    monkeypatch.setenv("SPECDEC_TEST_KEY", "secret")
    with running() as (url, recorder):
        done = CliRunner().invoke(
            app,
            ["bench", "--mode", "serve", "--url", f"ours={url}/v1", "--traces", str(traces), "--rate", "50",
             "--arrivals", str(arrivals), "--concurrency", "2", "--rounds", "1", "--key-env", "SPECDEC_TEST_KEY",
             "--out", str(out)],
        )  # fmt: skip
    assert done.exit_code == 0, done.output
    result = read_result(out)
    assert {arm.name for arm in result.arms} == {"ours 50/s", "ours x2", "ours trace"}
    assert [body["max_tokens"] for body in recorder.bodies[:2]] == [3, 2]
    assert "goodput/s" in done.stdout
    assert "secret" not in out.read_text()
    page = tmp_path / "r.html"
    assert CliRunner().invoke(app, ["bench", "report", str(out), "--html", str(page)]).exit_code == 0
    assert CliRunner().invoke(app, ["bench", "compare", str(out), str(out)]).exit_code == 0
    done = CliRunner().invoke(app, ["bench", "serve", "--url", url, "--out", str(out), "--key-env", "SPECDEC_NONE"])
    assert "must hold the key" in str(done.exception)
