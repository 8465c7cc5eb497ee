from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from specdec.bench.retrieval_arms import ArmName, make_drafter, train_stores
from specdec.bench.workload import WorkItem
from specdec.errors import ConfigError
from specdec.types import DraftTree, Request, RequestState, SamplingParams

TEXT = [1, 2, 9, 1, 2, 9, 1, 3, 8, 1, 3, 7, 1, 2, 9, 1]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("plain", ArmName("plain", 0, "own")),
        ("fused", ArmName("fused", None, "own")),
        ("suffix@8", ArmName("suffix", 8, "chain")),
        ("ppm=16", ArmName("ppm", 16, "tree")),
        ("ngram~4", ArmName("ngram", 4, "own")),
    ],
)
def test_a_name_says_what_is_drafted(name: str, told: ArmName) -> None:
    assert ArmName.of(name) == told


def draft(name: str, stores: Path) -> DraftTree:
    told = ArmName.of(name)
    drafter = make_drafter(told.base, stores, form=told.form)
    state = RequestState(Request("r", np.array(TEXT, np.int32), SamplingParams(max_new_tokens=9)))
    drafter.start([state])
    [tree] = drafter.propose([state], [told.budget or 0])
    drafter.stop(["r"])
    return tree


def test_a_fixed_length_is_a_chain_of_it_and_a_fixed_size_has_second_guesses(tmp_path: Path) -> None:
    answer = np.array(TEXT[:6], np.int32)
    train_stores([WorkItem("s", "t", answer, answer)], tmp_path / "s")
    for base in ("suffix", "ppm"):
        assert draft(f"{base}@4", tmp_path / "s").parents.tolist() == [-1, 0, 1, 2, 3]
        assert len(draft(f"{base}=6", tmp_path / "s")) == 7
    assert (draft("ppm=40", tmp_path / "s").parents == 0).sum() > 1
    with pytest.raises(ConfigError, match="lookahead has trees only: write lookahead=N"):
        draft("lookahead@4", tmp_path / "s")
