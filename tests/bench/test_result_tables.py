"""Pages show what the committed results say, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.bench.readme_tables import render
from specdec.bench.result_tables import live_table, replay_table, simulation_table
from specdec.bench.results_schema import read_result, write_result
from specdec.errors import LoadError
from tests.bench.test_report import sample

ROOT = Path(__file__).resolve().parents[2]
WHERE = {"cores": 2, "cpu": "a CPU", "packages": {"torch": "2", "transformers": "5"}, "date": "2026-11-21T10:00Z",
         "command": "python -m specdec bench"}  # fmt: skip


def written(folder, name, **given):
    result = sample(**given)
    result.environment = WHERE
    result.settings = {"rounds": 3}
    write_result(folder / f"{name}.json", result)
    return result


def test_the_replay_table_has_the_pooled_agents_and_every_control(tmp_path):
    names = ("agents_x", "controls_x")
    for name in names:
        written(tmp_path, name)
    short = replay_table(tmp_path, *names, by_source=False, link="res").splitlines()
    lines = [line for line in short if line.startswith("| ") and "---" not in line][1:]
    assert [line.split(" | ")[:2] for line in lines] == [
        [f"| {title}", "float32"] for title in ("**2 agent sources, pooled**", "agent<1>", "chat")
    ]
    assert "10.0/s" in lines[0]  # plain, of the sample
    assert "did not run" in lines[0]  # prompt lookup is not in it
    longer = replay_table(tmp_path, *names, by_source=True, link="res")
    assert longer.count("agent<1>") == 2
    assert "(res/agents_x.json): 2 cores of a CPU, torch 2" in longer
    with pytest.raises(LoadError, match="there is no result file"):
        replay_table(tmp_path, "none", by_source=False, link="res")


def test_simulations_and_live_runs_have_a_table(tmp_path):
    written(tmp_path, "s")
    table = simulation_table(tmp_path, "s", link="res")
    assert "| **all** | 1 | 60 | 2.00 (42%) |" in table
    assert "| fast | 20.0 |" in live_table(tmp_path, "s", link="res")


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_a_page_is_what_its_results_give(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert render(text, ROOT) == text


def test_committed_results_of_the_benchmark_are_of_its_schema_and_name_no_folder_of_a_machine():
    files = [f for f in (ROOT / "bench/results").glob("*.json") if '"schema_version"' in f.read_text()[:200]]
    assert len(files) >= 2
    for file in files:
        result = read_result(file)
        assert not result.is_partial
        assert " /" not in result.environment["command"], file
        assert not [flag for flag in result.flags if flag.severity == "error"], file
