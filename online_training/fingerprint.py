"""Which target a trace, a drafter or a version belongs to: a short hash of weights and vocabulary."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["fingerprint"]

_SAMPLES = 64  # entries of each parameter: enough to tell a fine-tuned model from its base


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """32 hexadecimal digits that models with other weights, another dtype or another vocabulary do not share.

    Names, shapes and evenly spaced entries of all parameters are hashed, not every weight, so it takes milliseconds.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        step = max(1, len(flat) // _SAMPLES)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(np.ascontiguousarray(flat[::step].float().cpu().numpy()).tobytes())
    if tokenizer is not None:
        for token, index in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            digest.update(f"{index} {token}\n".encode())
    return digest.hexdigest()[:32]
