"""What several kernel tests share."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture
def fixed_order_products(monkeypatch):
    """Interpreted products sum every element in one order, as a GPU's matrix units do.

    The interpreter hands them to numpy, whose BLAS sums differently in the last rows of a tile than in the first ones:
    equality of bits cannot be seen through that.
    """
    from triton.runtime import interpreter

    def dot(_self, a, b, d, *_):
        products = a.data.astype(d.data.dtype)[:, :, None] * b.data.astype(d.data.dtype)[None]
        return interpreter.TensorHandle(np.add.reduce(products, axis=1) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
