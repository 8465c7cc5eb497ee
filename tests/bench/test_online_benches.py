"""The arithmetic of the benchmarks of online training, and the traffic that they serve."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from specdec.bench.capture_overhead import relative_cost
from specdec.bench.day_zero import Traffic, shifts
from specdec.bench.day_zero_plot import draw
from specdec.bench.rejected_tokens import compare

TINY = Path(__file__).resolve().parents[2] / "bench" / "tiny"


def test_a_cost_is_the_geometric_mean_of_pairs_with_an_interval_around_it() -> None:
    found = relative_cost([(1.02, 1.0), (2.04, 2.0), (0.51, 0.5)])
    assert found["percent"] == pytest.approx(2.0)
    assert found["interval_95_percent"] == pytest.approx([2.0, 2.0])
    noisy = relative_cost([(1.1, 1.0), (1.0, 1.1)] * 20)
    low, high = noisy["interval_95_percent"]
    assert low < noisy["percent"] < high
    assert noisy["percent"] == pytest.approx(0.0, abs=1e-3)


def test_terms_are_compared_seed_by_seed_and_request_by_request() -> None:
    found = compare([[2.0, 3.0], [2.5, 3.5]], [[1.0, 2.0], [1.0, 2.0]])
    assert found["mean"] == 1.25
    assert found["by_seed"] == [1.0, 1.5]
    assert found["interval_95"] == [1.25, 1.25]


def test_a_shift_is_a_drop_a_recovery_and_what_was_forgotten() -> None:
    rounds = [10] * 30 + [40] * 12 + [20] * 18 + [20] * 15  # steps for 40 tokens, request by request
    rows = [[float(i), 40, steps, 1, "B" if 30 <= i < 60 else "A"] for i, steps in enumerate([*rounds, *[10] * 30])]
    found = shifts(rows, 30)
    assert found["A"]["last_third"] == 4.0
    assert (found["B"]["first_third"], found["B"]["last_third"]) == (1.0, 2.0)
    assert (found["drop"], found["learned"]) == (3.0, 1.0)
    assert found["forgotten"] == 2.0
    assert 13 <= found["regained_after"] <= 15
    assert shifts([row if row[0] < 60 else [*row[:2], 40, *row[3:]] for row in rows], 30)["regained_after"] is None


def test_a_project_asks_for_ever_new_edits_of_the_same_functions() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    first, again = (list(itertools.islice(Traffic(tokenizer).project(4), 40)) for _ in range(2))
    assert first == again
    assert len({tuple(ids) for ids in first}) > 25
    codes = {tokenizer.decode(ids).split("```python\n")[1].split("```")[0] for ids in first}
    assert len(codes) == 4


def test_a_cursor_moves_on_in_some_places() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    asked = list(itertools.islice(Traffic(tokenizer).completions(3), 30))
    assert {len(ids) for ids in asked} == {192}
    common = {tuple(ids[60:120]) for ids in asked}
    assert 3 < len(common) <= 30


def test_curves_are_drawn_with_the_bar(tmp_path: Path) -> None:
    rows = [{"minutes": float(i), "acceptance_length": 1 + i / 10} for i in range(20)]
    (tmp_path / "day_zero.json").write_text(json.dumps({"curve": rows}))
    root = ElementTree.fromstring(draw(tmp_path))
    drawn = [element for element in root.iter() if element.tag.endswith("polyline")]
    assert len(drawn) == 2
