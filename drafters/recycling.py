"""Token Recycling: the likeliest successors that the target once named are drafted again.

Source: Token Recycling (Luo et al. 2024, 2408.08696). A matrix holds, for every token, the eight likeliest tokens after
it, taken from the logits of every tree node that was verified, accepted or not. A fixed template of 80 nodes is filled
from it. Differences: updates are deterministic (accepted rows are written after rejected ones), rows start from the
prompt (what follows each token in it, and once it has been read the target's own likeliest successors there), and a
smaller budget takes the nodes with the best measured acceptance instead of the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from specdec.drafters.store import RetrievalStore
from specdec.drafters.successors import TEMPLATE, SuccessorTable
from specdec.errors import InternalError
from specdec.protocols import DrafterNeeds
from specdec.types import DraftTree, IntArray, RequestState, StepEvent, VerifyResult

__all__ = ["RecyclingDrafter"]


class RecyclingDrafter:
    """Guesses from the target's own discarded logits (`specdec.protocols.Drafter`).

    Args:
        store: where the matrices are kept, one per tenant; a private one if None.
    """

    def __init__(self, *, store: RetrievalStore | None = None) -> None:
        self.needs = DrafterNeeds(num_successors=TEMPLATE.width)
        self.store = store or RetrievalStore()
        # And the pending draft: template nodes, tokens, parents. What is verified may be a part of it, or fused.
        self._live: dict[str, tuple[SuccessorTable, tuple[IntArray, IntArray, IntArray] | None]] = {}

    def start(self, states: Sequence[RequestState]) -> None:
        for state in states:
            table = self.store.successors(state.request.tenant)
            with self.store.lock:
                table.seed(state.token_ids, state.request_id)
            self._live[state.request_id] = (table, None)

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = []
        for state, budget in zip(states, budgets, strict=True):
            if state.request_id not in self._live:
                raise InternalError(f"request {state.request_id!r} was not started")
            table, _ = self._live[state.request_id]
            with self.store.lock:
                tokens, parents, values, nodes = table.fill(int(state.token_ids[-1]), int(budget))
            self._live[state.request_id] = (table, (nodes, tokens, parents))
            trees.append(DraftTree(tokens, parents, values))
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        for event in events:
            live = self._live.get(event.state.request_id)
            if live is None:
                continue
            table, draft = live
            first, last = event.output.cu_nodes[event.row : event.row + 2].tolist()
            logits, late = event.output.logits[first:last], event.output.late
            width = min(TEMPLATE.width, logits.shape[-1])
            if late is not None and event.output.kept_nodes is None:  # the target has looked already
                successors = late.read()[first:last, :width]
            else:
                successors = torch.topk(logits.float(), width, dim=-1).indices.cpu().numpy().astype(np.int32)
            accepted = event.result.accepted_nodes.tolist()
            with self.store.lock:
                for found in event.state.successors:
                    table.seed_logits(found.token_ids, found.next_ids, event.state.request_id)
                table.update(event.tree.token_ids, event.tree.depths(), accepted, successors, event.state.request_id)
                if draft is not None:
                    nodes, tokens, parents = draft
                    table.count(nodes, parents, _path(tokens, parents, event.result))
            self._live[event.state.request_id] = (table, None)

    def stop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._live.pop(request_id, None)


def _path(token_ids: IntArray, parents: IntArray, result: VerifyResult) -> list[int]:
    """The nodes of a tree that the target's choice runs through, without the root."""
    path: list[int] = []
    for token_id in (*result.accepted_ids.tolist(), result.bonus_id):
        children = np.flatnonzero((parents == (path[-1] if path else 0)) & (token_ids == token_id))
        if len(children) == 0:
            break
        path.append(int(children[0]))
    return path
