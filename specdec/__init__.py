"""Lossless speculative decoding for any Hugging Face causal LM: same tokens, sooner."""

from __future__ import annotations

from specdec.types import DraftTree, Request, RequestOutput, RequestState, SamplingParams

__version__ = "0.1.0"
__all__ = ["DraftTree", "Request", "RequestOutput", "RequestState", "SamplingParams", "__version__"]
