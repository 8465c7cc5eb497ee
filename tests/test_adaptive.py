from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from specdec.adaptive import controller_for
from specdec.build import build_engine, name_drafter
from specdec.controller import BackoffController, FixedController
from specdec.controller_adaptive import AdaptiveController
from specdec.cost_model import CostModel
from specdec.drafters.fusion import FusedDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.errors import ConfigError, UnsupportedError
from specdec.types import Request, SamplingParams
from tests.tiny_models import tiny_llama


def output(engine: object) -> list[int]:
    request = Request("r", np.array([1, 2, 3, 1, 2], np.int32), SamplingParams(max_new_tokens=24))
    return [token for part in engine.generate([request]) for token in part.new_ids]  # type: ignore[attr-defined]


def test_a_fused_name_is_made_of_names() -> None:
    fused = name_drafter("fused:suffix+lookahead+recycling")
    assert isinstance(fused, FusedDrafter)
    assert fused.names == ("suffix", "lookahead", "recycling")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fused:suffix+suffix", "1 to 8 different sources, got suffix, suffix"),
        ("fused:suffix+nobody", "drafter must be one of .*, got 'nobody'"),
        ("fused:suffix+fused:ngram", "cannot be fused again"),
        ("fused:", "drafter must be one of"),
    ],
)
def test_a_wrong_fused_name_is_explained(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        name_drafter(name)


def test_fused_drafters_get_an_adaptive_controller_that_shares_their_costs() -> None:
    fused, other = FusedDrafter([("ngram", NgramDrafter())]), CostModel()
    controller = controller_for([NgramDrafter(), fused])
    assert isinstance(controller, AdaptiveController)
    assert controller.costs is fused.costs
    assert controller_for([fused], costs=other).costs is fused.costs is other  # type: ignore[attr-defined]
    assert isinstance(controller_for([NgramDrafter()]), BackoffController)
    assert isinstance(controller_for([fused], 3), FixedController)


def test_an_engine_measures_its_costs_once_and_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny_llama()
    with build_engine(model, "none", budget=0) as engine:
        plain = output(engine)
    tables = []
    for _ in range(2):
        with build_engine(model, "fused:suffix+ngram", costs="measure") as engine:
            assert isinstance(engine.controller, AdaptiveController)
            tables.append(engine.controller.costs.step_ms(1, 128, 1))
            assert engine.controller.costs.is_measured
            assert output(engine) == plain
            assert engine.target.pool.num_used == 0  # type: ignore[attr-defined]
        [path] = (tmp_path / "specdec" / "costs").glob("*.json")
        assert "float32" in path.name
        tables.append(CostModel.load(path).step_ms(1, 128, 1))
    assert tables[2] == pytest.approx(tables[1], rel=1e-3)  # the second engine goes on where the first one ended


def test_fused_drafts_need_the_match_rule() -> None:
    with pytest.raises(UnsupportedError, match="needs the match rule"):
        build_engine(tiny_llama(), "fused:suffix+ngram", verifier="block")
