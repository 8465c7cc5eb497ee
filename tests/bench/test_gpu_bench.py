"""``specdec bench --gpu`` at toy sizes in Triton's interpreter: every part runs, and every bar gets its figure."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from specdec.bench import gpu as gpu_bench
from specdec.bench.gpu import PARTS, TINY, run_gpu_bench
from specdec.cli import app

_SLOW = ("attention", "prefill", "steps", "steps_without_graphs", "replay")  # to interpret


@pytest.mark.parametrize(
    "part", [pytest.param(p, marks=[pytest.mark.slow] * (p in _SLOW)) for p in PARTS if p != "strict"]
)
def test_every_part_runs(part):
    result = run_gpu_bench(TINY, torch.device("cpu"), parts=[part])
    assert result["errors"] == {}
    assert set(result["seconds"]) == {part}


@pytest.mark.slow
def test_calls_of_a_trace_are_replayed_by_source(tmp_path):
    trace = tmp_path / "mine.jsonl"
    call = {"prompt": "def f(x):\n    return x\n", "response": "def f(x):\n    return x\n"}
    trace.write_text(json.dumps(call) + "\n")
    rows = run_gpu_bench(TINY, torch.device("cpu"), parts=["replay"], traces=[trace])["replay"]
    assert {(row["source"], row["arm"]) for row in rows} == {
        (source, arm) for source in ("mine", "all") for arm in ("plain", "suffix")
    }
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert all(row["over_plain"]["plain"]["value"] > 0 for row in rows if row["arm"] == "suffix")


@pytest.mark.slow
def test_strict_decoding_differs_nowhere(fixed_order_products):
    result = run_gpu_bench(TINY, torch.device("cpu"), parts=["strict"])
    assert result["errors"] == {}
    assert result["bars"]["strict, differing requests"]["figure"] == 0


def test_bars_are_judged_and_failures_are_kept(monkeypatch):
    def fails(bench):
        raise RuntimeError("no such launch")

    parts = {"commit": lambda bench: {"us": 31.0}, "verify": fails, "strict": lambda bench: {}}
    monkeypatch.setattr(gpu_bench, "PARTS", parts)
    result = run_gpu_bench(TINY, torch.device("cpu"), parts=list(parts))
    assert result["bars"] == {"KV commit, us": {"figure": 31.0, "at_least": None, "at_most": 30.0, "holds": False}}
    assert "no such launch" in result["errors"]["verify"]
    late = run_gpu_bench(TINY, torch.device("cpu"), parts=["commit"], seconds=-1)
    assert late["errors"] == {"commit": "did not begin: -1 s were over"}


def test_what_has_no_time_is_left_out_by_name_and_the_rest_is_kept(monkeypatch):
    monkeypatch.setattr(gpu_bench, "SECONDS", {"attention": 0.0})
    kept = []
    result = run_gpu_bench(TINY, torch.device("cpu"), parts=["attention", "commit"], on_result=kept.append)
    assert result["attention"] == []
    assert result["left_out"] == ["attention, 1 x 20"]
    assert [sorted(found["seconds"]) for found in kept][1] == ["attention", "commit"]
    assert kept[1]["commit"]["us"] > 0


def test_the_command_writes_a_result_and_wants_a_gpu_for_more_than_a_try(tmp_path):
    out = tmp_path / "gpu.json"
    arguments = ["bench", "--gpu", "--out", str(out), "--device", "cpu", "--parts", "commit"]
    tried = CliRunner().invoke(app, [*arguments, "--tiny"])
    assert tried.exit_code == 0, tried.output
    assert "KV commit, us" in tried.output
    assert json.loads(out.read_text())["commit"]["us"] > 0
    refused = CliRunner().invoke(app, arguments)
    assert "bench --gpu needs a CUDA device, got cpu" in str(refused.exception)
    refused = CliRunner().invoke(app, [*arguments[:-1], "commit,steps,speed"])
    assert "parts must be of verify, commit" in str(refused.exception)
