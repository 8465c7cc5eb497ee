from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from specdec.cost_measure import measure_costs
from specdec.cost_model import BATCHES, CONTEXTS, TOKENS, CostModel, CostTable, cost_file
from specdec.errors import ConfigError, LoadError
from specdec.toy import ToyTarget


def true_ms(tokens: float, context: float, batch: float) -> float:
    return 20.0 + max(0.0, tokens - 16) * 0.8 + context * batch * 1e-4


def is_monotone(table: CostTable) -> bool:
    return all((np.diff(table.ms, axis=axis) >= 0).all() for axis in range(3))


def test_it_finds_noisy_costs_from_steps_and_stays_monotone() -> None:
    rng, table = np.random.default_rng(0), CostTable()
    for _ in range(3000):
        batch = int(rng.choice([1, 4, 16]))
        tokens, context = batch + int(rng.integers(0, 64)), float(rng.choice([200, 800]))
        table.observe(tokens, context, batch, true_ms(tokens, context, batch) * rng.lognormal(0, 0.1))
    assert is_monotone(table)
    for batch, tokens in ((1, 1), (1, 8), (4, 20), (16, 16), (16, 60)):
        assert table.at(tokens, 400, batch) == pytest.approx(true_ms(tokens, 400, batch), rel=0.12)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    table = CostTable()
    for factor in (1.0, 3.0):
        for _ in range(150):
            table.observe(8, 300, 1, 10.0 * factor)
    assert table.at(8, 300, 1) == pytest.approx(30.0, rel=0.05)


def test_a_first_call_that_compiles_is_forgotten() -> None:
    table = CostTable()
    for ms in (900.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0):
        table.observe(4, 128, 1, ms)
    assert table.at(4, 128, 1) < 20.0


def test_a_disturbed_step_counts_little() -> None:
    table = CostTable()
    for _ in range(100):
        table.observe(4, 128, 1, 10.0)
    table.observe(4, 128, 1, 5000.0)
    assert table.at(4, 128, 1) < 13.0


def test_beyond_the_grid_the_last_slope_goes_on() -> None:
    table = CostTable(np.broadcast_to(np.array(TOKENS, float), (len(BATCHES), len(CONTEXTS), len(TOKENS))).copy())
    assert table.at(2048, 100, 1) == pytest.approx(2048)
    assert table.curve([1, 5, 10], 100, 1).tolist() == pytest.approx([1, 5, 10])


def test_parts_are_apart_and_survive_a_file(tmp_path: Path) -> None:
    costs = CostModel()
    costs.tables["target"].observe(1, 128, 1, 20.0)
    costs.tables["verify"].observe(1, 128, 1, 2.0)
    costs.tables["draft"].observe(1, 128, 1, 5.0)
    assert costs.step_ms(1, 128, 1) == pytest.approx(22.0)
    path = tmp_path / "new" / "table.json"
    costs.save(path)
    again = CostModel.load(path)
    assert again.step_ms(1, 128, 1) == pytest.approx(22.0)
    assert again.tables["draft"].at(1, 128, 1) == pytest.approx(5.0)
    assert not again.tables["host"].is_measured


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(LoadError, match="cannot read"):
        CostModel.load(path)
    path.write_text("{}")
    with pytest.raises(LoadError, match="measure it again"):
        CostModel.load(path)
    data = CostModel().as_dict()
    data["tables"] = {"target": {"ms": [1], "counts": [1]}}
    path.write_text(json.dumps(data))
    with pytest.raises(LoadError, match="damaged"):
        CostModel.load(path)
    with pytest.raises(ConfigError, match="parts of a cost model"):
        CostModel({"lunch": CostTable()})


def test_the_file_is_named_after_what_the_times_depend_on(tmp_path: Path) -> None:
    assert cost_file(["org/model", "cpu", "float32"], folder=tmp_path).name == "org-model_cpu_float32.json"


def test_measuring_leaves_the_target_as_it_was() -> None:
    target = ToyTarget(vocab_size=20, seed=1)
    costs = measure_costs(target, batches=(1, 4), contexts=(16, 64), max_tokens=16, max_seconds=1.0)
    assert costs.is_measured
    assert target.num_held_tokens == 0
    assert is_monotone(costs.tables["target"])
    assert costs.step_ms(16, 64, 1) > costs.step_ms(1, 64, 1)


def test_a_target_without_room_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no room"):
        measure_costs(ToyTarget(vocab_size=20, max_length=20))
