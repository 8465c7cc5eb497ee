"""Makes what a load simulation needs from what is there: recorded acceptance from traces, a cost table from a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from specdec.bench.forcing import ForcedResponse
from specdec.bench.recorded_acceptance import Answer, RecordedAcceptance, accepted_by_size
from specdec.bench.scripted import scripted_engine
from specdec.bench.workload import WorkItem
from specdec.build import build_drafter, name_drafter
from specdec.errors import ConfigError
from specdec.protocols import Drafter, DrafterNeeds, Load
from specdec.types import DraftTree, Request, RequestState, SamplingParams, StepEvent

__all__ = ["record_acceptance"]


class _Recorder:
    """Passes drafts through, keeps them, and learns nothing of its own (`specdec.protocols.Drafter`)."""

    def __init__(self, inner: Drafter) -> None:
        self.inner, self.needs = inner, DrafterNeeds()
        self.drafts: list[tuple[str, DraftTree]] = []

    def start(self, states: Sequence[RequestState]) -> None:
        self.inner.start(states)

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = self.inner.propose(states, budgets)
        self.drafts += [(state.request_id, tree) for state, tree in zip(states, trees, strict=True)]
        return trees

    def observe(self, events: Sequence[StepEvent]) -> None:
        self.inner.observe(events)

    def stop(self, request_ids: Sequence[str]) -> None:
        self.inner.stop(request_ids)


class _ProposeOnly:
    """Lets drafters guess and verifies nothing, so that every position is visited (`specdec.protocols.Controller`)."""

    def __init__(self, budget: int) -> None:
        self._budget = budget

    def plan(self, states: Sequence[RequestState], load: Load) -> list[int]:
        return [self._budget] * len(states)

    def admit(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> Sequence[DraftTree]:
        return [DraftTree.root_only(int(tree.token_ids[0])) for tree in trees]

    def observe(self, events: Sequence[StepEvent]) -> None:
        """Nothing to learn."""


def record_acceptance(
    items: Sequence[WorkItem], drafter: str | Drafter = "fused:suffix+lookahead+ngram", *, budget: int = 32
) -> RecordedAcceptance:
    """What a drafter of text proposes at every position of recorded answers, in order, and what of it was right.

    Args:
        items: calls with answers.
        drafter: a name or an object; it must read text only.
        budget: most nodes of a draft.

    Raises:
        ConfigError: no answer, or a drafter that needs a model.
    """
    named = name_drafter(drafter)
    if not isinstance(named, Drafter):
        raise ConfigError(
            f"acceptance is recorded without a model, so the drafter must read text only, got {drafter!r}"
        )
    vocab_size = 1 + max(int(ids.max(initial=0)) for item in items for ids in (item.prompt_ids, item.response_ids))
    recorder = _Recorder(build_drafter(named))
    engine = scripted_engine(vocab_size, recorder, budget=budget)
    engine.controller = _ProposeOnly(budget)
    answers = []
    for number, item in enumerate(items):
        if not len(item.response_ids):
            continue
        recorder.drafts.clear()
        forced = ForcedResponse([item.response_ids], len(item.prompt_ids))
        sampling = SamplingParams(max_new_tokens=len(item.response_ids), logits_processors=(forced,))
        for _ in engine.generate([Request(f"record-{number}", item.prompt_ids, sampling)]):
            pass
        truth = np.asarray(item.response_ids, dtype=np.int32)
        answers.append(
            Answer.of([accepted_by_size(tree, truth[place:]) for place, (_, tree) in enumerate(recorder.drafts)])
        )
    return RecordedAcceptance(tuple(answers))
