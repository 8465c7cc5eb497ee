"""The distillation losses in plain torch operations: what the kernel must agree with, and what a CPU runs."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["FLOOR", "LOSSES", "distillation_loss_reference"]

LOSSES: Final = ("forward_kl", "reverse_kl", "total_variation")
# A log-probability below this counts as this: a token that one side excludes must not make a loss infinite.
FLOOR: Final = -80.0


def distillation_loss_reference(student: Tensor, teacher: Tensor, loss: str) -> Tensor:
    """[T] in float32 or wider, float64 included; see ``distillation_loss`` for the arguments."""
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = student.to(wide).log_softmax(-1).clamp_min(FLOOR)
    log_p = teacher.detach().to(wide).log_softmax(-1).clamp_min(FLOOR)
    if loss == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if loss == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
