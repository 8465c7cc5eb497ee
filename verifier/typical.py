"""Typical acceptance: a lossy rule that keeps whatever the target finds plausible. It changes the law of the text.

A child is accepted if ``p(child) > min(epsilon, delta * exp(-H(p)))``: where the target is unsure, less is asked for
(Cai et al. 2024, Medusa, arXiv 2401.10774, section 2.3.1). Of all accepted paths the longest stands, the first of
equals; the bonus token is the target's own draw after it. At temperature 0 the law is one token and the rule is match.

Never a default. It is offered because published systems are compared under it; everything that shows a result says
that it is lossy, by ``is_lossless``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.errors import ConfigError
from specdec.protocols import Draws
from specdec.rng import TARGET, gumbel_argmax
from specdec.types import DraftTree, IntArray, RequestState, TargetOutput, VerifyResult
from specdec.verifier.rejection import LawSampler, laws_of, scores_by_tree

__all__ = ["TypicalVerifier", "longest_typical_path", "typical_thresholds"]


def typical_thresholds(p: Tensor, *, epsilon: float, delta: float) -> Tensor:
    """[N]: what a child of every node must exceed; p is [N, V], entropies in nats."""
    entropy: Tensor = torch.special.entr(p).sum(dim=-1)
    thresholds: Tensor = delta * (-entropy).exp()
    return thresholds.clamp_max(epsilon)


def longest_typical_path(tree: DraftTree, p: Tensor, thresholds: Tensor) -> list[int]:
    """The nodes from the root to the deepest accepted node, the root included."""
    passed, depth, best = {0}, {0: 0}, 0
    for node in range(1, len(tree)):
        parent, token_id = int(tree.parents[node]), int(tree.token_ids[node])
        if parent in passed and float(p[parent, token_id]) > float(thresholds[parent]):
            passed.add(node)
            depth[node] = depth[parent] + 1
            best = node if depth[node] > depth[best] else best
    return tree.path(best)


class TypicalVerifier:
    """Accepts plausible draft tokens; **not lossless** (`specdec.protocols.Verifier`).

    Args:
        sampler: gives the target's laws.
        epsilon: a child with a larger probability is always accepted, in (0, 1).
        delta: factor on ``exp(-entropy)``, > 0.

    Raises:
        ConfigError: an option is outside its rule.
    """

    is_lossless = False
    draws: frozenset[Draws] | None = None

    def __init__(self, sampler: LawSampler, *, epsilon: float = 0.09, delta: float = 0.3) -> None:
        if not 0 < epsilon < 1:
            raise ConfigError(f"epsilon must be in (0, 1), got {epsilon}")
        if not delta > 0:
            raise ConfigError(f"delta must be > 0, got {delta}")
        self._sampler = sampler
        self._epsilon, self._delta = epsilon, delta

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
        path = longest_typical_path(tree, p, typical_thresholds(p, epsilon=self._epsilon, delta=self._delta))
        last = scores[path[-1] : path[-1] + 1]
        if sampling.is_greedy:
            bonus_id = int(last.argmax())
        else:
            bonus_id = int(gumbel_argmax(last, [sampling.seed], [state.num_tokens + len(path) - 1], stream=TARGET))
        nodes: IntArray = np.array(path[1:], dtype=np.int32)
        return VerifyResult(nodes, tree.token_ids[nodes], bonus_id)

    def commit(self, state: RequestState, emitted_ids: Sequence[int]) -> None:
        self._sampler.commit(state, emitted_ids)

    def stop(self, request_ids: Sequence[str]) -> None:
        self._sampler.stop(request_ids)
