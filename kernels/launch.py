"""What every launcher does first: choose between Triton and torch, and check its tensors."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any, Literal, ParamSpec, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["Backend", "check_tensor", "interpreted_in_order", "on_own_device", "uses_triton"]

Backend: TypeAlias = Literal["auto", "triton", "torch"]
logger = logging.getLogger(__name__)
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_GPU_TYPES = ("cuda", "xpu")  # AMD's devices call themselves cuda


def uses_triton(backend: Backend, device: torch.device) -> bool:
    """True if the kernel is to run, False for the torch reference.

    Args:
        backend: "auto": Triton on a GPU; torch elsewhere, on devices other than the CPU with one warning.
        device: of the tensors.

    Raises:
        ValueError: ``backend`` is unknown.
        RuntimeError: Triton was asked for by name and cannot run on ``device``.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be auto, triton or torch, got {backend!r}")
    if backend == "torch":
        return False
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run in numpy
    can_run = find_spec("triton") is not None and (device.type in _GPU_TYPES or is_interpreted)
    if backend == "triton":
        if not can_run:
            raise RuntimeError(f"Triton was asked for by name, but it cannot run on {device.type}")
        return True
    if device.type not in _GPU_TYPES:
        if device.type != "cpu":
            _warn_once(device.type)
        return False
    if not can_run:
        _warn_once(device.type)
    return can_run


def on_own_device(launcher: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a launcher work where its first argument, a tensor, lies: Triton takes the current device."""

    @wraps(launcher)
    def launch(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
        first: Any = args[0]
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return launcher(*args, **options)
        with torch.cuda.device(first.device):
            return launcher(*args, **options)

    return launch


@contextmanager
def interpreted_in_order() -> Iterator[None]:
    """Interpreted products sum every element in one order, as a GPU's matrix units do.

    The interpreter hands them to numpy, whose BLAS sums differently in the last rows of a tile than in the first ones:
    equality of bits cannot be seen through that. Without the interpreter nothing changes.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    def dot(_self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        products = a.data.astype(d.data.dtype)[:, :, None] * b.data.astype(d.data.dtype)[None]
        return interpreter.TensorHandle(np.add.reduce(products, axis=1) + d.data, d.dtype.scalar)

    usual = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = dot
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_dot = usual


@cache
def _warn_once(device_type: str) -> None:
    logger.warning("there are no Triton kernels for %s here: torch operations take their place, slower", device_type)


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Refuse what a kernel would read wrongly.

    Args:
        name: for the message.
        tensor: what was given.
        shape: what it must be; None: any size.
        dtypes: allowed ones.
        device: where it must be.

    Raises:
        ValueError: naming the tensor, what it is, and the rule.
    """
    fits = tensor.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must be {names}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
