"""The measurement of block-diffusion heads runs whole on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from specdec.bench.diffusion_drafting import against_best_fixed, arms_of, calibrate, compare, count, measure
from tests.drafters.diffusion_checkpoints import write
from tests.drafters.eagle_checkpoints import eagle_target


def test_all_arms_write_as_many_tokens_and_calibration_is_judged_apart(tmp_path: Path) -> None:
    model: Any = eagle_target()
    head = write("deepspec-dspark", tmp_path)
    prompts = [np.arange(5, 17, dtype=np.int32), np.arange(40, 60, dtype=np.int32)]
    arms = {name: drafter for name, drafter in arms_of(head, None, 2).items() if name != "fixed 1"}
    rows = measure(model, None, arms, prompts, num_new=8, repeats=1)
    assert rows.keys() == arms.keys()
    assert rows["plain"]["acceptance_length"] == 1.0
    assert rows["fixed 2"]["drafted_per_step"] > 0.5
    ratios = against_best_fixed(rows)
    assert ratios["best_fixed"] == "fixed 2"
    assert ratios["throughput"]["least"] <= ratios["throughput"]["greatest"]
    table = count(model, None, arms["fixed 2"], prompts, num_new=8)
    assert [tokens for tokens, _ in table] == [8, 8]
    assert sum(steps for _, steps in table) == 16 / rows["fixed 2"]["acceptance_length"]
    _, found = calibrate(model, head, prompts[:1], prompts[1:], num_new=8)
    assert len(found["after"]["errors"]) == len(found["before"]["errors"]) > 0
    assert all(0 <= error <= 1 for error in found["after"]["errors"])


def test_a_difference_between_drafters_is_judged_prompt_by_prompt() -> None:
    """The same lead on every prompt is certain, however much the prompts differ; a lead on one of them is not."""
    slow = [[90, 90], [90, 30], [90, 45], [90, 60]]
    even = compare([[tokens, round(steps * 0.8)] for tokens, steps in slow], slow)
    assert even["second"] == 360 / 225
    assert even["interval_95"][0] > 0.2
    one = compare([[90, 60], *slow[1:]], slow)
    assert one["difference"] > 0 >= one["interval_95"][0]
