"""Speculation that each request chooses for itself: which drafter guesses, and how much at most.

With the match rule neither can change a text, so requests are free to choose. All of this belongs to the engine's
thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from specdec.errors import ConfigError, RequestError
from specdec.protocols import Controller, Drafter, DrafterNeeds, Load
from specdec.types import DraftTree, IntArray, Request, RequestState, StepEvent

__all__ = ["CappedController", "Choice", "Choices", "RoutedDrafter"]

_READS_TEXT = frozenset({"ngram", "suffix", "lookahead"})
_LEAD = 8  # tokens of the prompt's end that stand before a hint, so that it is matched from the first output token on
Trim: TypeAlias = Callable[[RequestState, DraftTree], DraftTree]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What one request chose.

    Args:
        drafter: name of the drafter.
        max_draft_tokens: most draft tokens per step; 0: plain decoding; None: as the server's controller plans.
        hint_ids: [H] int32: text that the output is expected to repeat; its drafter reads it as if it stood before
            the prompt.
        trim: takes from a draft what cannot be accepted.
        is_private: the request must not be captured.
        script_ids: [S] int32: what the output will be, because a processor sees to it; drafted as it stands.
    """

    drafter: str
    max_draft_tokens: int | None = None
    hint_ids: IntArray | None = None
    trim: Trim | None = None
    is_private: bool = False
    script_ids: IntArray | None = None


class Choices:
    """What every live request chose; requests that are not listed take the first drafter, uncapped.

    Args:
        drafters: names, the default first.

    Raises:
        ConfigError: no drafter is named, or one twice.
    """

    def __init__(self, drafters: Sequence[str]) -> None:
        if not drafters:
            raise ConfigError("a server needs at least one drafter; name none for plain decoding")
        if len(set(drafters)) < len(drafters):
            raise ConfigError(f"a server's drafters must have different names, got {', '.join(drafters)}")
        self.drafters = tuple(drafters)
        self._default = Choice(self.drafters[0])
        self._chosen: dict[str, Choice] = {}

    def choice(self, drafter: str | None, max_draft_tokens: int | None, *, hint_ids: IntArray | None = None) -> Choice:
        """A choice from a request's wishes. A hint is dropped where the drafter guesses from other things than text.

        Raises:
            RequestError: the server has no such drafter.
        """
        if drafter is not None and drafter not in self.drafters:
            raise RequestError(f"speculative.drafter must be one of {', '.join(self.drafters)}, got {drafter!r}")
        name = drafter or self.drafters[0]
        return Choice(name, max_draft_tokens, hint_ids if name in _READS_TEXT else None)

    def set(self, request_id: str, choice: Choice) -> None:
        """Remember a request's choice, before it is submitted."""
        self._chosen[request_id] = choice

    def of(self, request_id: str) -> Choice:
        """The choice of a request."""
        return self._chosen.get(request_id, self._default)

    def drop(self, request_id: str) -> None:
        """Forget a request; one that is unknown is no error."""
        self._chosen.pop(request_id, None)


class CappedController:
    """Another controller's budgets, cut to what each request allows (`specdec.protocols.Controller`).

    Args:
        inner: plans.
        choices: of the live requests.
    """

    def __init__(self, inner: Controller, choices: Choices) -> None:
        self._inner = inner
        self._choices = choices

    def plan(self, states: Sequence[RequestState], load: Load) -> list[int]:
        chosen = [self._choices.of(state.request_id) for state in states]
        planned = self._inner.plan(states, load)
        return [
            len(choice.script_ids) if choice.script_ids is not None
            else budget if choice.max_draft_tokens is None else min(budget, choice.max_draft_tokens)
            for budget, choice in zip(planned, chosen, strict=True)
        ]  # fmt: skip

    @property
    def costs(self) -> object:
        """The cost model of a planner that has one."""
        return getattr(self._inner, "costs", None)

    def admit(self, states: Sequence[RequestState], trees: Sequence[DraftTree]) -> Sequence[DraftTree]:
        return self._inner.admit(states, trees)

    def observe(self, events: Sequence[StepEvent]) -> None:
        self._inner.observe(events)


class RoutedDrafter:
    """Several drafters, of which each request has one (`specdec.protocols.Drafter`).

    Args:
        drafters: name -> drafter.
        choices: of the live requests.
    """

    def __init__(self, drafters: Mapping[str, Drafter], choices: Choices) -> None:
        self._drafters = dict(drafters)
        self._choices = choices
        self._owner: dict[str, str] = {}  # live request -> its drafter, fixed at its start
        self._hinted: dict[str, _Hinted] = {}
        needs = [drafter.needs for drafter in self._drafters.values()]
        self.needs = DrafterNeeds(
            hidden_layers=tuple(sorted({layer for need in needs for layer in need.hidden_layers})),
            needs_match=any(need.needs_match for need in needs),
            num_successors=max((need.num_successors for need in needs), default=0),
        )

    @property
    def drafters(self) -> tuple[Drafter, ...]:
        """All of them."""
        return tuple(self._drafters.values())

    def start(self, states: Sequence[RequestState]) -> None:
        for state in states:
            choice = self._choices.of(state.request_id)
            if choice.hint_ids is not None:
                self._hinted[state.request_id] = _Hinted(state, choice.hint_ids)
            try:
                self._drafters[choice.drafter].start([self._seen(state)])
            except BaseException:
                self._hinted.pop(state.request_id, None)
                raise
            self._owner[state.request_id] = choice.drafter

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees: dict[str, DraftTree] = {}
        for name, drafter in self._drafters.items():
            mine = [row for row, state in enumerate(states) if self._owner[state.request_id] == name]
            if mine:
                made = drafter.propose([self._seen(states[row]) for row in mine], [budgets[row] for row in mine])
                trees.update((states[row].request_id, tree) for row, tree in zip(mine, made, strict=True))
        return [
            self._trimmed(state, trees[state.request_id], budget) for state, budget in zip(states, budgets, strict=True)
        ]

    def observe(self, events: Sequence[StepEvent]) -> None:
        for name, drafter in self._drafters.items():
            # An observer before us may have ended a request in this very step.
            mine = [event for event in events if self._owner.get(event.state.request_id) == name]
            if mine:
                drafter.observe(mine)

    def stop(self, request_ids: Sequence[str]) -> None:
        for name, drafter in self._drafters.items():
            mine = [request_id for request_id in request_ids if self._owner.get(request_id) == name]
            for request_id in mine:
                if request_id in self._hinted:
                    self._hinted[request_id].follow()  # drafters learn from the text's end too
            if mine:
                drafter.stop(mine)
        for request_id in request_ids:
            self._owner.pop(request_id, None)
            self._hinted.pop(request_id, None)

    def _seen(self, state: RequestState) -> RequestState:
        """The request as its drafter sees it: with its hint before it, if it has one."""
        hinted = self._hinted.get(state.request_id)
        return state if hinted is None else hinted.follow()

    def _trimmed(self, state: RequestState, tree: DraftTree, budget: int) -> DraftTree:
        choice = self._choices.of(state.request_id)
        if choice.script_ids is not None:
            at = state.num_output_tokens
            return DraftTree.chain(int(state.token_ids[-1]), choice.script_ids[at : at + budget])
        return tree if choice.trim is None or len(tree) == 1 else choice.trim(state, tree)


class _Hinted:
    """A shadow of a request whose prompt begins with its hint. Only drafters see it."""

    __slots__ = ("_shadow", "_state", "_surplus")

    def __init__(self, state: RequestState, hint_ids: IntArray) -> None:
        prompt = state.token_ids
        text = np.concatenate((prompt[-_LEAD:], hint_ids, prompt))
        self._surplus = len(text) - len(prompt)
        self._state = state
        self._shadow = RequestState(Request(state.request_id, text, tenant=state.request.tenant))

    def follow(self) -> RequestState:
        """The shadow, up to the request's last token."""
        seen = self._shadow.num_tokens - self._surplus
        if self._state.num_tokens > seen:
            self._shadow.append(self._state.token_ids[seen:])
        return self._shadow
