"""The figures of ``specdec.bench.packed_speed`` are what it says they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.bench.packed_speed import _bytes, _summary, step_times
from specdec.packed_linear import pack_linears


def arm(step_ms: float, calls: list[str], name: str):
    def decode(prompt_ids: np.ndarray, num_new: int) -> list[float]:
        calls.append(name)
        gaps = [5.0, 3.0, *[step_ms / 1e3] * (num_new - 3)]  # the prompt and a compiler are waited for first
        return np.cumsum([0.0, *gaps]).tolist()

    return decode


def test_a_step_is_the_median_gap_after_the_first_two_and_arms_take_turns():
    calls: list[str] = []
    arms = {"slow": arm(30.0, calls, "slow"), "own": arm(10.0, calls, "own")}
    times = step_times(arms, np.arange(3, dtype=np.int32), num_new=8, repeats=2)
    assert calls == ["slow", "own"] * 3
    assert times["slow"] == pytest.approx([30.0, 30.0])
    found = _summary(times, "own")
    assert found["step_ms"]["own"]["median_ms"] == pytest.approx(10.0)
    assert found["speedup_of_packed_over"]["slow"]["median"] == pytest.approx(3.0)
    assert "own" not in found["speedup_of_packed_over"]


def test_bytes_are_counted_of_what_is_packed():
    model = torch.nn.Sequential(torch.nn.Linear(640, 640), torch.nn.Linear(8, 8))
    assert _bytes(model)["num_packed_layers"] == 0
    pack_linears(model, "test")
    counted = _bytes(model)
    assert counted["num_packed_layers"] == 1
    assert counted["bytes_when_dense"] == 4 * 640 * 640 <= counted["packed_bytes"]
