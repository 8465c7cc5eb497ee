"""Confidences become true: temperatures are found again, prefix by prefix, and kept beside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdec.drafters.calibration import CalibrationLog, Temperatures, calibration_error, reliability
from specdec.drafters.diffusion_loading import CALIBRATION_FILE, load_diffusion
from specdec.errors import ConfigError, LoadError
from tests.drafters.diffusion_checkpoints import write
from tests.drafters.drafting import run
from tests.drafters.eagle_checkpoints import eagle_target

TRUE = (0.5, 2.0, 3.0)


def rounds(num: int) -> CalibrationLog:
    """Rounds of a head whose confidences are right at temperatures ``TRUE``."""
    rng, log = np.random.default_rng(1), CalibrationLog()
    for logits in rng.normal(0.5, 2.0, (num, len(TRUE))):
        chances = 1 / (1 + np.exp(-logits / np.array(TRUE)))
        log.add(logits, len(TRUE), int((rng.random(len(TRUE)) < chances).cumprod().sum()))
    return log


def test_the_temperatures_of_the_making_are_found_and_calibrate() -> None:
    log = rounds(8000)
    fitted = log.fit()
    assert np.abs(np.log(np.array(fitted.values) / np.array(TRUE))).max() < 0.35
    assert max(log.errors(fitted)) < 0.02
    assert sum(log.errors(Temperatures())) > 3 * sum(log.errors(fitted))
    fresh = rounds(8000)
    assert max(fresh.errors(fitted)) < 0.03


def test_the_error_is_that_of_the_definition() -> None:
    chances = np.array([0.05, 0.05, 0.95, 0.75])
    happened = np.array([False, True, True, False])
    assert reliability(chances, happened) == [(0.05, 0.5, 2), (0.75, 0.0, 1), (0.95, 1.0, 1)]
    assert calibration_error(chances, happened) == pytest.approx((2 * 0.45 + 0.75 + 0.05) / 4)
    assert calibration_error(np.empty(0), np.empty(0, dtype=np.bool_)) == 0.0
    assert reliability(np.array([1.0]), np.array([True])) == [(1.0, 1.0, 1)]


def test_what_was_not_sent_teaches_nothing() -> None:
    log = CalibrationLog()
    log.add(np.array([0.0, 0.0]), 1, 1)
    log.add(np.array([0.0, 0.0]), 2, 0)
    (first, took), (second, went) = log.prefixes(Temperatures())
    assert (first.tolist(), took.tolist()) == ([0.5, 0.5], [True, False])
    assert (second.tolist(), went.tolist()) == ([0.25], [False])


def test_rounds_of_an_engine_are_collected_and_a_file_is_used(tmp_path: Path) -> None:
    target: Any = eagle_target()
    path = write("deepspec-dspark", tmp_path)
    drafter: Any = load_diffusion(path, target, None, None)
    drafter.log = CalibrationLog()
    prompts = [np.arange(9, dtype=np.int32), np.arange(40, 50, dtype=np.int32)]
    states, watch = run(target, drafter, prompts, 20)
    drafted = [tree.num_draft_tokens for _, tree in watch.seen if len(tree) > 1]
    assert drafter.log.drafted == drafted
    assert sum(drafter.log.accepted) == sum(state.num_accepted for state in states)
    drafter.log.fit().save(path / CALIBRATION_FILE)
    again: Any = load_diffusion(path, target, None, None)
    assert again._temperatures == drafter.log.fit() != Temperatures()


def test_bad_temperatures_are_refused(tmp_path: Path) -> None:
    for values in ((), (0.0,), (float("nan"),)):
        with pytest.raises(ConfigError, match="positive and finite"):
            Temperatures(values)
    with pytest.raises(ConfigError, match="there are none"):
        CalibrationLog().fit()
    for text in ("{", json.dumps({"temperatures": [-1]}), json.dumps({})):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(LoadError, match="cannot read temperatures"):
            Temperatures.load(tmp_path / "x.json")
