"""The drafter that never guesses: plain decoding through the same loop."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.protocols import DrafterNeeds
from specdec.types import DraftTree, RequestState, StepEvent

__all__ = ["NoDrafter"]


class NoDrafter:
    """Proposes roots only (`specdec.protocols.Drafter`)."""

    needs = DrafterNeeds()

    def start(self, states: Sequence[RequestState]) -> None:
        """Nothing to prepare."""

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        return [DraftTree.root_only(int(state.token_ids[-1])) for state in states]

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to learn."""

    def stop(self, request_ids: Sequence[str]) -> None:
        """Nothing to forget."""
