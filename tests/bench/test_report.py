"""Tables and pages say what the file says: figures, failures, doubts; and the page needs nothing from outside."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from specdec.bench.html_report import html_report
from specdec.bench.results_schema import ArmInfo, ModelInfo, SourceFile, StepMark, read_result, write_result
from specdec.bench.tables import compare_table, markdown_table, result_table, text_table
from specdec.cli import app
from specdec.errors import ConfigError, LoadError
from tests.bench.rows import row
from tests.bench.test_metrics import result_of
from tests.tiny_models import byte_tokenizer


def sample(speed: float = 0.5, **given):
    drafted = {"num_steps": 5, "accepted_histogram": [2, 1, 2], "num_drafted": 12, "num_accepted": 5, "reached": [5, 4],
               "reached_after": [5, 3], "num_drafting_steps": 5}  # fmt: skip
    rows = [
        one
        for source in ("agent<1>", "chat")
        for number in range(3)
        for one in (
            row(round=number, source=source),
            row("fast", round=number, seconds=speed, source=source, **drafted),
        )
    ]
    result = result_of(
        rows,
        cost_curve=[(1, 10.0), (2, 10.5), (4, 12.0)],
        timeline=[StepMark(arm="fast", call=0, start_s=0.0, end_s=0.1, emitted=3)],
        **given,
    )
    result.arms.append(ArmInfo(name="arctic", kind="arctic", failure="it is not installed"))
    result.model = ModelInfo(name="m", dtype="float32", device="cpu", num_parameters=1000, has_random_weights=True)
    result.workload.files.append(SourceFile(source="chat", name="chat.jsonl.gz", nbytes=9, sha256="ab" * 32))
    return result


def test_a_table_has_a_line_per_arm_and_the_reason_of_a_failure():
    rows = result_table(sample())
    assert rows[0][:4] == ["arm", "tokens/s", "against plain (95 %)", "length"]
    assert rows[1][:4] == ["plain", "10.0", "", "1.00"]
    assert rows[2][:4] == ["fast", "20.0", "2.00x (2.00 to 2.00)", "2.00"]
    assert rows[3][:2] == ["arctic", "failed: it is not installed"]
    assert all(len(line) == len(rows[0]) for line in rows)
    assert text_table(rows).splitlines()[2].startswith("fast    ")
    assert markdown_table(rows).splitlines()[1].startswith("| --- | ---: |")
    with pytest.raises(ConfigError, match="source must be one of"):
        result_table(sample(), source="none")


def test_results_survive_the_file_and_a_foreign_file_is_refused(tmp_path):
    file = tmp_path / "r.json"
    write_result(file, sample())
    assert read_result(file) == sample()
    file.write_text('{"schema_version": "other/1"}')
    with pytest.raises(LoadError, match="is no result of schema specdec.bench/1"):
        read_result(file)
    with pytest.raises(LoadError, match="there is no result file"):
        read_result(tmp_path / "none.json")


def test_comparison_gives_ratios_and_names_what_differs():
    first, second = sample(), sample(0.4)
    second.workload.tokens_sha256 = "other"
    second.environment = {"cpu": "another"}
    rows, doubts = compare_table(first, second)
    fast = next(line for line in rows if line[:2] == ["all", "fast"])
    assert fast[2:5] == ["20.0", "25.0", "1.25x"]
    plain = next(line for line in rows if line[:2] == ["all", "plain"])
    assert plain[4] == "1.00x ~"  # within the spread
    assert any("the work differs" in doubt for doubt in doubts)
    assert any("cpu differs: None and another" in doubt for doubt in doubts)
    assert compare_table(first, first)[1] == []
    second.summaries = []
    with pytest.raises(ConfigError, match="no arm and source in common"):
        compare_table(first, second)


class Checker(HTMLParser):
    """Notes tags that stay open, and everything that would be fetched."""

    VOID = frozenset({"meta", "link"})

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("data:")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_escapes_names_and_fetches_nothing():
    page = html_report(sample())
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.fetched == []
    assert "agent<1>" not in page
    assert "agent&lt;1&gt;" in page
    for word in ("Speed-up by source", "Acceptance by position", "One episode", "Cost of a target step", "Break-even"):
        assert f"<h2>{word}</h2>" in page
    assert page.count("<svg") == 5
    assert "it is not installed" in page
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+|[a-z]+nan[a-z]*", "", page.lower())
    assert "prefers-color-scheme: dark" in page


def test_a_result_without_rows_still_makes_a_page():
    empty = sample()
    empty.rows, empty.summaries, empty.timeline, empty.cost_curve = [], [], [], []
    assert "<svg" not in html_report(empty)


def test_the_commands_compare_and_report_read_result_files(tmp_path):
    file = tmp_path / "r.json"
    write_result(file, sample())
    done = CliRunner().invoke(app, ["bench", "compare", str(file), str(file)])
    assert done.exit_code == 0
    assert "1.00x" in done.stdout
    done = CliRunner().invoke(app, ["bench", "report", str(file), "--markdown"])
    assert done.stdout.startswith("| arm | tokens/s |")
    page = tmp_path / "r.html"
    assert CliRunner().invoke(app, ["bench", "report", str(file), "--html", str(page)]).exit_code == 0
    assert page.read_text().startswith("<!doctype html>")


def test_the_mode_picks_the_command(tmp_path):
    done = CliRunner().invoke(app, ["bench", "--mode", "replay", "--out", "x.json"])
    assert isinstance(done.exception, ConfigError)
    assert "--model (with weights) or --shape" in str(done.exception)
    done = CliRunner().invoke(app, ["bench", "--mode=live", "--rounds", "0", "--out", "x.json"])
    assert done.exit_code == 2
    assert "rounds" in done.output
    done = CliRunner().invoke(app, ["bench", "--parts", "host", "--out", "x.json"])
    assert "--traces" in done.output  # of the retrieval benchmark, which needs them
    for words, message in (
        (["--concurrency", "1,x"], "concurrency must be numbers"),
        (["--shape", "qwen2.5-0.5b"], "a simulation has no model"),
        ([], "give one with --tokenizer"),
        (["--mode", "replay", "--shape", "qwen2.5-0.5b"], "give one with --tokenizer"),
        (["--slo", "3"], "slo must be two numbers"),
        (["--tokenizer", str(tmp_path)], "cannot load a tokenizer"),
    ):
        done = CliRunner().invoke(app, ["bench", "--out", "x.json", *words])
        assert message in str(done.exception)


def test_a_simulation_from_the_command_line_writes_the_one_schema_and_all_readers_take_it(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "words")
    traces, out, page = tmp_path / "t.jsonl", tmp_path / "r.json", tmp_path / "r.html"
    traces.write_text(json.dumps({"trace": "t", "prompt": "copy: abcdefgh ijkl", "response": "abcdefgh ijkl"}) + "\n")
    common = ["bench", "--mode", "simulate", "--tokenizer", str(tmp_path / "words"), "--traces", str(traces)]
    done = CliRunner().invoke(app, [*common, "--out", str(out), "--arms", "plain,ngram"])
    assert done.exit_code == 0, done.output
    assert "drafted/step" in done.stdout
    result = read_result(out)
    assert (result.mode, len(result.rows)) == ("simulate", 2)
    assert CliRunner().invoke(app, ["bench", "report", str(out), "--html", str(page)]).exit_code == 0
    assert "Acceptance by position" in page.read_text()
    done = CliRunner().invoke(app, ["bench", "compare", str(out), str(out)])
    assert [line.split() for line in done.stdout.splitlines() if "ngram" in line][0][-1] == "1.00x"
    assert "tokens/s" not in done.stdout  # a simulation's clock says nothing
    assert CliRunner().invoke(app, [*common, "--out", str(out), "--arms", "plain,ngram", "--compact"]).exit_code == 0
    short = read_result(out)
    assert short.rows == short.timeline == []
    assert [s.acceptance_length for s in short.summaries] == [s.acceptance_length for s in result.summaries]
