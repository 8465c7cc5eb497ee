"""Models that accelerate has spread over memory and disk decode like others; layers that run in two places do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.build import build_engine
from specdec.errors import UnsupportedError
from specdec.placement import device_of, is_offloaded
from specdec.routes import choose_route
from specdec.types import Request, SamplingParams
from tests.tiny_models import tiny_llama

accelerate = pytest.importorskip("accelerate")


def test_a_model_on_memory_and_disk_writes_its_text(tmp_path):
    plain = tiny_llama()
    plain.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload", dtype=torch.float32
    ).eval()
    assert any(parameter.is_meta for parameter in model.parameters())
    assert is_offloaded(model)
    assert device_of(model) == torch.device("cpu")
    ids = np.array([3, 9, 4, 3, 9, 4, 3, 9], dtype=np.int32)
    expected = plain.generate(torch.from_numpy(ids)[None].long(), do_sample=False, max_new_tokens=12)
    texts = []
    for drafter, budget in (("none", 0), ("ngram", 4)):
        with build_engine(model, drafter, budget=budget) as engine:
            assert engine.target.supports_trees
            for output in engine.generate([Request("a", ids, SamplingParams(max_new_tokens=12))]):
                state = output.state
        texts.append(state.output_ids.tolist())
    assert texts == [expected[0, len(ids) :].tolist()] * 2
    assert state.num_drafted > 0
    assert any(parameter.is_meta for parameter in model.parameters()), "and it is offloaded as before"


def test_layers_that_run_on_several_devices_are_refused_by_name():
    model = tiny_llama()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    model.model.layers[1].mlp.up_proj._hf_hook.execution_device = torch.device("meta")
    message = "LlamaForCausalLM must run on one device, got cpu, meta"
    assert message in choose_route(model, max_length=64).reasons[0]
    with pytest.raises(UnsupportedError, match=message):
        build_engine(model)
