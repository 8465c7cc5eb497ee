"""Two vocabularies side by side: which token of the one is which of the other."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.drafters.lm_loading import same_tokens
from specdec.errors import UnsupportedError
from specdec.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenMap"]

logger = logging.getLogger(__name__)

_LEAST_SHARED = 0.5  # of the target's tokens: below, most texts could not be read


class TokenMap:
    """From the target's tokens to a draft model's and back, by the tokens themselves.

    Args:
        own_ids: [V] int64: the draft model's id of each of the target's tokens; -1: it has none.
        own_size: D, rows of the draft model's logits.
    """

    def __init__(self, own_ids: npt.NDArray[np.int64], own_size: int) -> None:
        self.own_ids, self.own_size = own_ids, own_size
        self._known = torch.from_numpy(np.flatnonzero(own_ids >= 0))
        self._sources = torch.from_numpy(own_ids[own_ids >= 0])

    @classmethod
    def of(
        cls,
        own: PreTrainedTokenizerBase | None,
        target: PreTrainedTokenizerBase | None,
        *,
        own_size: int,
        target_size: int,
    ) -> TokenMap:
        """The map of two models.

        Args:
            own: the draft model's tokenizer.
            target: the target's.
            own_size: D.
            target_size: V.

        Raises:
            UnsupportedError: fewer than half of the target's tokens are known, or a tokenizer is missing and the sizes
                differ.
        """
        ids = np.full(target_size, -1, dtype=np.int64)
        if own is None or target is None:
            if own_size != target_size:
                raise UnsupportedError(
                    f"the draft model has {own_size} tokens and the target {target_size}; whether they mean the same "
                    "can be told only with both tokenizers"
                )
            return cls(np.arange(target_size), own_size)
        if same_tokens(own, target):
            count = min(own_size, target_size, len(own), len(target))
            ids[:count] = np.arange(count)
            return cls(ids, own_size)
        vocabulary = own.get_vocab()
        for token, target_id in target.get_vocab().items():
            own_id = vocabulary.get(token, -1)
            if target_id < target_size and own_id < own_size:
                ids[target_id] = own_id
        share = float((ids >= 0).sum()) / max(len(target.get_vocab()), 1)
        if share < _LEAST_SHARED:
            raise UnsupportedError(
                f"the draft model knows {share:.0%} of the target's tokens; it needs {_LEAST_SHARED:.0%} to read texts"
            )
        logger.warning("the draft model has another vocabulary: it knows %.1f %% of the target's tokens", 100 * share)
        return cls(ids, own_size)

    def own(self, token_ids: IntArray) -> list[int] | None:
        """A text in the draft model's tokens, or None if one is unknown there."""
        ids = self.own_ids[token_ids]
        return None if (ids < 0).any() else ids.tolist()

    def over_target(self, logits: Tensor) -> Tensor:
        """[..., V] from [..., D]; what the draft model does not know is at -inf."""
        everything = logits.new_full((*logits.shape[:-1], len(self.own_ids)), -torch.inf)
        everything[..., self._known.to(logits.device)] = logits[..., self._sources.to(logits.device)]
        return everything
