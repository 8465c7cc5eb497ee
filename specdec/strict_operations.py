"""Torch's operations with row-independent ones in place of those whose bits depend on the number of rows.

While the mode is on, matrix products with a weight and means over the last dimension (the norms of most models) go to
``specdec.kernels.strict_products``, whatever module calls them. All else is left alone: elementwise operations do not
look at other rows, and whether the rest does is tried before it is believed (``specdec.strict``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from specdec.kernels.launch import Backend

__all__ = ["StrictOperations"]

_aten = torch.ops.aten


class StrictOperations(TorchDispatchMode):
    """A context in which a token's bits do not depend on how many tokens there are.

    Args:
        backend: of the products and means; torch's own are for tests.
    """

    def __init__(self, backend: Backend = "triton") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._backend = backend

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        replace = _REPLACED.get(func)
        if replace is not None and not kwargs:
            result = replace(self._backend, *args)
            if result is not None:
                return result
        if func in _COMPOSED:  # in inference mode these come whole: their parts are what matters
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


def _linear(backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    from specdec.kernels.strict_products import strict_matmul  # imports Triton, which is not everywhere

    if weight.dim() != 2 or not x.is_floating_point() or (x.dtype, x.device) != (weight.dtype, weight.device):
        return None
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return strict_matmul(rows, weight, bias, backend=backend).view(*x.shape[:-1], len(weight))


def _mm(backend: Backend, x: Tensor, weight: Tensor) -> Tensor | None:
    return _linear(backend, x, weight.t())


def _addmm(backend: Backend, bias: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    return _linear(backend, x, weight.t(), bias) if bias.dim() == 1 else None


def _mean(backend: Backend, x: Tensor, dims: Sequence[int] | None, keep: bool = False) -> Tensor | None:
    from specdec.kernels.strict_products import strict_mean

    if dims is None or list(dims) not in ([-1], [x.dim() - 1]) or not x.is_floating_point():
        return None
    mean = strict_mean(x.contiguous(), backend=backend)
    return mean.unsqueeze(-1) if keep else mean


_REPLACED: Final[Mapping[Any, Callable[..., Tensor | None]]] = {
    _aten.linear.default: _linear,
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.mean.dim: _mean,
}
_COMPOSED: Final = {_aten.linear.default, _aten.matmul.default}
