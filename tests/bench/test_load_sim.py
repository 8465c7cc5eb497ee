from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from specdec.bench.arrivals import Arrival
from specdec.bench.load_policies import LoadLimits, Policy, PruneModel
from specdec.bench.load_record import record_acceptance
from specdec.bench.load_sim import compare_policies, prepare_arrivals, simulate_load
from specdec.bench.load_steps import StepTimes, draft_table
from specdec.bench.recorded_acceptance import RecordedAcceptance, accepted_by_size, made_up_acceptance
from specdec.bench.workload import WorkItem
from specdec.cli import app
from specdec.cost_model import CostModel
from specdec.errors import ConfigError, LoadError
from specdec.types import DraftTree
from tests.test_step_budget import costs_of

SLO = (1000.0, 60.0)


def test_one_request_takes_exactly_what_the_table_says() -> None:
    costs = costs_of(1, 1.0)  # 19 + tokens
    [served], busy = simulate_load([Arrival(2.0, 11, 5)], costs, made_up_acceptance([0.5]), Policy("none"))
    first = 20.0 + 10  # ten prompt tokens and the root
    assert served.ttft_ms == pytest.approx(first)
    assert served.tpot_ms == pytest.approx(20.0)
    assert busy == pytest.approx((first + 4 * 20.0) / 1e3 / served.last_s)


def test_a_static_length_brings_what_was_recorded() -> None:
    tree = DraftTree(
        np.array([1, 5, 6, 9], np.int32), np.array([-1, 0, 1, 0], np.int32), np.array([1, 0.8, 0.3, 0.5], np.float32)
    )
    values, gains = accepted_by_size(tree, np.array([5, 6, 7], np.int32))
    assert values.tolist() == pytest.approx([0.8, 0.5, 0.3])
    assert gains.tolist() == [0, 1, 1, 2]  # the wrong sibling comes before the right grandchild


def test_prompts_are_cut_into_pieces_and_batches_share_steps() -> None:
    costs = costs_of(1, 1.0)
    arrivals = [Arrival(0.0, 2, 3), Arrival(0.0, 201, 3)]
    served, _ = simulate_load(arrivals, costs, made_up_acceptance([0.5]), Policy("none"), limits=LoadLimits(2, 100))
    late, early = sorted(served, key=lambda one: -one.prompt_tokens)
    assert late.ttft_ms > early.ttft_ms
    assert all(one.steps == 3 for one in served)


def test_replicas_share_the_arrivals() -> None:
    costs, arrivals = costs_of(1, 1.0), [Arrival(0.0, 5, 50) for _ in range(32)]
    found = [
        compare_policies(arrivals, costs, made_up_acceptance([0.5]), [Policy("none")], slo_ms=SLO, replicas=n)["none"]
        for n in (1, 8)
    ]
    assert found[1]["tokens_per_s"] > 3 * found[0]["tokens_per_s"]
    assert found[1]["requests"] == 32


def test_an_arrival_trace_can_be_made_faster() -> None:
    arrivals = [Arrival(10.0, 5, 7), Arrival(4.0, 500, 3), Arrival(6.0, 5, 0)]
    assert prepare_arrivals(arrivals, load=2.0, max_tokens=100) == [Arrival(0.0, 100, 3), Arrival(3.0, 5, 7)]
    with pytest.raises(ConfigError, match="no request with a response"):
        prepare_arrivals([])
    with pytest.raises(ConfigError, match="load must be > 0"):
        prepare_arrivals(arrivals, load=0)


def test_what_a_drafter_proposes_at_every_position_is_recorded(tmp_path: Path) -> None:
    text = np.array([1, 2, 3, 4] * 6, np.int32)
    items = [WorkItem("s", "t", text, text[:12]), WorkItem("s", "t", text[:4], np.array([9, 8, 7], np.int32))]
    record = record_acceptance(items, "fused:ngram+suffix")
    assert [answer.num_positions for answer in record.answers] == [12, 3]
    _, gains = record.answers[0].at(3)
    assert gains[-1] == 8  # the period goes on to the end of the answer
    assert record.answers[0].at(15)[1].tolist() == gains.tolist()  # behind the end it starts again
    record.save(tmp_path / "a.npz")
    again = RecordedAcceptance.load(tmp_path / "a.npz")
    assert again.answers[0].values.tolist() == record.answers[0].values.tolist()
    with pytest.raises(LoadError, match="cannot read recorded acceptance"):
        RecordedAcceptance.load(tmp_path / "b.npz")


def test_the_command_compares_policies(tmp_path: Path) -> None:
    costs_of(16, 1.0).save(tmp_path / "costs.json")
    made_up_acceptance([0.8], length=40).save(tmp_path / "acceptance.npz")
    trace = tmp_path / "arrivals.csv"
    trace.write_text("timestamp_s,prompt_tokens,response_tokens\n" + "".join(f"{i},20,30\n" for i in range(6)))
    args = [
        "simulate-load",
        "-a",
        trace,
        "--costs",
        tmp_path / "costs.json",
        "--acceptance",
        tmp_path / "acceptance.npz",
        "--policies",
        "none,adaptive",
        "-o",
        tmp_path / "out.json",
    ]
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out.json").exists()
    assert "adaptive" in done.output


def with_drafts(costs: CostModel, fixed_ms: float, each_ms: float) -> CostModel:
    costs.tables["draft"] = draft_table(fixed_ms, each_ms)
    return costs


def work_s(policy: str, costs: CostModel, *, batch: int = 8, pruning: PruneModel | None = None) -> float:
    arrivals = [Arrival(0.2 * i, 20, 60) for i in range(40)]
    found = compare_policies(
        arrivals, costs, made_up_acceptance([0.7, 0.2]), [Policy(policy)], slo_ms=SLO, limits=LoadLimits(batch, 128),
        pruning=pruning,
    )  # fmt: skip
    return float(found[policy]["work_s"])


def test_pruning_pays_where_rows_cost_and_never_loses() -> None:
    assert work_s("static-4+prune", costs_of(1, 2.0)) < 0.97 * work_s("static-4", costs_of(1, 2.0))
    dear = PruneModel(probe_ms=50.0)
    assert work_s("static-4+prune", costs_of(1, 2.0), pruning=dear) == work_s("static-4", costs_of(1, 2.0))
    with pytest.raises(ConfigError, match="pruning needs a depth"):
        PruneModel(depth=1.0)


def test_half_batches_pay_where_drafting_is_dear_and_never_lose() -> None:
    dear = with_drafts(costs_of(1, 4.0), 2.0, 6.0)  # a step of 8 takes 48 ms, their drafts 50
    assert work_s("static-2+overlap", dear) < 0.9 * work_s("static-2", dear)
    cheap = with_drafts(costs_of(32, 1.0), 0.1, 0.05)  # the target's time does not follow the tokens
    assert work_s("static-2+overlap", cheap) == pytest.approx(work_s("static-2", cheap), rel=1e-9)


def test_chunks_pay_where_rows_are_dear_and_never_lose() -> None:
    dear = with_drafts(costs_of(1, 4.0), 2.0, 6.0)
    assert work_s("static-4+chunks", dear) < 0.95 * work_s("static-4", dear)
    flat = with_drafts(costs_of(32, 1.0), 0.1, 0.05)  # a second forward costs more than the rows that it saves
    assert work_s("static-4+chunks", flat) == pytest.approx(work_s("static-4", flat), rel=1e-3)


def test_a_step_in_chunks_takes_what_its_parts_take() -> None:
    costs = with_drafts(costs_of(1, 1.0), 0.0, 4.0)  # 19 + tokens
    times = StepTimes(costs, Policy("static-8+chunks"), PruneModel())
    gains = [[0, 1, 2, 3, 4, 4, 4, 4, 4], [0] * 9]  # the first one's second half is verified, all of it wrong
    drafts = times.draft_ms(18, 64, 2)
    assert drafts == 8.0
    assert times.step_ms(2, [8, 8], gains, drafts, 64) == 8 + 19 + 18  # a second forward costs more
    steep = StepTimes(with_drafts(costs_of(1, 10.0), 0.0, 4.0), Policy("static-8+chunks"), PruneModel())
    first, second = steep.verify_ms(10, 0, 0, 64, 2), steep.verify_ms(4, 0, 0, 64, 1)
    assert steep.step_ms(2, [8, 8], gains, 8.0, 64) == 4 + first + second


def test_drafts_that_cost_more_than_they_bring_are_left_out() -> None:
    dear = with_drafts(costs_of(1, 4.0), 1.0, 8.0)
    assert work_s("static-2", dear) > 1.1 * work_s("none", dear)
    assert work_s("adaptive", dear) < work_s("none", dear) / 0.96


def test_wrong_input_is_named() -> None:
    with pytest.raises(ConfigError, match="none, adaptive or static-K, then .prune, .overlap or .chunks, got 'fast'"):
        Policy("fast")
    with pytest.raises(ConfigError, match="the cost table is empty"):
        simulate_load([Arrival(0, 1, 1)], CostModel(), made_up_acceptance([0.5]), Policy("none"))
    with pytest.raises(ConfigError, match="at least one answer"):
        RecordedAcceptance(())
