from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specdec.bench.tiny_attention import block_causal_attention

torch.set_num_threads(1)


def reference(q, k, v):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(1, 2)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
def test_values_and_gradients_match_scaled_dot_product_attention(length):
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, 6, length, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    k, v = (
        torch.randn(2, 2, length, 8, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)
    )
    grad = torch.randn(2, length, 6, 8, dtype=torch.float64, generator=generator)
    ours, theirs = block_causal_attention(None, q, k, v, None, 0.3)[0], reference(q, k, v)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(theirs, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_float32_queries_beside_bfloat16_values_train():
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    k = torch.randn(1, 1, 9, 8, requires_grad=True)
    v = torch.randn(1, 1, 9, 8, dtype=torch.bfloat16, requires_grad=True)
    out, _ = block_causal_attention(None, q, k, v, None, 0.3)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
