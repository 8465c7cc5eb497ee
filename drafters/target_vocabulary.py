"""The embedding and the ``lm_head`` that a head works with: its own where it has them, else the target's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["embed_and_project"]


def embed_and_project(
    target: PreTrainedModel, weights: Mapping[str, Tensor]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Functions ids [T] -> [T, H] and [T, H] -> [T, D].

    Args:
        target: its layers are looked up in each call: an engine may put packed ones in their place.
        weights: of the head; ``embed_tokens.weight`` and ``lm_head.weight`` are used where they are there.
    """
    own_embedding, own_head = weights.get("embed_tokens.weight"), weights.get("lm_head.weight")

    def embed(token_ids: Tensor) -> Tensor:
        if own_embedding is not None:
            return own_embedding[token_ids]
        embedded: Tensor = target.get_input_embeddings()(token_ids)
        return embedded

    def project(outputs: Tensor) -> Tensor:
        if own_head is not None:
            return linear(outputs, own_head)
        head: Any = target.get_output_embeddings()
        logits: Tensor = head(outputs)
        return logits

    return embed, project
