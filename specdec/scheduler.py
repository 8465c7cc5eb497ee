"""Who runs in the next step: admission, chunked prefill, and preemption when the KV pool is full.

Seniority is the order of admission. The oldest request is never preempted, so there is always progress; a preempted
one goes back to the head of the queue with all its tokens and is recomputed, so nothing is lost. A draft never costs
anybody a place: room for everyone's committed tokens comes first, drafts share what is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from specdec.config import EngineConfig
from specdec.errors import InternalError
from specdec.protocols import Load, TargetModel
from specdec.types import Chunk, DraftTree, RequestState

__all__ = ["Part", "Scheduler"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one request may do in the next step: cache ``num_prefix`` committed tokens and, if so, decode."""

    state: RequestState
    num_prefix: int
    decodes: bool


class Scheduler:
    """Continuous batching over one target. Owns the queue and the running list, in order of seniority."""

    def __init__(self, target: TargetModel, config: EngineConfig) -> None:
        self._target = target
        self._config = config
        self.waiting: deque[RequestState] = deque()
        self.running: list[RequestState] = []
        self._preempted = False

    def add(self, state: RequestState) -> None:
        """Queue a request."""
        self.waiting.append(state)

    def remove(self, state: RequestState) -> None:
        """Forget a request that is over, running or waiting."""
        if state in self.running:
            self.running.remove(state)
        elif state in self.waiting:
            self.waiting.remove(state)
        self._target.retire(state)

    def admit(self) -> list[RequestState]:
        """Move requests from the queue to the batch while there is room; the ones moved."""
        admitted: list[RequestState] = []
        preempted, self._preempted = self._preempted, False
        if preempted and self.running:  # whoever was just sent back would only be sent back again
            return admitted
        # What the running requests are about to take: the root's slot, and the prompt tokens still to be cached.
        claimed = sum(state.num_tokens - state.num_cached for state in self.running)
        while self.waiting and len(self.running) < self._config.max_batch_size:
            state = self.waiting[0]
            if self.running and not self._target.has_room(claimed + state.num_tokens):
                break
            self.running.append(self.waiting.popleft())
            admitted.append(state)
            state.num_cached = self._target.recall(state)
            if not state.num_preemptions:
                state.num_recalled = state.num_cached
            claimed += state.num_tokens - state.num_cached
        return admitted

    def plan(self) -> list[Part]:
        """Everyone's part in the next step; prompt tokens share ``max_prefill_tokens``, in order of seniority."""
        left = self._config.max_prefill_tokens
        parts: list[Part] = []
        for state in self.running:
            num_prefix = state.num_tokens - 1 - state.num_cached
            if num_prefix <= left:
                parts.append(Part(state, num_prefix, decodes=True))
                left -= num_prefix
            elif left > 0:
                parts.append(Part(state, left, decodes=False))
                left = 0
        return parts

    def load(self, parts: Sequence[Part]) -> Load:
        """How busy the step will be."""
        num_prefill = sum(part.num_prefix for part in parts)
        return Load(num_running=len(self.running), num_waiting=len(self.waiting), num_prefill_tokens=num_prefill)

    def reserve(self, parts: Sequence[Part], trees: dict[str, DraftTree]) -> list[Chunk]:
        """Reserve KV for the step and return its chunks.

        Without room for a draft the request decodes plainly; without room for committed tokens the newest request is
        preempted until there is.

        Raises:
            InternalError: the target cannot even hold the next step of one request that runs alone.
        """
        admitted = [part for part in parts if self._reserve_committed(part)]
        chunks: list[Chunk] = []
        for part in admitted:
            state = part.state
            if state not in self.running:
                raise InternalError(f"request {state.request_id} was preempted after its room had been reserved")
            tree = trees[state.request_id] if part.decodes else None
            if tree is not None and tree.num_draft_tokens and not self._target.reserve(state, tree.num_draft_tokens):
                tree = DraftTree.root_only(int(tree.token_ids[0]))
            prefix = state.token_ids[state.num_cached : state.num_cached + part.num_prefix]
            chunks.append(Chunk(state, prefix, tree))
        return chunks

    def _reserve_committed(self, part: Part) -> bool:
        state = part.state
        while state in self.running:
            if self._target.reserve(state, part.num_prefix + part.decodes):
                return True
            if len(self.running) == 1:
                raise InternalError(
                    f"the target has no room for {part.num_prefix + part.decodes} tokens of request "
                    f"{state.request_id!r}, although it runs alone"
                )
            self._preempt(self.running[-1])
        return False

    def _preempt(self, state: RequestState) -> None:
        self.running.remove(state)
        self.reset(state)
        state.num_preemptions += 1
        self.waiting.appendleft(state)
        self._preempted = True

    def reset(self, state: RequestState) -> None:
        """Drop a request's KV; its tokens stay and will be cached again."""
        self._target.release(state)
        state.num_cached = 0
        state.hidden = None
