"""What can be learned from draft tokens that were not accepted: their laws, in the contexts that the drafter made.

Behind a wrong draft token the text never went on, so no trace of the text says what the target would have said there.
The forward that verified the draft knew. Where those laws were kept, the head is unrolled along the draft as it was
when it drafted, on its own outputs, and learns the target's law after every wrong token (the discarded part of Aurora's
objective, arXiv 2602.06932, here with the k likeliest tokens and one bucket for the others).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from specdec.online_training.data import TrainBatch
from specdec.online_training.records import TraceRecord
from specdec.online_training.train_eagle import EagleModule, UnrolledAttention
from specdec.online_training.train_module import BatchSums

__all__ = ["Branches", "CounterfactualEagle", "branches_of", "law_loss"]

_LEAST = 1e-8  # probability; a law's logarithm stays finite where nothing is left for the other tokens


@dataclass(frozen=True, slots=True, eq=False)
class Branches:
    """N draft paths through rejected tokens, in a batch of B requests.

    Args:
        rows: [N, 2] int64, ascending: (request, place of the token before the root).
        token_ids: [N, K] int64: the drafted path.
        is_taught: [N, K] bool: the law after this token was kept.
        top_ids: [N, K, k] int64.
        top_logprobs: [N, K, k] float32.
    """

    rows: Tensor
    token_ids: Tensor
    is_taught: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def branches_of(records: Sequence[TraceRecord], starts: Sequence[int], *, most: int = 64) -> Branches | None:
    """One path of each round whose rejected laws were kept, ``most`` in all, evenly spaced; None: there are none.

    Args:
        records: the requests of a batch.
        starts: position of the first token of each that the batch holds.
        most: paths.
    """
    found: list[tuple[tuple[int, int], list[int], list[tuple[Tensor, Tensor] | None]]] = []
    for row, (record, start) in enumerate(zip(records, starts, strict=True)):
        if record.features is None or "rejected_nodes" not in record.features.tensors:
            continue
        tensors, rounds = record.features.tensors, record.rounds
        kept: dict[int, dict[int, int]] = {}
        for index, (number, node) in enumerate(tensors["rejected_nodes"].tolist()):
            kept.setdefault(number, {})[node] = index
        first_nodes = np.cumsum([0, *rounds.num_drafted.tolist()])
        for number, rejected in sorted(kept.items()):
            place = int(rounds.positions[number]) - 2 - start
            part = slice(int(first_nodes[number]), int(first_nodes[number + 1]))
            path = _path(rounds.draft_parents[part].tolist(), set(rejected))
            if place < 0 or not path:
                continue
            ids = rounds.draft_ids[part]
            laws = [
                (tensors["rejected_top_ids"][rejected[node]], tensors["rejected_top_logprobs"][rejected[node]])
                if node in rejected
                else None
                for node in path
            ]
            found.append(((row, place), [int(ids[node - 1]) for node in path], laws))
    chosen = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, most).astype(int))] if found else []
    return _stack(chosen) if chosen else None


def _path(parents: Sequence[int], rejected: set[int]) -> list[int]:
    """Nodes from behind the root to the deepest rejected one, the first of these."""
    depth, best = {0: 0}, 0
    for node, parent in enumerate(parents, start=1):
        depth[node] = depth[parent] + 1
        if node in rejected and depth[node] > depth[best]:
            best = node
    path = []
    while best:
        path.append(best)
        best = parents[best - 1]
    return path[::-1]


def _stack(found: Sequence[tuple[tuple[int, int], list[int], list[tuple[Tensor, Tensor] | None]]]) -> Branches:
    depth = max(len(ids) for _, ids, _ in found)
    width = next(law[0].shape[0] for _, _, laws in found for law in laws if law is not None)
    token_ids = torch.zeros(len(found), depth, dtype=torch.int64)
    is_taught = torch.zeros(len(found), depth, dtype=torch.bool)
    top_ids = torch.zeros(len(found), depth, width, dtype=torch.int64)
    top_logprobs = torch.zeros(len(found), depth, width)
    for i, (_, ids, laws) in enumerate(found):
        token_ids[i, : len(ids)] = torch.tensor(ids)
        for j, law in enumerate(laws):
            if law is not None:
                is_taught[i, j] = True
                top_ids[i, j], top_logprobs[i, j] = law[0].long(), law[1].float()
    return Branches(torch.tensor([place for place, _, _ in found]), token_ids, is_taught, top_ids, top_logprobs)


def law_loss(logits: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """[N]: KL from a law known by its likeliest tokens to logits [N, V]; all other tokens are one bucket."""
    log_q = logits.log_softmax(dim=-1).gather(-1, top_ids).clamp_min(float(np.log(_LEAST)))
    p, q = top_logprobs.exp(), log_q.exp()
    rest_p, rest_q = (1 - p.sum(-1)).clamp_min(_LEAST), (1 - q.sum(-1)).clamp_min(_LEAST)
    return (p * (top_logprobs - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())


class CounterfactualEagle(EagleModule):
    """An EAGLE-3 head that also learns from rejected drafts; see ``EagleModule``.

    Attributes:
        branches: of the next batch; taken by ``forward``.
        factor: lambda of the objective.
    """

    branches: Branches | None = None
    factor: float = 0.1

    def forward(self, batch: TrainBatch) -> BatchSums:
        sums = super().forward(batch)
        branches, self.branches = self.branches, None
        if branches is None or not self.training or not self.factor:
            return sums
        mean = self.branch_loss(batch, branches)
        return replace(sums, loss=sums.loss + self.factor * sums.weight * mean)

    def branch_loss(self, batch: TrainBatch, branches: Branches) -> Tensor:
        """Mean loss over all laws of the branches, on their contexts in the batch."""
        assert batch.states is not None, "states must be filled"
        self.head.weights = dict(self.named_parameters())
        shape, length = batch.token_ids.shape, batch.token_ids.shape[1]
        flat_rows = branches.rows[:, 0] * length + branches.rows[:, 1]
        attend = UnrolledAttention((shape[0], length), flat_rows)
        following = torch.cat((batch.token_ids[:, 1:], batch.token_ids[:, :1]), dim=1)
        positions = torch.arange(length, device=flat_rows.device).expand(shape)
        outputs = self.head.forward(
            following.flatten(), self.head.fuse(batch.states.flatten(0, 1)), positions.flatten(), attend
        )[flat_rows]
        losses = []
        for depth in range(branches.token_ids.shape[1]):
            places = branches.rows[:, 1] + depth + 1
            outputs = self.head.forward(branches.token_ids[:, depth], self.head.feedback(outputs), places, attend)
            taught = branches.is_taught[:, depth]
            logits = self.head.target_logits(outputs[taught], self.features.vocab_size)
            losses.append(law_loss(logits, branches.top_ids[taught, depth], branches.top_logprobs[taught, depth]))
        return torch.cat(losses).mean()
