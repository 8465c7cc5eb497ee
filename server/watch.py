"""What the engine's steps tell the server: counts for metrics, and log-probabilities and trees for who asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from specdec.types import StepEvent

__all__ = ["StepNotes", "StepTotals", "StepWatcher", "TokenLogprob", "TreeNote"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one emitted token under the model's own logits, before any processing.

    Args:
        token_id: the token.
        logprob: natural log.
        top: (token id, logprob) of the likeliest tokens, likeliest first.
        rank: tokens that score at least as high, itself included.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int = 1


@dataclass(frozen=True, slots=True)
class TreeNote:
    """One step's draft tree as a request sees it; node 0 is the root. What lies behind a stop is left out."""

    token_ids: list[int]
    parents: list[int]
    accepted_nodes: list[int]
    bonus_id: int | None  # None: the text ended with an accepted token


@dataclass(slots=True)
class StepNotes:
    """What a step left behind for one request."""

    steps: list[tuple[int, int]] = field(default_factory=list)  # (draft tokens, accepted tokens) of each step
    logprobs: list[TokenLogprob] = field(default_factory=list)
    trees: list[TreeNote] = field(default_factory=list)


@dataclass(slots=True)
class StepTotals:
    """Running sums over all requests since the start. Written by the engine's thread, read by others."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_emitted_tokens: int = 0
    num_steps: int = 0
    accepted_at: Counter[int] = field(default_factory=Counter)  # depth - 1 -> accepted tokens
    seconds: dict[str, float] = field(
        default_factory=lambda: {"draft": 0.0, "target": 0.0, "verify": 0.0, "commit": 0.0}
    )


@dataclass(frozen=True, slots=True)
class _Wish:
    num_logprobs: int | None
    has_steps: bool
    has_trace: bool
    is_scoring: bool = False


class StepWatcher:
    """Sums up every step and keeps details of the requests that wished for them (`specdec.protocols.Observer`)."""

    def __init__(self) -> None:
        self.totals = StepTotals()
        self._wishes: dict[str, _Wish] = {}
        self._notes: dict[str, StepNotes] = {}

    def watch(
        self, request_id: str, *, num_logprobs: int | None, has_steps: bool, has_trace: bool, is_scoring: bool = False
    ) -> None:
        """Keep details of a request from now on; nothing is kept where nothing is wished for.

        What a scoring request repeats is no draft and does not count.
        """
        if num_logprobs is not None or has_steps or has_trace:
            self._wishes[request_id] = _Wish(num_logprobs, has_steps, has_trace, is_scoring)

    def take(self, request_id: str) -> StepNotes | None:
        """The details since the last call, which are forgotten here."""
        return self._notes.pop(request_id, None)

    def drop(self, request_id: str) -> None:
        """Forget a request; one that is unknown is no error."""
        self._wishes.pop(request_id, None)
        self._notes.pop(request_id, None)

    def observe(self, events: Sequence[StepEvent]) -> None:
        if not events:
            return
        totals, trace = self.totals, events[0].trace
        totals.num_steps += 1
        for name, ms in zip(
            totals.seconds, (trace.draft_ms, trace.target_ms, trace.verify_ms, trace.commit_ms), strict=True
        ):
            totals.seconds[name] += ms / 1e3
        for event in events:
            wish = self._wishes.get(event.state.request_id)
            if wish is None or not wish.is_scoring:
                self._count(event)
            if wish is not None:
                self._note(event, wish)

    def _count(self, event: StepEvent) -> None:
        totals, num_drafted = self.totals, event.tree.num_draft_tokens
        totals.num_emitted_tokens += len(event.emitted_ids)
        if num_drafted:
            # A draft that was accepted beyond a stop counts for what was emitted only.
            num_accepted = min(event.result.num_accepted, len(event.emitted_ids))
            totals.num_drafts += 1
            totals.num_draft_tokens += num_drafted
            totals.num_accepted_tokens += num_accepted
            totals.accepted_at.update(range(num_accepted))

    def _note(self, event: StepEvent, wish: _Wish) -> None:
        notes = self._notes.setdefault(event.state.request_id, StepNotes())
        if wish.has_steps:
            notes.steps.append((event.tree.num_draft_tokens, min(event.result.num_accepted, len(event.emitted_ids))))
        if wish.num_logprobs is not None:
            notes.logprobs += _logprobs(event, wish.num_logprobs)
        if wish.has_trace:
            tree, accepted = event.tree, event.result.accepted_nodes[: len(event.emitted_ids)].tolist()
            notes.trees.append(
                TreeNote(
                    token_ids=tree.token_ids.tolist(),
                    parents=tree.parents.tolist(),
                    accepted_nodes=accepted,
                    bonus_id=int(event.emitted_ids[-1]) if len(event.emitted_ids) > len(accepted) else None,
                )
            )


def _logprobs(event: StepEvent, num_top: int) -> list[TokenLogprob]:
    ids = event.emitted_ids
    if not len(ids):
        return []
    first = int(event.output.cu_nodes[event.row])
    # The token after accepted node i comes from the logits of node i; the first one from the root's.
    rows = [first, *(first + int(node) for node in event.result.accepted_nodes[: len(ids) - 1])]
    table = event.output.logits[rows].float().log_softmax(-1)
    own = table.gather(-1, torch.as_tensor(ids, device=table.device).long()[:, None])
    chosen, ranks = own[:, 0].tolist(), (table >= own).sum(-1).tolist()
    best = table.topk(num_top, dim=-1) if num_top else None
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(ids)
    if best is not None:
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        tops = [tuple(zip(some_ids, values, strict=True)) for some_ids, values in pairs]
    return [
        TokenLogprob(int(i), value, top, rank) for i, value, top, rank in zip(ids, chosen, tops, ranks, strict=True)
    ]
