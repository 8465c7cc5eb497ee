"""Root-mean-square norms in one call instead of seven, for float32 models on the CPU.

A small model's step is many small operations, and a third of them belong to its norms. A module is not known by its
name: whatever has one vector of weights is tried on random rows, and is replaced if it computes
``x / sqrt(mean(x^2) + eps) * (offset + weight)``, with offset 0 or 1, within float32 rounding. Every row is computed
for itself, so its bits do not depend on how many there are.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import nn

from specdec.stand_ins import StandIn, children, is_free

__all__ = ["FusedNorm", "can_fuse", "fuse_norms", "fused_rms_norm"]

_Floats = npt.NDArray[np.float32]
_TOLERANCE: Final = 16 * float(torch.finfo(torch.float32).eps)  # relative; sums are added in another order


_NO_OFFSET: Final = np.float32(0.0)


# Sums of several lanes: an order that follows from the width alone, and vector instructions.
@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})  # type: ignore[untyped-decorator]
def _normalise(rows: _Floats, weight: _Floats, eps: np.float32, offset: np.float32, out: _Floats) -> None:
    """Write the norm of ``rows`` [T, N] to ``out`` [T, N]."""
    num_rows, width = rows.shape
    for row in range(num_rows):
        total = np.float32(0.0)
        for column in range(width):
            total += rows[row, column] * rows[row, column]
        factor = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(width) + eps))
        for column in range(width):
            out[row, column] = rows[row, column] * factor * (offset + weight[column])


class FusedNorm(StandIn):
    """Stands in for a root-mean-square norm, for inference.

    Args:
        norm: with one parameter, ``weight`` [N] float32.
        eps: added to the mean square.
        offset: added to the weight.
    """

    def __init__(self, norm: nn.Module, eps: float, offset: float) -> None:
        super().__init__(norm)
        weight = norm.weight
        assert isinstance(weight, nn.Parameter)
        self.weight = weight
        self._array: _Floats = weight.detach().numpy()
        self._eps, self._offset = np.float32(eps), np.float32(offset)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., N] from x [..., N]; by the norm itself where x is no ordinary float32, or gradients are wanted."""
        if args or kwargs or not can_fuse(x) or x.shape[-1] != len(self._array):
            out: torch.Tensor = self._hidden[0](x, *args, **kwargs)
            return out
        return _fuse(x, self._array, self._eps, self._offset)


def fuse_norms(model: nn.Module, holder: Hashable) -> None:
    """Replace the norms of a model on the CPU until ``holder`` lets go (`specdec.stand_ins.let_go`).

    Norms with hooks, or whose forward somebody replaced, stay as they are.
    """
    done: dict[int, FusedNorm] = {}
    for parent, name, norm in list(children(model, nn.Module)):
        if id(norm) not in done:
            made = _fused(norm)
            if made is None:
                continue
            done[id(norm)] = made
        setattr(parent, name, done[id(norm)])
    for _, _, fused in children(model, FusedNorm):
        fused.holders.add(holder)


def can_fuse(x: torch.Tensor) -> bool:
    """True if ``x`` is ordinary float32 on the CPU, and its values are all that is wanted: no gradients, no record."""
    if type(x) is not torch.Tensor or x.dtype != torch.float32 or not x.is_cpu:
        return False
    is_recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return not (is_recorded or torch.is_grad_enabled())


def fused_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of [..., N] that one ``can_fuse``, with a weight [N] float32 on the CPU."""
    return _fuse(x, weight.detach().numpy(), np.float32(eps), _NO_OFFSET)


def _fuse(x: torch.Tensor, weight: _Floats, eps: np.float32, offset: np.float32) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.float32)
    width = len(weight)
    _normalise(x.detach().numpy().reshape(-1, width), weight, eps, offset, out.numpy().reshape(-1, width))
    return out


def _fused(norm: nn.Module) -> FusedNorm | None:
    """A stand-in that was seen to compute the same; None: there is none."""
    weight = norm._parameters.get("weight")
    if isinstance(norm, StandIn) or norm._modules or norm._buffers or len(norm._parameters) != 1 or weight is None:
        return None
    if not is_free(norm) or weight.dim() != 1 or weight.dtype != torch.float32 or weight.device.type != "cpu":
        return None
    with torch.random.fork_rng(devices=()), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        # Small rows show eps, several of them that a row stands for itself.
        rows = torch.randn(2, 3, len(weight)) * torch.tensor([1.0, 1e-3, 30.0])[:, None]
        try:
            wanted = norm(rows)
        except Exception:  # noqa: BLE001  -- whatever it wants instead, it is no such norm
            return None
        if not isinstance(wanted, torch.Tensor) or wanted.shape != rows.shape or wanted.dtype != torch.float32:
            return None
        for eps in _eps_of(norm):
            for offset in (0.0, 1.0):
                made = FusedNorm(norm, eps, offset)
                if torch.allclose(made(rows), wanted, rtol=_TOLERANCE, atol=0.0):
                    return made
    return None


def _eps_of(norm: nn.Module) -> list[float]:
    """What could be added to the mean square: the module's own numbers, or what torch takes without one."""
    numbers = [value for value in vars(norm).values() if isinstance(value, float) and value >= 0.0]
    return list(dict.fromkeys([*numbers, float(torch.finfo(torch.float32).eps)]))
