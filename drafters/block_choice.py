"""How the tokens of a chain are chosen from their laws, and the tree that such a chain makes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specdec.drafters.block_guesses import Chains, Choose
from specdec.drafters.draws import draft_laws, draw_children
from specdec.drafters.levels import best_children
from specdec.protocols import Draws
from specdec.types import DraftTree, RequestState

__all__ = ["chain_tree", "chooser"]


def chooser(states: Sequence[RequestState], draws: Draws | None) -> Choose:
    """Chooses with the target's own noise, for match (``draws`` None), or draws honestly."""
    return _by_noise(states) if draws is None else _by_draw(states, draws)


def chain_tree(row: int, state: RequestState, chains: Chains, length: int, draws: Draws | None) -> DraftTree:
    """The first ``length`` tokens of a chain as a tree; with ``draws`` it states their laws."""
    tree = DraftTree.chain(int(state.token_ids[-1]), chains.token_ids[row, :length].astype(np.int32))
    tree.values = np.concatenate([[1.0], chains.values[row, :length].cumprod()]).astype(np.float32)
    if draws is not None:
        laws = [draft_laws(law[row : row + 1], state.request.sampling)[0].cpu() for law in chains.laws[:length]]
        tree.draft_probs = torch.stack([*laws, torch.zeros(chains.laws[0].shape[1], dtype=torch.float64)])
    return tree


def _by_noise(states: Sequence[RequestState]) -> Choose:
    """What the target would choose with these scores: its noise is known."""

    def choose(logits: Tensor, depth: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        ids, log_probs = best_children(logits, states, [depth] * len(states), 1)
        return ids[:, 0], np.exp(log_probs[:, 0])

    return choose


def _by_draw(states: Sequence[RequestState], draws: Draws) -> Choose:
    """An honest draw from the law, with noise of the drafter's own."""

    def choose(logits: Tensor, depth: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        ids, chances = [], []
        for state, row in zip(states, logits, strict=True):
            law = draft_laws(row[None], state.request.sampling)[0]
            key = {"seed": state.request.sampling.seed, "position": state.num_tokens, "node": depth - 1}
            ids += draw_children(law, 1, draws=draws, **key)
            chances.append(float(law[ids[-1]]))
        return np.array(ids, dtype=np.int64), np.array(chances)

    return choose
