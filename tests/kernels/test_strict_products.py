"""Strict products and means: right, and a row's bits are those of the row alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specdec.kernels import strict_products
from specdec.kernels.strict_products import ROWS, strict_matmul, strict_mean
from specdec.strict_operations import StrictOperations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "width"), [(1, 1, 1), (3, 33, 70), (ROWS + 1, 40, 65)])
def test_products_and_means_are_as_near_to_float64_as_torch(rows, columns, width, dtype):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, width), (columns, width), (columns,))
    )
    exact = nn.functional.linear(x.double(), weight.double(), bias.double())
    error = (nn.functional.linear(x, weight, bias).double() - exact).abs().max()
    atol = 1e-5 if dtype == torch.float32 else 4e-3
    for given in (weight, weight.t().contiguous().t()):
        got = strict_matmul(x, given, bias, backend="triton")
        assert got.dtype == dtype
        assert (got.double() - exact).abs().max() <= 2 * error + atol
    mean = strict_mean(x[:, None], backend="triton")
    assert mean.shape == (rows, 1)
    torch.testing.assert_close(mean[:, 0].double(), x.double().mean(-1), rtol=0, atol=atol)


def test_a_row_has_the_bits_that_it_has_alone(fixed_order_products):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 90, generator=generator) for n in (ROWS + 6, 20))
    products, means = strict_matmul(x, weight, backend="triton"), strict_mean(x, backend="triton")
    for row in (0, 5, ROWS - 1, ROWS + 5):
        assert torch.equal(strict_matmul(x[row : row + 1], weight, backend="triton")[0], products[row])
        assert strict_mean(x[row : row + 1], backend="triton")[0] == means[row]


def test_the_mode_replaces_products_and_means_wherever_they_are_called(monkeypatch):
    calls = []

    def spy_on(name):
        function = getattr(strict_products, name)

        def spy(*args, **options):
            calls.append(name)
            return function(*args, **options)

        monkeypatch.setattr(strict_products, name, spy)

    spy_on("strict_matmul")
    spy_on("strict_mean")
    model = nn.Sequential(nn.Linear(8, 6), nn.RMSNorm(6), nn.Linear(6, 4, bias=False)).eval()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            expected = model(x), x @ model[0].weight.t(), x.pow(2).mean(-1, keepdim=True), x[0] @ x[0].t()
            calls.clear()
            with StrictOperations():
                got = model(x), x @ model[0].weight.t(), x.pow(2).mean(-1, keepdim=True), x[0] @ x[0].t()
            for have, want in zip(got, expected, strict=True):
                torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
            assert calls.count("strict_matmul") == 4
            assert calls.count("strict_mean") >= 1


def test_what_does_not_fit_is_refused():
    x, weight = torch.zeros(2, 8), torch.zeros(4, 8)
    for arguments, message in (
        ((x, weight[:, :4]), r"weight must be \[any, 8\] torch.float32 on cpu, got \(4, 4\)"),
        ((x, weight.half()), "got .* torch.float16"),
        ((x, weight, torch.zeros(3)), r"bias must have shape \(4\)"),
        ((x.double(), weight.double()), "x must be torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            strict_matmul(*arguments, backend="triton")
    with pytest.raises(ValueError, match="the mean of nothing"):
        strict_mean(torch.zeros(2, 0), backend="triton")
