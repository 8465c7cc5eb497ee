"""One request's tokens through a Hugging Face model, the ordinary way: one row, the model's own attention and cache.

The chain target, the plain target and the self-test's reference all go through here, so that "an ordinary forward"
means one thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from specdec.errors import UnsupportedError
from specdec.placement import device_of
from specdec.probe import forward_inputs
from specdec.types import IntArray, TargetOutput

__all__ = ["RowForward", "join_rows", "vocab_size_of"]


def vocab_size_of(model: Any) -> int:
    """V: how many token ids the model has logits for."""
    return int(model.config.get_text_config().vocab_size)


def _lowest_dtype(model: nn.Module) -> torch.dtype:
    """The least precise floating dtype of the parameters: it limits what the logits are worth, whatever their own."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


class RowForward:
    """Runs single rows of tokens through a model, with only the inputs that its forward declares.

    Args:
        model: a causal LM of transformers in evaluation mode.

    Raises:
        UnsupportedError: the forward does not take ``input_ids``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.device = device_of(model)
        self.dtype = _lowest_dtype(model)
        self._inputs = forward_inputs(model)
        if "input_ids" not in self._inputs:
            raise UnsupportedError(f"{type(model).__name__}.forward takes no input_ids, so it is not a text model")

    @property
    def cache_name(self) -> str | None:
        """Name of the argument that takes a cache; None: the model has none."""
        return next((name for name in ("past_key_values", "cache_params") if name in self._inputs), None)

    def __call__(self, token_ids: IntArray, *, first_row: int, position: int = 0, cache: Any = None) -> torch.Tensor:
        """Logits of the tokens from index ``first_row`` on.

        Args:
            token_ids: [T] int32, T >= 1.
            first_row: in [0, T).
            position: of the first token; what came before is in ``cache``.
            cache: a transformers cache to read and extend; None: the row stands alone and nothing is cached.

        Returns:
            [T - first_row, V].
        """
        num_tokens = len(token_ids)
        everything: dict[str, Any] = {
            "input_ids": torch.from_numpy(token_ids).to(self.device, torch.long)[None],
            "position_ids": torch.arange(position, position + num_tokens, device=self.device)[None],
            "attention_mask": torch.ones(1, num_tokens, dtype=torch.long, device=self.device),
            "use_cache": cache is not None,
            # Always an index tensor: an int makes some models with shared KV drop queries of earlier layers too.
            "logits_to_keep": torch.arange(first_row, num_tokens, device=self.device),
        }
        if position:
            # All ones anyway; recurrent models multiply their one new token by it and would need it cut to size.
            del everything["attention_mask"]
        inputs = {name: value for name, value in everything.items() if name in self._inputs}
        if cache is not None and self.cache_name is not None:
            inputs[self.cache_name] = cache
        with torch.no_grad():
            out = self.model(**inputs)
        logits: torch.Tensor = out.logits[0]
        return logits if len(logits) == num_tokens - first_row else logits[first_row:]


def join_rows(rows: Sequence[torch.Tensor], vocab_size: int, device: torch.device) -> TargetOutput:
    """The output of a step from the logits [n, V] of its trees, in order."""
    if not rows:
        return TargetOutput(torch.empty(0, vocab_size, device=device), np.zeros(1, dtype=np.int32))
    return TargetOutput(torch.cat(list(rows)), np.cumsum([0, *map(len, rows)], dtype=np.int32))
