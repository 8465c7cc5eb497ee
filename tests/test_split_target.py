"""Targets whose layers run on several devices.

Two kinds of stand-ins, for there is one device here: "cpu" and "cpu:0" are two names to whoever keeps a thing for each
device, and hold real numbers; fake tensors hold none, and every operation over two devices raises.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import backend_registration

from specdec.build import build_engine, build_target, load_drafter
from specdec.config import EngineConfig
from specdec.drafters.checkpoint import DrafterKind, PendingDrafter
from specdec.errors import UnsupportedError
from specdec.kernels.tree_batch import TreeBatch
from specdec.placement import device_of, is_split
from specdec.probe import probe
from specdec.routes import Route
from specdec.split_attention import SplitAttention, batch_on
from specdec.tree_target import TreeTarget, kv_bytes_by_device
from specdec.types import Request, SamplingParams
from tests.test_kernel_target import make, script, target_of
from tests.tiny_models import tiny_llama

accelerate = pytest.importorskip("accelerate")

CPU, OTHER = torch.device("cpu"), torch.device("cpu:0")


def split_calls(model, devices=(CPU, OTHER)):
    calls = probe(model, limit=120)
    return tuple(replace(call, device=devices[i % 2]) for i, call in enumerate(calls))


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [("llama", "torch"), ("gemma3", "torch"), pytest.param("llama", "triton", marks=pytest.mark.slow)],
)
def test_a_split_target_gives_the_logits_of_one_device(kind, kernels, monkeypatch):
    model, seen, real = make(kind), [], SplitAttention.attend
    monkeypatch.setattr(SplitAttention, "attend", lambda self, *rest: (seen.append(self), real(self, *rest))[1])
    split = TreeTarget(
        model, split_calls(model), kv_tokens=200, max_length=120, max_batch_size=2, max_step_tokens=64, kernels=kernels
    )
    assert {split.pool.device_of_call[i] for i in range(2)} == {CPU, OTHER}
    for have, want in zip(script(split), script(target_of(model)), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    assert len({id(one) for one in seen}) == 3, "one for each forward"


def test_an_engine_decodes_on_a_split_target_and_shares_its_memory_out():
    model = tiny_llama()
    route = Route("tree", (), split_calls(model))
    per_device = kv_bytes_by_device(route.calls, torch.float32)
    assert set(per_device) == {CPU, OTHER}
    ids = np.array([3, 9, 4, 3, 9, 4, 3, 9], dtype=np.int32)
    expected = model.generate(torch.from_numpy(ids)[None].long(), do_sample=False, max_new_tokens=12)
    with build_engine(model, "ngram", budget=4, route=route, max_length=96, prefix_cache=True) as engine:
        assert engine.target.is_split
        for output in engine.generate([Request("a", ids, SamplingParams(max_new_tokens=12))]):
            state = output.state
    assert state.num_drafted > 0
    assert state.output_ids.tolist() == expected[0, len(ids) :].tolist()


def test_what_a_split_target_cannot_do_is_refused_by_name():
    model = tiny_llama()
    route = Route("tree", (), split_calls(model))
    with pytest.raises(UnsupportedError, match="several devices serve default numerics, and drafters that read no"):
        build_target(model, EngineConfig.of(kv_tokens=64, max_length=32), route=route, hidden_layers=(1,))
    target = build_target(model, EngineConfig.of(kv_tokens=64, max_length=32, graphs=False), route=route)
    with pytest.raises(UnsupportedError, match="early pruning needs .*one device"):
        target.prune_with(None)
    target.device, target.runner = torch.device("cuda"), object()  # as if it had kernels
    with pytest.raises(UnsupportedError, match="CUDA graphs need all layers on one device"):
        target.capture_graphs()


def test_a_batch_travels_whole_with_the_rows_and_columns_in_use():
    numbers = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    slots = torch.arange(60, dtype=torch.int32).view(5, 12)
    batch = TreeBatch(
        numbers(0, 1, 3), numbers(0, 1, 3), numbers(2, 4), numbers(0, 1), numbers(3, 1), slots, numbers(2, 4, 5),
        numbers(1, 1, 3)[:, None], 7, numbers(0, 0, 1)[:, None],
    )  # fmt: skip
    assert batch_on(batch, CPU) is batch
    there = batch_on(batch, OTHER)
    assert there.slots.tolist() == [slots[3, :7].tolist(), slots[1, :7].tolist()]
    assert there.rows.tolist() == [0, 1]
    away = batch_on(batch, torch.device("meta"))
    tensors = [getattr(away, name) for name in TreeBatch.__slots__ if name != "max_columns"]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert away.slots.shape == (2, 7)


def dispatched(model, first: str, second: str):
    """The model as ``device_map`` leaves it: two layers on two devices, and hooks that carry states between them."""
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), first)
    places |= dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), second)
    for name, place in places.items():
        for module in model.get_submodule(name).modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in list(tensors.items()):
                    if tensor is not None:
                        tensors[key] = torch.zeros(tensor.shape, device=place)
    accelerate.dispatch_model(model, places, main_device=first)
    return model


def test_drafters_that_borrow_weights_are_refused_before_they_load():
    model = dispatched(tiny_llama(), "cpu", "meta")
    model.model.layers[1].register_parameter("more", torch.nn.Parameter(torch.zeros(1, device="meta")))
    assert is_split(model)
    assert device_of(model) == CPU, "the main device"
    kind = DrafterKind(lambda *_: pytest.fail("it was loaded"), read=lambda name: (name, {}))
    with pytest.raises(UnsupportedError, match="eagle:x reads weights of the target, which must run on one device"):
        load_drafter(PendingDrafter("eagle:x", kind), model)


@torch.no_grad()
def forward_over_two_faked_devices() -> None:
    """Where every operation over two devices raises. It makes torch know another kind of device: for good."""
    model = tiny_llama()
    calls = probe(model, limit=120)
    # Not fake CUDA devices: a build without CUDA cannot even cut a piece out of one of their tensors.
    backend_registration._setup_privateuseone_for_python_backend("faked")
    devices = first, second = torch.device("faked:0"), torch.device("faked:1")
    with FakeTensorMode(allow_non_fake_inputs=True):
        dispatched(model, str(first), str(second))
        assert device_of(model) == first
        target = TreeTarget(
            model, [replace(call, device=place) for call, place in zip(calls, devices, strict=True)], kv_tokens=200,
            max_length=120, max_batch_size=2, max_step_tokens=64, kernels="torch",
        )  # fmt: skip
        assert [target.pool.groups["full", 0].keys[call].device for call in range(2)] == [first, second]
        for logits in script(target):
            assert logits.device == first


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch is too old for this"
)
def test_no_operation_of_a_forward_mixes_devices():
    code = "from tests.test_split_target import forward_over_two_faked_devices as run; run()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
