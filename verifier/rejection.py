"""Verifies by a rule of the rejection family: the target's law is kept, its tokens for a seed are not.

An option for long sampled chains and trees from one model, where it accepts more than match does (block verification
and traversal above all). Its price: the text depends on the draft, so the same seed with another drafter, budget or
neighbour-driven plan gives another text of the same law; and only drafts that state honest draft laws are lossless.

Every coin is keyed by the request's seed and the position of the step's first token, which no two steps of a request
share: uniforms for accepting from one stream, the bonus token's noise from another, the drafter's from a third. A step
that is run again after an error flips the same coins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specdec.errors import ConfigError, InternalError
from specdec.protocols import Draws
from specdec.rng import ACCEPT, RESIDUAL, gumbel, uniforms
from specdec.types import DraftTree, IntArray, RequestState, TargetOutput, VerifyResult
from specdec.verifier.ratio_rules import RULES

__all__ = ["LawSampler", "RejectionVerifier", "laws_of", "scores_by_tree"]


class LawSampler(Protocol):
    """Gives the target's processed scores at every node; `specdec.sampling.Sampler` is one."""

    def start(self, state: RequestState) -> None:
        """Take up a request."""

    def scores(self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput) -> Tensor:
        """[T, V] float32: logits after the request's processors on each node's own prefix."""

    def commit(self, state: RequestState, emitted_ids: Sequence[int]) -> None:
        """Follow a request's committed tokens."""

    def stop(self, request_ids: Sequence[str]) -> None:
        """Forget requests."""


def scores_by_tree(
    sampler: LawSampler, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput
) -> list[Tensor]:
    """The processed scores of every tree of a step: [N_r, V] float32 each."""
    if not trees:
        return []
    sizes = np.diff(output.cu_nodes).tolist()
    return list(sampler.scores(states, trees, output).split(sizes))


def laws_of(scores: Tensor, *, is_greedy: bool) -> Tensor:
    """[N, V] float64: the target's law after every node, from its processed scores; greedy: all on the best score."""
    if is_greedy:
        return torch.nn.functional.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(torch.float64)
    return scores.to(torch.float64).softmax(dim=-1)


class _Coins:
    """One step's uniforms, handed out in the order in which the rule asks."""

    def __init__(self, state: RequestState, num: int) -> None:
        key = [state.request.sampling.seed], [state.num_tokens]
        self._numbers: list[float] = uniforms(*key, num, device="cpu", stream=ACCEPT)[0].tolist()
        self._next = 0

    def accept(self, probability: float) -> bool:
        self._next += 1
        return self._numbers[self._next - 1] < probability


class RejectionVerifier:
    """Keeps the target's law by testing p against q (`specdec.protocols.Verifier`).

    Args:
        sampler: gives the target's laws.
        rule: ``chain``, ``block`` (chains), ``specinfer`` (children drawn independently), ``rrsw`` or ``traversal``
            (children drawn without replacement); see `specdec.verifier.ratio_rules`.

    Raises:
        ConfigError: an unknown rule.
    """

    is_lossless = True

    def __init__(self, sampler: LawSampler, rule: str) -> None:
        if rule not in RULES:
            raise ConfigError(f"rejection rule must be one of {', '.join(RULES)}, got {rule!r}")
        self.rule = rule
        self.draws: frozenset[Draws] | None = RULES[rule].draws
        self._decide = RULES[rule].decide
        self._sampler = sampler

    def start(self, state: RequestState) -> None:
        self._sampler.start(state)

    def verify(
        self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput
    ) -> list[VerifyResult]:
        scores = scores_by_tree(self._sampler, states, trees, output)
        return [self._verify_one(*one) for one in zip(states, trees, scores, strict=True)]

    def _verify_one(self, state: RequestState, tree: DraftTree, scores: Tensor) -> VerifyResult:
        sampling = state.request.sampling
        p = laws_of(scores, is_greedy=sampling.is_greedy)
        node, weights = self._decide(tree, p, _stated_laws(tree, p), _Coins(state, len(tree)).accept)
        noise = gumbel([sampling.seed], [state.num_tokens], p.shape[-1], device=p.device, stream=RESIDUAL)[0]
        bonus_id = int((weights.log() + noise).argmax())
        nodes: IntArray = np.array(tree.path(node)[1:], dtype=np.int32)
        return VerifyResult(nodes, tree.token_ids[nodes], bonus_id)

    def commit(self, state: RequestState, emitted_ids: Sequence[int]) -> None:
        self._sampler.commit(state, emitted_ids)

    def stop(self, request_ids: Sequence[str]) -> None:
        self._sampler.stop(request_ids)


def _stated_laws(tree: DraftTree, p: Tensor) -> Tensor:
    """[N, V] float64: q over the children of every node, normalised.

    Raises:
        InternalError: a tree with draft tokens states no laws, or not one row per node.
    """
    if tree.num_draft_tokens == 0:
        return torch.zeros_like(p)  # no row is read
    if tree.draft_probs is None or tree.draft_probs.shape != p.shape:
        stated = None if tree.draft_probs is None else tuple(tree.draft_probs.shape)
        raise InternalError(f"the rejection rules need draft_probs of shape {tuple(p.shape)}, got {stated}")
    q = tree.draft_probs.to(p)
    return q / q.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
