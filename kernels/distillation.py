"""Distillation losses over the vocabulary, with their gradient, from one pass structure per row.

The loss of a row and the gradient of the student's logits come out of the same launch; the only thing of size [T, V]
that is written is that gradient. With p the teacher's law, q the student's, z the student's logits:

==================== ========================= ==============================================
loss                 formula                   gradient dL / dz_i
==================== ========================= ==============================================
forward_kl           sum p (log p - log q)     q_i - p_i
reverse_kl           sum q (log q - log p)     q_i (log q_i - log p_i - L)
total_variation      1/2 sum abs(p - q)        1/2 q_i (s_i - sum q s),  s = sign(q - p)
==================== ========================= ==============================================

1 - total variation is the acceptance rate of a sampled draft token (Leviathan et al. 2023, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.distillation_reference import FLOOR, LOSSES, distillation_loss_reference
from specdec.kernels.launch import Backend, check_tensor, on_own_device, uses_triton

__all__ = ["distillation_loss"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK = 4096
_FLOOR = tl.constexpr(FLOOR)


@on_own_device
def distillation_loss(student: Tensor, teacher: Tensor, loss: str, *, backend: Backend = "auto") -> Tensor:
    """The loss of every row; differentiable in the student's logits.

    Args:
        student: [T, V] logits.
        teacher: [T, V] logits; no gradient flows into them.
        loss: one of ``LOSSES``.
        backend: see ``uses_triton``.

    Returns:
        [T] float32, nats (total variation: in [0, 1]).

    Raises:
        ValueError: an unknown loss, or a shape, dtype or device that does not fit.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    check_tensor("student", student, (None, None), _FLOATS, student.device)
    check_tensor("teacher", teacher, tuple(student.shape), _FLOATS, student.device)
    if not uses_triton(backend, student.device):
        return distillation_loss_reference(student, teacher, loss)
    result: Tensor = _Distillation.apply(student, teacher, LOSSES.index(loss))  # type: ignore[no-untyped-call]
    return result


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kind: int) -> Tensor:
        num_rows, vocab_size = student.shape
        losses = torch.empty(num_rows, dtype=torch.float32, device=student.device)
        gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        if num_rows:
            block = min(_BLOCK, max(triton.next_power_of_2(vocab_size), 16))
            _distill[(num_rows,)](
                student, teacher, losses, gradient, vocab_size, student.stride(0), teacher.stride(0),
                KIND=kind, BLOCK=block, num_warps=8,
            )  # fmt: skip
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None


@triton.jit  # type: ignore[untyped-decorator]
def _distill(  # type: ignore[no-untyped-def]
    Student, Teacher, Losses, Gradient, vocab_size, stride_q, stride_p, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, BLOCK)
    top_q = tl.full([], float("-inf"), tl.float32)
    top_p = tl.full([], float("-inf"), tl.float32)
    sum_q = tl.full([], 0.0, tl.float32)
    sum_p = tl.full([], 0.0, tl.float32)
    for start in range(0, vocab_size, BLOCK):  # both log-sum-exps, online
        inside = start + v < vocab_size
        zq = tl.load(Student + row * stride_q + start + v, mask=inside, other=float("-inf")).to(tl.float32)
        zp = tl.load(Teacher + row * stride_p + start + v, mask=inside, other=float("-inf")).to(tl.float32)
        new_q, new_p = tl.maximum(top_q, tl.max(zq, 0)), tl.maximum(top_p, tl.max(zp, 0))
        base_q = tl.where(new_q == float("-inf"), 0.0, new_q)
        base_p = tl.where(new_p == float("-inf"), 0.0, new_p)
        sum_q = sum_q * tl.exp(top_q - base_q) + tl.sum(tl.exp(zq - base_q), 0)
        sum_p = sum_p * tl.exp(top_p - base_p) + tl.sum(tl.exp(zp - base_p), 0)
        top_q, top_p = new_q, new_p
    lse_q, lse_p = top_q + tl.log(sum_q), top_p + tl.log(sum_p)
    loss = tl.full([], 0.0, tl.float32)
    signs = tl.full([], 0.0, tl.float32)  # sum of q s
    for start in range(0, vocab_size, BLOCK):
        inside = start + v < vocab_size
        zq = tl.load(Student + row * stride_q + start + v, mask=inside, other=0.0).to(tl.float32)
        zp = tl.load(Teacher + row * stride_p + start + v, mask=inside, other=0.0).to(tl.float32)
        log_q, log_p = tl.maximum(zq - lse_q, _FLOOR), tl.maximum(zp - lse_p, _FLOOR)
        q, p = tl.exp(log_q), tl.exp(log_p)
        if KIND == 0:
            term = p * (log_p - log_q)
        elif KIND == 1:
            term = q * (log_q - log_p)
        else:
            term = 0.5 * tl.abs(p - q)
            signs += tl.sum(tl.where(inside, q * (tl.where(q > p, 1.0, 0.0) - tl.where(q < p, 1.0, 0.0)), 0.0), 0)
        loss += tl.sum(tl.where(inside, term, 0.0), 0)
    tl.store(Losses + row, loss)
    for start in range(0, vocab_size, BLOCK):
        inside = start + v < vocab_size
        zq = tl.load(Student + row * stride_q + start + v, mask=inside, other=0.0).to(tl.float32)
        zp = tl.load(Teacher + row * stride_p + start + v, mask=inside, other=0.0).to(tl.float32)
        log_q, log_p = tl.maximum(zq - lse_q, _FLOOR), tl.maximum(zp - lse_p, _FLOOR)
        q, p = tl.exp(log_q), tl.exp(log_p)
        if KIND == 0:
            g = q - p
        elif KIND == 1:
            g = q * (log_q - log_p - loss)
        else:
            g = 0.5 * q * ((tl.where(q > p, 1.0, 0.0) - tl.where(q < p, 1.0, 0.0)) - signs)
        tl.store(Gradient + row * vocab_size + start + v, g.to(Gradient.dtype.element_ty), mask=inside)
