"""The contracts between the parts: who calls what, with which shapes, and what is promised.

One step of the engine is one line of this module after the other:
``plan`` -> ``propose`` -> ``forward`` -> ``verify`` -> ``commit`` -> ``observe``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from specdec.types import Chunk, DraftTree, RequestState, StepEvent, TargetOutput, VerifyResult

__all__ = [
    "Controller", "Drafter", "DrafterNeeds", "Draws", "Load", "Observer", "PrunesDrafts", "TargetModel", "Verifier",
]  # fmt: skip

# How the tokens of a tree were drawn from the laws that it states; siblings stand in the order of their draws.
Draws: TypeAlias = Literal["chain", "with_replacement", "without_replacement"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterNeeds:
    """What a drafter asks of the engine.

    Args:
        hidden_layers: target layers whose output states it reads, as indices into ``output_hidden_states``.
        needs_match: its choices depend on drawn tokens, so only the match rule is lossless with it.
        draws: it fills ``DraftTree.draft_probs`` and draws from them like this; None: it states no laws, so that the
            rejection rules cannot judge it.
        num_successors: how many likeliest next tokens it reads after each prompt token that is not found in a cache of
            prefixes (``RequestState.successors``).
            Only targets of the tree path give them; the others give none.
    """

    hidden_layers: tuple[int, ...] = ()
    needs_match: bool = False
    draws: Draws | None = None
    num_successors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy the engine is in this step."""

    num_running: int
    num_waiting: int
    num_prefill_tokens: int  # prompt tokens that share the forward with the trees


@runtime_checkable
class Drafter(Protocol):
    """Guesses the next tokens of a batch of requests. Not thread-safe: the engine's thread owns it."""

    needs: DrafterNeeds

    def start(self, states: Sequence[RequestState]) -> None:
        """Take up requests; called once per request, before its first ``propose``."""

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        """One tree per request, at most ``budgets[r]`` draft tokens each; root only means "no guess"."""

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Learn what became of the trees; called after every step, also for requests that drafted nothing."""

    def stop(self, request_ids: Sequence[str]) -> None:
        """Forget requests, finished or cancelled; their text may be learned from."""


@runtime_checkable
class PrunesDrafts(Protocol):
    """A drafter that leaves out nodes that it believes in too little.

    A fused drafter sets where that begins, by what verifying a node costs; an option of a part holds until that is
    known.

    Attributes:
        min_value: nodes whose path has a smaller chance are not drafted, in [0, 1].
    """

    min_value: float


@runtime_checkable
class Controller(Protocol):
    """Decides how many draft tokens each request may use."""

    def plan(self, states: Sequence[RequestState], load: Load) -> list[int]:
        """A budget >= 0 per request; 0 is always allowed and means plain decoding."""

    def admit(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> Sequence[DraftTree]:
        """What of the drafts is verified: per request the tree itself or a connected part of it with the root."""

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Learn from what the last step cost and brought."""


@runtime_checkable
class TargetModel(Protocol):
    """The big model and its KV. It owns the cache of every request it was given."""

    vocab_size: int
    max_length: int  # most tokens of one request, prompt and output together
    supports_trees: bool  # False: chains only
    max_draft_tokens: int  # most draft tokens of one request's step; 0: plain decoding only

    def reserve(self, state: RequestState, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` more query tokens of a request's next chunk, or change nothing: False.

        May be called several times before a forward; the room adds up.
        """

    def has_room(self, num_tokens: int) -> bool:
        """True if ``num_tokens`` more tokens could be reserved now; a hint for admission."""

    def fits(self, num_tokens: int) -> bool:
        """True if one request of ``num_tokens`` tokens, alone, can ever be held."""

    def forward(self, chunks: Sequence[Chunk]) -> TargetOutput:
        """Score all chunks in one pass; room for each must have been reserved.

        Effects: the KV of all query tokens is written; it counts as cached only after ``commit``.
        """

    def commit(self, chunks: Sequence[Chunk], keep: Sequence[Sequence[int]]) -> None:
        """Keep the prefix and, of each tree, the nodes ``keep[r]`` (root first, one path); drop all other nodes.

        Effects: the reserved room of dropped nodes is free again. The engine updates ``state.num_cached``.
        """

    def recall(self, state: RequestState) -> int:
        """Find K/V of the request's beginning that is held already; how many leading tokens are cached thereby.

        For a request that holds nothing; less than ``state.num_tokens``, often 0.
        """

    def retire(self, state: RequestState) -> None:
        """A request is over: drop what is held for it, or keep it for others until its room is needed."""

    def release(self, state: RequestState) -> None:
        """Drop everything held for a request; a request that is unknown is not an error."""


@runtime_checkable
class Verifier(Protocol):
    """Decides what the target would have produced itself.

    Attributes:
        draws: how drafts must have been drawn for its law to be the target's; None: it does not matter.
        is_lossless: False: what it emits is not a draw from the target's law.
    """

    draws: frozenset[Draws] | None
    is_lossless: bool

    def start(self, state: RequestState) -> None:
        """Take up a request: compile its processors."""

    def verify(
        self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput
    ) -> list[VerifyResult]:
        """One result per tree. Must not depend on batch order or neighbours; match on (law, seed, position) only."""

    def commit(self, state: RequestState, emitted_ids: Sequence[int]) -> None:
        """Follow a request's committed tokens (token counts of penalties); called before they are appended."""

    def stop(self, request_ids: Sequence[str]) -> None:
        """Forget requests."""


@runtime_checkable
class Observer(Protocol):
    """Sees every step: trace writer, metrics, replay buffer."""

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Take note. Must not block."""
