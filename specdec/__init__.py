"""Lossless speculative decoding for any Hugging Face causal LM: the same tokens, sooner.

``import specdec`` loads neither torch nor numba; what needs them is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from specdec.tree import DraftTree
from specdec.types import Request, RequestOutput, RequestState, SamplingParams

if TYPE_CHECKING:
    from specdec.build import build_engine
    from specdec.engine import Engine
    from specdec.hf import speculate
    from specdec.packed_linear import unpack_linears

__version__ = "0.1.0"
__all__ = [
    "DraftTree",
    "Engine",
    "Request",
    "RequestOutput",
    "RequestState",
    "SamplingParams",
    "__version__",
    "build_engine",
    "speculate",
    "unpack_linears",
]

_LAZY = {
    "Engine": "specdec.engine",
    "build_engine": "specdec.build",
    "speculate": "specdec.hf",
    "unpack_linears": "specdec.packed_linear",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
