"""Fused norms against the modules that they stand for: found by what they compute, equal within rounding, undone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from specdec.drafters.decoder_parts import rms_norm
from specdec.errors import UnsupportedError
from specdec.fused_norm import FusedNorm, can_fuse, fuse_norms
from specdec.stand_ins import let_go


class Gated(Qwen3RMSNorm):
    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        normed = super().forward(hidden_states)
        return normed if gate is None else normed * gate


NORMS = {
    "qwen3": lambda width: Qwen3RMSNorm(width, eps=1e-6),
    "gemma3": lambda width: Gemma3RMSNorm(width, eps=1e-5),
    "t5": lambda width: T5LayerNorm(width),
    "gated": lambda width: Gated(width),
    "torch": lambda width: nn.RMSNorm(width),
}


class Subtracting(Qwen3RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class AcrossRows(Qwen3RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) + hidden_states.mean()


def model_of(norm: nn.Module) -> nn.Module:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        norm.weight.copy_(torch.randn(norm.weight.shape))
    return nn.Sequential(norm)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 3, 32, 257])
@pytest.mark.parametrize("kind", NORMS)
def test_a_fused_norm_is_as_near_to_float64_as_the_norm(kind, width):
    model = model_of(NORMS[kind](width))
    original = model[0]
    fuse_norms(model, "test")
    assert isinstance(model[0], FusedNorm)
    for x in (rows(width), rows(1, 7, width), 1e-4 * rows(2, 3, width), 100 * rows(5, 2, width).transpose(0, 1)):
        weight = original.weight.double() + (kind == "gemma3")
        eps = model[0]._eps
        exact = weight * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + float(eps)).sqrt()
        error, error_before = ((y - exact).abs().max() for y in (model(x), original(x)))
        assert error <= 2 * error_before + 2 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert model(x).shape == x.shape


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(32),
        nn.LayerNorm(32, bias=False),
        Subtracting(32),
        AcrossRows(32),
        nn.PReLU(32),
        Qwen3RMSNorm(32).bfloat16(),
    ],
)
def test_what_computes_something_else_stays(norm):
    model = nn.Sequential(norm)
    fuse_norms(model, "test")
    assert model[0] is norm


@torch.no_grad()
def test_heads_norms_are_the_same_within_rounding():
    x, weight = rows(3, 5, 48), rows(48)
    assert can_fuse(x)
    exact = weight.double() * nn.functional.rms_norm(x.double(), (48,), eps=1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), exact, rtol=1e-6, atol=1e-7)
    assert not can_fuse(x.double())
    with torch.enable_grad():
        assert not can_fuse(x)
        assert rms_norm(x, weight.requires_grad_(), 1e-5).requires_grad


@torch.no_grad()
def test_a_gate_is_not_lost():
    model = model_of(Gated(8))
    fuse_norms(model, "test")
    x, gate = rows(2, 8), rows(1, 8)
    assert isinstance(model[0], FusedNorm)
    torch.testing.assert_close(model[0](x, gate=gate), model[0](x) * gate)


def test_a_norm_that_somebody_watches_stays():
    watched, replaced = Qwen3RMSNorm(8), Qwen3RMSNorm(8)
    watched.register_forward_hook(lambda *_: None)
    replaced.forward = replaced.forward
    model = nn.Sequential(watched, replaced, Qwen3RMSNorm(8))
    fuse_norms(model, "test")
    assert [type(layer) for layer in model] == [Qwen3RMSNorm, Qwen3RMSNorm, FusedNorm]


@torch.no_grad()
def test_rows_of_another_width_are_the_norm_s_own_affair():
    model = model_of(Qwen3RMSNorm(16))
    fuse_norms(model, "test")
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(rows(2, 32))


@torch.no_grad()
def test_a_row_does_not_depend_on_how_many_there_are():
    model = model_of(Qwen3RMSNorm(100))
    fuse_norms(model, "test")
    assert isinstance(model[0], FusedNorm)
    x = rows(70, 100)
    alone = torch.cat([model(row[None]) for row in x])
    for first in range(0, 70, 9):
        assert torch.equal(model(x[first:]), alone[first:])


def test_the_norms_come_back_when_the_last_holder_lets_go():
    model = model_of(Qwen3RMSNorm(16))
    model.append(model[0])  # one module in two places
    norm, before = model[0], {name: value.clone() for name, value in model.state_dict().items()}
    fuse_norms(model, "first")
    fuse_norms(model, "second")
    assert model[0] is model[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    twin = copy.deepcopy(model)
    assert type(twin[0]) is Qwen3RMSNorm
    assert twin[0].weight is not norm.weight
    let_go(model, "first")
    assert isinstance(model[0], FusedNorm)
    with pytest.raises(UnsupportedError, match="packed model"):
        model.load_state_dict(before)
    with pytest.raises(UnsupportedError, match="cannot become"):
        model.double()
    let_go(model, "second")
    assert model[0] is norm
    assert model[1] is norm


def test_gradients_go_through_the_norm_itself():
    model = model_of(Qwen3RMSNorm(16))
    norm = model[0]
    x = rows(3, 16).requires_grad_()
    norm(x).sum().backward()
    wanted = x.grad.clone()
    fuse_norms(model, "test")
    x.grad = None
    model(x).sum().backward()
    assert torch.equal(x.grad, wanted)
    assert torch.equal(model(x.detach().double()), norm(x.detach().double())), "another dtype is the norm's own affair"
