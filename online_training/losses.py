"""What a drafter is trained to lower, row by row, and how rows are weighed.

With p the target's law at a position and q the drafter's, acceptance is alpha = sum min(p, q) = 1 - TV(p, q):

=================== ==================================== =====================================================
loss                formula                              source
=================== ==================================== =====================================================
``cross_entropy``   -log q(label)                        DFlash, arXiv 2602.06036
``forward_kl``      sum p (log p - log q)                EAGLE-3, arXiv 2503.01840; Aurora, arXiv 2602.06932
``reverse_kl``      sum q (log q - log p)                OSD, arXiv 2310.07177
``total_variation`` 1 - alpha                            DSpark, arXiv 2607.05147 (there twice that, the L1 norm)
``lk_alpha``        -log alpha                           LK losses, as in speculators
``lk_hybrid``       e^(-3 alpha) KL + (1 - ...) TV       the same; the factor carries no gradient
=================== ==================================== =====================================================

A mix of them is a mapping from names to factors. Everything is one number per row; means are the caller's, who knows
the denominators of all devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from specdec.errors import ConfigError
from specdec.kernels.distillation_reference import distillation_loss_reference

__all__ = [
    "LOSS_NAMES",
    "acceptance_rates",
    "confidence_losses",
    "decay_weights",
    "dpace_weights",
    "parse_mix",
    "row_losses",
]

LOSS_NAMES: Final = ("cross_entropy", "forward_kl", "reverse_kl", "total_variation", "lk_alpha", "lk_hybrid")
_HYBRID_RATE = 3.0  # of the factor's fall from pure KL at alpha = 0; speculators' default
_BLOCK = 64  # rows that go through a CPU's losses together: with 4096 logits each, a megabyte
_LEAST_ALPHA = 1e-6  # -log alpha stays finite where two laws share nothing


def parse_mix(text: str) -> dict[str, float]:
    """``"forward_kl"`` or ``"cross_entropy=0.1,total_variation=1.8"`` as a mapping from names to factors.

    Raises:
        ConfigError: an unknown loss, or a factor that is no number > 0.
    """
    mix: dict[str, float] = {}
    for part in text.split(","):
        name, _, factor = part.partition("=")
        name = name.strip()
        try:
            mix[name] = float(factor) if factor else 1.0
        except ValueError:
            raise ConfigError(f"the factor of a loss must be a number > 0, got {part!r}") from None
        if name not in LOSS_NAMES:
            raise ConfigError(f"loss must be among {', '.join(LOSS_NAMES)}, got {name!r}")
        if not 0 < mix[name] < float("inf"):
            raise ConfigError(f"the factor of a loss must be a number > 0, got {part!r}")
    return mix


def row_losses(student: Tensor, teacher: Tensor, mix: Mapping[str, float], *, labels: Tensor | None = None) -> Tensor:
    """The mixed loss of every row; differentiable in the student's logits.

    On a GPU the three losses over two laws run as one fused kernel each (``specdec.kernels.distillation``).

    Args:
        student: [T, V] logits.
        teacher: [T, V] logits; no gradient flows into them.
        mix: name -> factor, see the table above.
        labels: [T] int64, for ``cross_entropy``; None: the teacher's likeliest token.

    Returns:
        [T] float32 (float64 for float64 logits), nats.

    Raises:
        ConfigError: an unknown loss.
    """
    total: Tensor | None = None
    for name, factor in mix.items():
        part = factor * _one_loss(student, teacher, name, labels)
        total = part if total is None else total + part
    if total is None:
        raise ConfigError("a loss must be named, got an empty mix")
    return total


def _one_loss(student: Tensor, teacher: Tensor, name: str, labels: Tensor | None) -> Tensor:
    if name == "cross_entropy":
        wide = student.to(torch.promote_types(student.dtype, torch.float32))
        return cross_entropy(wide, teacher.argmax(-1) if labels is None else labels, reduction="none")
    if name == "lk_alpha":
        return -(1 - _distance(student, teacher, "total_variation")).clamp_min(_LEAST_ALPHA).log()
    if name == "lk_hybrid":
        distance = _distance(student, teacher, "total_variation")
        share = torch.exp(-_HYBRID_RATE * (1 - distance.detach()))
        return share * _distance(student, teacher, "forward_kl") + (1 - share) * distance
    if name not in LOSS_NAMES:
        raise ConfigError(f"loss must be among {', '.join(LOSS_NAMES)}, got {name!r}")
    return _distance(student, teacher, name)


def _distance(student: Tensor, teacher: Tensor, name: str) -> Tensor:
    if student.device.type == "cpu":
        found: Tensor = _RowBlocks.apply(student, teacher.detach(), name)  # type: ignore[no-untyped-call]
        return found
    from specdec.kernels.distillation import distillation_loss  # needs triton, which not every CPU installation has

    return distillation_loss(student, teacher.detach(), name)


class _RowBlocks(torch.autograd.Function):
    """``distillation_loss_reference``, some rows at a time: whole tables of logits go through no processor's cache.

    A row's loss depends on that row alone, so its gradient is found with it, while the row is at hand.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, name: str) -> Tensor:
        losses = student.new_empty(len(student), dtype=torch.promote_types(student.dtype, torch.float32))
        if not ctx.needs_input_grad[0]:
            for first in range(0, len(student), _BLOCK):
                rows = slice(first, first + _BLOCK)
                losses[rows] = distillation_loss_reference(student[rows], teacher[rows], name)
            return losses
        slopes = torch.empty_like(student)
        for first in range(0, len(student), _BLOCK):
            rows = slice(first, first + _BLOCK)
            with torch.enable_grad():
                own = student[rows].detach().requires_grad_()
                found = distillation_loss_reference(own, teacher[rows], name)
                (slopes[rows],) = torch.autograd.grad(found.sum(), own)
            losses[rows] = found.detach()
        ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradient[:, None].to(slopes.dtype), None, None


@torch.no_grad()
def acceptance_rates(student: Tensor, teacher: Tensor) -> Tensor:
    """[T]: the probability that a token drawn from the student is accepted, 1 - TV (Leviathan et al. 2023, section 3).

    Args:
        student: [T, V] logits.
        teacher: [T, V] logits.
    """
    return 1 - _distance(student, teacher, "total_variation")


def confidence_losses(logits: Tensor, acceptance: Tensor) -> Tensor:
    """[T]: binary cross-entropy of a confidence head against the acceptance rates (DSpark, arXiv 2607.05147).

    Args:
        logits: [T], of the head.
        acceptance: [T] in [0, 1]; no gradient flows into them.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return binary_cross_entropy_with_logits(logits.to(wide), acceptance.detach().to(wide), reduction="none")


def decay_weights(num_slots: int, rate: float, *, device: torch.device | None = None) -> Tensor:
    """[K] weights exp(-k / rate) of the slots of a block, k from 0 (DFlash, section 4.2; 7 for blocks of 16, 4 of 8).

    Raises:
        ConfigError: ``num_slots`` < 1 or ``rate`` <= 0.
    """
    if num_slots < 1 or not rate > 0:
        raise ConfigError(f"a block needs num_slots >= 1 and a rate > 0, got {num_slots} and {rate}")
    return torch.exp(-torch.arange(num_slots, dtype=torch.float32, device=device) / rate)


@torch.no_grad()
def dpace_weights(label_probs: Tensor, *, smoothing: float = 0.5, counts: Tensor | None = None) -> Tensor:
    """[..., K] weights of the slots of blocks: how much of the expected accepted length hangs on each (D-PACE).

    ``w_j = sum over m >= j of prod over i <= m of ((1 - a) q_i + a)``, arXiv 2605.18810.

    Args:
        label_probs: [..., K], what the drafter gave to the right token of each slot; no gradient flows into them.
        smoothing: a in [0, 1): 0 lets one hopeless slot silence all later ones.
        counts: [..., K] bool: slots within the text; the others weigh nothing, and nothing hangs on them. None: all.

    Raises:
        ConfigError: ``smoothing`` is outside its range.
    """
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing must be in [0, 1), got {smoothing}")
    reached = ((1 - smoothing) * label_probs + smoothing).cumprod(-1)
    if counts is not None:
        reached = reached * counts
    return reached.flip(-1).cumsum(-1).flip(-1)
