"""The target's own first layers as its drafter: what they say, and that the target is what it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from specdec.build import build_engine, name_drafter
from specdec.drafters.early_exit import first_layers
from specdec.errors import ConfigError, UnsupportedError
from specdec.types import Request, SamplingParams
from tests.drafters.eagle_checkpoints import eagle_target

PROMPTS = [np.arange(start, start + 9, dtype=np.int32) for start in (5, 60)]


def decode(model: Any, drafter: str, **law: Any) -> tuple[list[list[int]], int, int]:
    sampling = SamplingParams(max_new_tokens=16, seed=4, **law)
    requests = [Request(f"r{i}", prompt, sampling) for i, prompt in enumerate(PROMPTS)]
    with build_engine(model, drafter, budget=4) as engine:
        last = {output.request_id: output.state for output in engine.generate(requests)}
    states = [last[f"r{i}"] for i in range(len(PROMPTS))]
    drafted, accepted = sum(s.num_drafted for s in states), sum(s.num_accepted for s in states)
    return [state.output_ids.tolist() for state in states], drafted, accepted


@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 0.9}])
def test_the_text_stays_and_the_target_keeps_its_layers(law: dict[str, float]):
    model = eagle_target()
    plain, *_ = decode(model, "none", **law)
    texts, drafted, _ = decode(model, "early-exit:3?min_gain=0", **law)
    assert texts == plain
    assert drafted > 0
    assert len(model.model.layers) == 8


def test_it_says_what_the_first_layers_say():
    model = eagle_target()
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        with first_layers(model, 3):
            logits = model(ids).logits
        torch.testing.assert_close(logits, model.lm_head(model.model.norm(states[3])))


def test_layers_that_add_nothing_are_not_missed():
    model = eagle_target()
    with torch.no_grad():
        for layer in model.model.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    _, drafted, accepted = decode(model, "early-exit:2?top_k=1&width=1&min_gain=0")
    assert accepted == drafted > 0


def test_bad_names_are_refused():
    for name in ("early-exit:", "early-exit:0", "early-exit:x"):
        with pytest.raises(ConfigError, match="needs the number of layers"):
            name_drafter(name)
    with pytest.raises(UnsupportedError, match="early-exit:8 needs more layers than that, the target has 8"):
        build_engine(eagle_target(), "early-exit:8")
