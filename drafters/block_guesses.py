"""From the rows of guessed blocks to draft tokens: one chain per request, and trees.

Guess k of a block has a law that depends on the token before it through the Markov head alone, so everything after the
denoising pass is cheap: a chain is one small product per guess, a tree one per node. Without a Markov head the laws of
a block are independent and a tree needs no model at all (DDTree, arXiv 2604.12989).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.drafters.diffusion_head import DiffusionHead
from specdec.drafters.growing import Growth
from specdec.drafters.levels import best_children, search_trees
from specdec.drafters.tree_search import TreeSearch
from specdec.types import DraftTree, RequestState

__all__ = ["BlockGuesses", "Chains", "Choose"]

# (logits [R, V] of one guess of every request, its depth, 1 = first) -> the chosen tokens [R] int64 and their chances
Choose = Callable[[Tensor, int], tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]


@dataclass(frozen=True, slots=True, eq=False)
class Chains:
    """The likeliest chain of each of R requests, K guesses each.

    Args:
        token_ids: [R, K] int64.
        values: [R, K]: chance of each token by the law that it was chosen from, given that the ones before are right.
        confidences: [R, K] float64: logits of the same chance as the head tells it, blind to the token itself; where
            the head cannot tell, the logit of the law's largest probability.
        agrees: [R, K] bool: the law without its Markov head chooses the same token.
        laws: K times [R, V]: scores that the tokens were chosen from.
    """

    token_ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    confidences: npt.NDArray[np.float64]
    agrees: npt.NDArray[np.bool_]
    laws: list[Tensor]


class BlockGuesses:
    """The guesses of one step.

    Args:
        head: that made the rows.
        states: R requests.
        rows: [R, K, H].
        vocab_size: V of the target.
        mix: R of the product of experts ``R * without + (1 - R) * with`` the Markov head, in [0, 1]; 0: with it.
    """

    def __init__(
        self, head: DiffusionHead, states: Sequence[RequestState], rows: Tensor, vocab_size: int, *, mix: float = 0.0
    ) -> None:
        self._head, self._states, self._rows = head, states, rows
        self._vocab_size, self._mix = vocab_size, mix
        self._base = head.logits(rows)  # [R, K, D]
        anchors = [int(state.token_ids[-1]) for state in states]
        self._anchors = torch.tensor(anchors, device=rows.device)

    def chains(self, choose: Choose) -> Chains:
        """Choose token after token, the Markov head following what was chosen."""
        previous, memory = self._anchors, None
        chosen, values, confidences, agrees, laws = [], [], [], [], []
        for k in range(self._rows.shape[1]):
            rows = self._rows[:, k]
            bias, memory = self._head.bias(rows, previous, memory)
            law = self._law(self._base[:, k], bias)
            ids, chances = choose(law, k + 1)
            if self._mix:
                plain = self._head.over_target(self._base[:, k], self._vocab_size)
                agrees.append(choose(plain, k + 1)[0] == ids)
            else:
                agrees.append(np.ones(len(ids), dtype=np.bool_))
            confidences.append(self._confidence(rows, previous, law))
            chosen.append(ids)
            values.append(chances)
            laws.append(law)
            previous = torch.from_numpy(ids).to(rows.device)
        return Chains(
            np.stack(chosen, axis=1), np.stack(values, axis=1), np.stack(confidences, axis=1), np.stack(agrees, axis=1),
            laws,
        )  # fmt: skip

    def trees(self, searches: Sequence[TreeSearch], top_k: int) -> list[DraftTree]:
        """Run the searches: no level costs another pass of the head."""
        if self._head.config.markov == "none":
            return self._independent_trees(searches, top_k)
        bias, memory = self._head.bias(self._rows[:, 0], self._anchors, None)
        logits = self._law(self._base[:, 0], bias)
        depth = 0
        owners = {state.request_id: row for row, state in enumerate(self._states)}

        def grow(growths: Sequence[Growth], parent_rows: npt.NDArray[np.int64]) -> Tensor | None:
            nonlocal memory, depth
            depth += 1
            if depth >= self._rows.shape[1]:
                return None
            sizes = [len(growth.token_ids) for growth in growths]
            whose = torch.tensor(np.repeat([owners[growth.request_id] for growth in growths], sizes))
            whose = whose.to(self._rows.device)
            token_ids = np.concatenate([growth.token_ids for growth in growths]).astype(np.int64)
            before = None if memory is None else memory[torch.from_numpy(parent_rows).to(memory.device)]
            rows = self._rows[whose, depth]
            bias, memory = self._head.bias(rows, torch.from_numpy(token_ids).to(rows.device), before)
            return self._law(self._base[whose, depth], bias)

        return search_trees(self._states, searches, logits, top_k, grow)

    def _independent_trees(self, searches: Sequence[TreeSearch], top_k: int) -> list[DraftTree]:
        num_requests, num_guesses = self._rows.shape[:2]
        owners = [state for state in self._states for _ in range(num_guesses)]
        depths = list(range(1, num_guesses + 1)) * num_requests
        laws = self._head.over_target(self._base, self._vocab_size).flatten(0, 1)
        ids, log_probs = best_children(laws, owners, depths, top_k)
        for row, search in enumerate(searches):
            width = 1
            for place in range(row * num_guesses, (row + 1) * num_guesses):
                shape = (width, ids.shape[1])
                frontier = search.add(np.broadcast_to(ids[place], shape), np.broadcast_to(log_probs[place], shape))
                if frontier is None:
                    break
                width = len(frontier.token_ids)
        return [search.tree() for search in searches]

    def _law(self, base: Tensor, bias: Tensor | None) -> Tensor:
        """[..., V]: scores over the target's vocabulary."""
        return self._head.over_target(base if bias is None else base + (1 - self._mix) * bias, self._vocab_size)

    def _confidence(self, rows: Tensor, previous: Tensor, law: Tensor) -> npt.NDArray[np.float64]:
        if self._head.config.has_confidence:
            return self._head.confidence(rows, previous).double().cpu().numpy()
        largest = (law.max(dim=-1).values - law.logsumexp(dim=-1)).double().exp()
        return torch.logit(largest, eps=1e-6).cpu().numpy()
