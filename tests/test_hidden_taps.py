"""The states that hooks take are those of ``output_hidden_states``, and nobody's hooks stay behind."""

from __future__ import annotations

import pytest
import torch

from specdec.hidden_taps import HiddenTaps
from tests.test_tree_target import CONFIGS, make_model
from tests.tiny_models import tiny_llama


def num_hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("kind", CONFIGS)
def test_taps_take_what_the_model_would_give(kind):
    model = make_model(kind)
    ids = torch.tensor([[5, 9, 3, 20]])
    with torch.inference_mode():
        states = model(ids, output_hidden_states=True).hidden_states
        layers = (len(states) - 1, 0, 1)
        before = num_hooks(model)  # transformers leaves some of its own
        taps = HiddenTaps.of(model, layers)
        if kind == "gpt2":  # its layers have another name
            assert taps is None
            return
        assert taps is not None
        with taps.taking() as taken:
            model(ids)
    assert torch.equal(taken.rows, torch.cat([states[layer][0] for layer in layers], -1))
    assert num_hooks(model) == before


def test_a_model_whose_layers_are_not_what_they_seem_has_no_taps():
    model = tiny_llama()
    assert HiddenTaps.of(model, (99,)) is None

    forward = model.forward

    def shifted(**inputs):
        out = forward(**inputs)
        out.hidden_states = (*out.hidden_states[1:], out.hidden_states[0])
        return out

    model.forward = shifted
    assert HiddenTaps.of(model, (1,)) is None
