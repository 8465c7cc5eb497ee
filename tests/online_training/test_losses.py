"""Losses against formulas written down in float64, and the fused path against the eager one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.errors import ConfigError
from specdec.kernels.distillation import distillation_loss
from specdec.online_training import losses
from specdec.online_training.losses import (
    LOSS_NAMES,
    acceptance_rates,
    confidence_losses,
    decay_weights,
    dpace_weights,
    parse_mix,
    row_losses,
)

MIXES = [*({name: 1.0} for name in LOSS_NAMES), {"cross_entropy": 0.1, "total_variation": 1.8}]


def logits(seed: int, rows: int = 7, vocab_size: int = 33) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, vocab_size, generator=generator) * 3 for _ in range(2))  # type: ignore[return-value]


def formula(student: np.ndarray, teacher: np.ndarray, name: str, labels: np.ndarray, share: np.ndarray) -> np.ndarray:
    """[T] float64, each loss as its source states it; ``share`` is the hybrid's constant factor."""
    q, p = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (student, teacher))
    alpha = np.minimum(p, q).sum(-1)
    kl = (p * (np.log(p) - np.log(q))).sum(-1)
    values = {
        "cross_entropy": -np.log(q[np.arange(len(q)), labels]),
        "forward_kl": kl,
        "reverse_kl": (q * (np.log(q) - np.log(p))).sum(-1),
        "total_variation": 1 - alpha,
        "lk_alpha": -np.log(alpha),
        "lk_hybrid": share * kl + (1 - share) * (1 - alpha),
    }
    return values[name]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "+".join(mix))
def test_losses_and_gradients_are_the_formulas_in_float64(mix: dict[str, float]):
    student, teacher = logits(1)
    labels = torch.arange(7)
    z, t = student.double().numpy(), teacher.double().numpy()
    q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (z, t))
    share = np.exp(-3 * np.minimum(p, q).sum(-1))

    def exact(logits: np.ndarray) -> np.ndarray:
        parts = [factor * formula(logits, t, name, labels.numpy(), share) for name, factor in mix.items()]
        return np.sum(parts, axis=0)

    given = student.clone().requires_grad_()
    found = row_losses(given, teacher, mix, labels=labels)
    found.sum().backward()
    np.testing.assert_allclose(found.detach().numpy(), exact(z), rtol=2e-5, atol=2e-6)
    assert given.grad is not None
    step = 1e-6
    for token in range(0, 33, 4):  # central differences
        moved = np.zeros_like(z)
        moved[:, token] = step
        slope = (exact(z + moved) - exact(z - moved)) / (2 * step)
        np.testing.assert_allclose(given.grad[:, token].numpy(), slope, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "+".join(mix))
def test_the_fused_losses_are_the_eager_ones(mix: dict[str, float], monkeypatch: pytest.MonkeyPatch):
    student, teacher = logits(2)
    found = []
    for is_fused in (False, True):
        if is_fused:
            monkeypatch.setattr(
                losses,
                "distillation_loss_reference",
                lambda s, t, name: distillation_loss(s, t, name, backend="triton"),
            )
        given = student.clone().requires_grad_()
        values = row_losses(given, teacher, mix)
        values.sum().backward()
        found.append((values.detach(), given.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-6)


def test_no_gradient_reaches_the_teacher_and_the_acceptance_rate_is_the_shared_mass():
    student, teacher = logits(3)
    teacher.requires_grad_()
    row_losses(student.requires_grad_(), teacher, {"lk_hybrid": 1.0}).sum().backward()
    assert teacher.grad is None
    q, p = student.detach().double().softmax(-1), teacher.detach().double().softmax(-1)
    torch.testing.assert_close(
        acceptance_rates(student, teacher).double(), torch.minimum(p, q).sum(-1), rtol=0, atol=1e-6
    )


def test_laws_that_share_nothing_have_finite_losses():
    student, teacher = torch.full((1, 8), -1e4), torch.full((1, 8), -1e4)
    student[0, 0] = teacher[0, 1] = 1e4
    for name in LOSS_NAMES:
        given = student.clone().requires_grad_()
        value = row_losses(given, teacher, {name: 1.0})
        value.sum().backward()
        assert given.grad is not None
        assert bool(value.isfinite().all() and given.grad.isfinite().all()), name


def test_dpace_weights_are_the_sums_of_products_of_the_paper():
    probs = torch.tensor([[0.9, 0.2, 0.7, 0.0], [0.0, 1.0, 1.0, 1.0]])
    smooth = 0.5 * probs.double().numpy() + 0.5
    expected = np.array([[sum(np.prod(row[: m + 1]) for m in range(j, 4)) for j in range(4)] for row in smooth])
    np.testing.assert_allclose(dpace_weights(probs).numpy(), expected, rtol=1e-6)
    assert not dpace_weights(probs.requires_grad_()).requires_grad
    with pytest.raises(ConfigError, match=r"smoothing must be in \[0, 1\), got 1"):
        dpace_weights(probs, smoothing=1)


def test_decay_weights_fall_from_one():
    np.testing.assert_allclose(decay_weights(3, 4.0).numpy(), np.exp([0, -0.25, -0.5]), rtol=1e-6)
    with pytest.raises(ConfigError, match="rate > 0, got 3 and 0"):
        decay_weights(3, 0)


def test_confidence_is_taught_the_acceptance_rate():
    given, wanted = torch.tensor([-2.0, 0.0, 3.0]), torch.tensor([0.1, 0.8, 1.0])
    sure = 1 / (1 + np.exp(-given.double().numpy()))
    c = wanted.double().numpy()
    expected = -(c * np.log(sure) + (1 - c) * np.log(1 - sure))
    np.testing.assert_allclose(confidence_losses(given, wanted).numpy(), expected, rtol=1e-5)


def test_a_mix_is_read_and_a_wrong_one_refused():
    assert parse_mix("forward_kl") == {"forward_kl": 1.0}
    assert parse_mix("cross_entropy=0.1, total_variation=1.8") == {"cross_entropy": 0.1, "total_variation": 1.8}
    for text, message in (("kl", "must be among"), ("forward_kl=0", "number > 0"), ("forward_kl=x", "number > 0")):
        with pytest.raises(ConfigError, match=message):
            parse_mix(text)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "total_variation"])
def test_a_table_of_more_rows_than_go_through_at_a_time_loses_none(name: str):
    """Every row's loss and gradient, scaled as the caller scales it, are those of the whole table at once."""
    student, teacher = logits(8, rows=150)
    weights = torch.linspace(0.5, 2.0, 150)
    whole, by_blocks = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = losses.distillation_loss_reference(whole, teacher, name)
    found = row_losses(by_blocks, teacher, {name: 1.0})
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(by_blocks.grad, whole.grad)
    torch.testing.assert_close(row_losses(student, teacher, {name: 1.0}), expected.detach())
