"""Draws of a drafter's own, for the rejection rules: independent of the target's noise and of every other step.

Match wants the opposite: there a drafter reads the target's own noise, so that both draw the same token more often.
Under a rule that looks at whole drafts that is not sound: how much was accepted tells something about the tokens behind
it, and noise keyed by their positions would come again in the next step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.errors import InternalError
from specdec.protocols import Draws
from specdec.rng import DRAFT, gumbel
from specdec.types import SamplingParams

__all__ = ["draft_laws", "draw_children"]

_MAX_CHILDREN = 256
_NUM_STREAMS = 4  # of ``specdec.rng``: ours are those that are DRAFT modulo this


def draft_laws(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """[W, V] float64: the laws that a request draws from, from logits [W, V]; greedy: certain of the best token."""
    if sampling.is_greedy:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[1]).double()
    return (logits.double() / sampling.temperature).softmax(dim=-1)


def draw_children(probs: Tensor, count: int, *, draws: Draws, seed: int, position: int, node: int) -> list[int]:
    """Ordered draws from one node's draft law.

    Args:
        probs: [V] q, normalised or not.
        count: how many are wanted; without replacement fewer come where q has fewer possible tokens.
        draws: how; a chain has one child.
        seed: of the request.
        position: of the first token that this step can emit; no two steps share it.
        node: index of the parent in its tree.

    Returns:
        Token ids in the order drawn; with replacement they may repeat.

    Raises:
        InternalError: more than 256 children, or several in a chain.
    """
    if not 0 <= count <= _MAX_CHILDREN or (draws == "chain" and count > 1):
        raise InternalError(f"a node can have {1 if draws == 'chain' else _MAX_CHILDREN} children, got {count}")
    scores = probs.to(torch.float64).log()

    def noise(draw: int) -> Tensor:
        stream = DRAFT + _NUM_STREAMS * (node * _MAX_CHILDREN + draw)
        return gumbel([seed], [position], len(probs), device=probs.device, stream=stream)[0]

    if draws == "with_replacement":
        return [int((scores + noise(draw)).argmax()) for draw in range(count)]
    # The first K of a Gumbel-perturbed order are an ordered sample without replacement (Kool et al. 2019).
    best = (scores + noise(0)).topk(min(count, len(probs)))
    return [int(token) for token, score in zip(best.indices, best.values, strict=True) if score > -torch.inf]
