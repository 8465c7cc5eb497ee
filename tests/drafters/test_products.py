"""Packed products give what plain ones give, and follow what is written into the weights."""

from __future__ import annotations

import pytest
import torch

from specdec.drafters.products import Products

NAMES = ("up", "gate")


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(3)
    return {
        "up.weight": torch.randn(700, 512, generator=make).to(dtype),
        "gate.weight": torch.randn(300, 512, generator=make).to(dtype),
        "gate.bias": torch.randn(300, generator=make).to(dtype),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
def test_packed_and_plain_products_agree(dtype: torch.dtype, tolerance: float):
    given, x = weights(dtype), torch.randn(5, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    packed, plain = Products(), Products()
    packed.is_packing = True
    with torch.inference_mode():
        for mine, theirs in zip(packed.of(given, x, *NAMES), plain.of(given, x, *NAMES), strict=True):
            assert mine.shape == theirs.shape
            torch.testing.assert_close(mine, theirs, rtol=0.02, atol=tolerance)
    assert packed._forms[NAMES].packed is not None  # or the comparison would be of one thing with itself


def test_what_is_written_into_the_weights_holds_at_once():
    given, x = weights(torch.float32), torch.ones(2, 512)
    products = Products()
    products.is_packing = True
    with torch.inference_mode():
        before = [out.clone() for out in products.of(given, x, *NAMES)]
        given["gate.weight"].copy_(2 * given["gate.weight"])
        given["gate.bias"].zero_()
        up, gate = products.of(given, x, *NAMES)
    torch.testing.assert_close(up, before[0])
    torch.testing.assert_close(gate, x @ given["gate.weight"].T, rtol=1e-4, atol=1e-3)
    given["up.weight"] = torch.zeros(700, 512)
    with torch.inference_mode():
        assert not products.of(given, x, "up", "gate")[0].any()


def test_gradients_go_through_the_plain_way():
    given = weights(torch.float32)
    given["up.weight"].requires_grad_(True)
    products = Products()
    products.is_packing = True
    products.of(given, torch.ones(1, 512), "up")[0].sum().backward()
    assert given["up.weight"].grad is not None
