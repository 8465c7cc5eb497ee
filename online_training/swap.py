"""A drafter whose weights change while it serves, at round boundaries, without one emitted token changing.

Versions are kept apart: a request keeps the version that it began with, for its draft cache was made by those weights.
Each of a few lanes holds one drafter; a new version is copied into the tensors of a lane that no request uses, in
place. With ``at_once`` weights are copied into the lane in use instead: requests go on with caches that older weights
made, which costs some acceptance and no token.

Which version does what: *current* serves, *canary* serves a share of new requests, *pinned* drafts unseen beside the
current one for a few requests, so that a fall can be told from a change of traffic.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

from specdec.errors import ConfigError, InternalError
from specdec.online_training.guard import share_of
from specdec.online_training.registry import Registry
from specdec.online_training.version_weights import WeightedDrafter, check_like, copy_weights
from specdec.types import DraftTree, IntArray, RequestState, StepEvent

__all__ = ["FinishedRequest", "Role", "VersionCounts", "VersionedDrafter"]

Role: TypeAlias = Literal["current", "canary", "pinned"]
_NUM_LANES = 4  # one for each role, and one whose requests are running out
_MAX_FINISHED = 10_000


@dataclass(slots=True, eq=False)
class _Lane:
    drafter: WeightedDrafter
    version: int = 0
    requests: set[str] = field(default_factory=set)


@dataclass(slots=True)
class VersionCounts:
    """What a version has done since the start."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_accepted: int = 0


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """What speculation did for a request.

    Args:
        version: that drafted.
        is_canary: it was on trial.
        num_rounds: that drafted, >= 1.
        tokens: that these rounds brought: accepted + 1 each.
        shadow: tokens per round that the pinned baseline's drafts would have brought; None: it was not asked.
    """

    version: int
    is_canary: bool
    num_rounds: int
    tokens: int
    shadow: float | None


@dataclass(slots=True, eq=False)
class _Served:
    lane: _Lane
    version: int
    is_canary: bool
    shadow: _Lane | None
    state: RequestState
    num_rounds: int = 0
    tokens: int = 0
    shadow_trees: list[tuple[int, DraftTree]] = field(default_factory=list)  # (position after the root, tree)


class VersionedDrafter:
    """Drafts with versions of one drafter (`specdec.protocols.Drafter`).

    The engine's thread drafts; ``install`` and the figures are for any other thread.

    Args:
        make: a drafter with some version's weights; called once per lane, before serving.
        version: which version that is.
        weights: of it, as ``read_weights`` gives them.
        canary_share: of new requests, for the canary.
        shadow_share: of new requests, for which the pinned version drafts unseen.
        at_once: copy into the lane in use.
        registry: where the versions come from, for who looks after them; None: from nowhere.
    """

    def __init__(
        self,
        make: Callable[[], WeightedDrafter],
        version: int,
        weights: Mapping[str, Tensor],
        *,
        canary_share: float = 0.05,
        shadow_share: float = 0.01,
        at_once: bool = False,
        registry: Registry | None = None,
    ) -> None:
        self.registry = registry
        self._pattern = dict(weights)
        self._lanes = [_Lane(make()) for _ in range(1 if at_once else _NUM_LANES)]
        missing = sorted(
            name
            for name, w in weights.items()
            if w.is_floating_point() and name not in self._lanes[0].drafter.named_weights
        )
        if missing:
            raise ConfigError(f"a drafter that is swapped must name all its weights, {missing[0]} is not among them")
        self._lanes[0].version = version
        self.needs = self._lanes[0].drafter.needs
        self.canary_share, self.shadow_share, self._at_once = canary_share, shadow_share, at_once
        self._roles: dict[Role, _Lane | None] = {"current": self._lanes[0], "canary": None, "pinned": None}
        self._pending: dict[Role, tuple[int, Mapping[str, Tensor]]] = {}
        self._served: dict[str, _Served] = {}
        self._lock = threading.Lock()
        self.finished: deque[FinishedRequest] = deque(maxlen=_MAX_FINISHED)  # for one reader, who takes from the left
        self.counts: dict[int, VersionCounts] = {version: VersionCounts()}
        self.num_swaps = 0

    def install(self, role: Role, version: int, weights: Mapping[str, Tensor]) -> None:
        """Have a version take a role from the next round on, as soon as a lane is free; 0 leaves the role empty.

        Raises:
            LoadError: the weights could not stand where the present ones do; nothing changes.
        """
        if version:
            check_like(weights, self._pattern)
        elif role == "current":
            raise InternalError("a current version must be there")
        with self._lock:
            self._pending[role] = version, weights

    def version_in(self, role: Role) -> int:
        """The version that has a role now; 0: none."""
        lane = self._roles[role]
        return lane.version if lane else 0

    def wanted_in(self, role: Role) -> int:
        """The version that has a role, or will have it once a lane is free."""
        with self._lock:
            return self._pending[role][0] if role in self._pending else self.version_in(role)

    def version_of(self, request_id: str) -> int:
        """The version that drafts for a request; 0: it is not served here."""
        served = self._served.get(request_id)
        return served.lane.version if served else 0

    def start(self, states: Sequence[RequestState]) -> None:
        self._swap()
        for state in states:
            served = self._route(state)
            for lane in _both(served):
                lane.drafter.start([state])
                lane.requests.add(state.request_id)
            self._served[state.request_id] = served

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        self._swap()
        trees: dict[str, DraftTree] = {}
        for lane in self._lanes:
            rows = [row for row, state in enumerate(states) if state.request_id in lane.requests]
            if not rows:
                continue
            made = lane.drafter.propose([states[row] for row in rows], [budgets[row] for row in rows])
            for row, tree in zip(rows, made, strict=True):
                served = self._served[states[row].request_id]
                if served.lane is lane:
                    trees[states[row].request_id] = tree
                else:
                    served.shadow_trees.append((states[row].num_tokens, tree))
        return [trees[state.request_id] for state in states]

    def observe(self, events: Sequence[StepEvent]) -> None:
        for lane in self._lanes:
            mine = [event for event in events if event.state.request_id in lane.requests]
            if mine:
                lane.drafter.observe(mine)
        for event in events:
            served = self._served.get(event.state.request_id)
            if served is not None and event.tree.num_draft_tokens:
                self._count(served, event)

    def stop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            served = self._served.pop(request_id, None)
            if served is None:
                continue
            for lane in _both(served):
                lane.drafter.stop([request_id])
                lane.requests.discard(request_id)
            if served.num_rounds:
                shadow = _judge(served) if served.shadow is not None else None
                self.finished.append(
                    FinishedRequest(served.version, served.is_canary, served.num_rounds, served.tokens, shadow)
                )

    def _route(self, state: RequestState) -> _Served:
        request_id = state.request_id
        current, canary, pinned = self._roles["current"], self._roles["canary"], self._roles["pinned"]
        if current is None:
            raise InternalError("no version serves")
        is_canary = canary is not None and share_of(request_id, "canary") < self.canary_share
        lane = canary if is_canary and canary is not None else current
        is_shadowed = pinned is not None and pinned is not lane and share_of(request_id, "shadow") < self.shadow_share
        return _Served(lane, lane.version, is_canary, pinned if is_shadowed else None, state)

    def _count(self, served: _Served, event: StepEvent) -> None:
        num_accepted = min(event.result.num_accepted, len(event.emitted_ids))
        counts = self.counts.setdefault(served.lane.version, VersionCounts())
        counts.num_rounds += 1
        counts.num_drafted += event.tree.num_draft_tokens
        counts.num_accepted += num_accepted
        served.num_rounds += 1
        served.tokens += num_accepted + 1

    def _swap(self) -> None:
        """Give roles to the versions that wait for them, where a lane is there; between rounds only."""
        if not self._pending:
            return
        with self._lock:
            for role, (version, weights) in list(self._pending.items()):
                if self._take(role, version, weights):
                    del self._pending[role]

    def _take(self, role: Role, version: int, weights: Mapping[str, Tensor]) -> bool:
        if not version:
            self._roles[role] = None
            return True
        lane = next((lane for lane in self._lanes if lane.version == version), None)
        if lane is None:
            lane = self._lanes[0] if self._at_once else self._free_lane(role)
            if lane is None:
                return False
            copy_weights(weights, lane.drafter)
            lane.version = version
            self.counts.setdefault(version, VersionCounts())
            self.num_swaps += 1
        self._roles[role] = lane
        return True

    def _free_lane(self, role: Role) -> _Lane | None:
        """A lane without requests and without another role."""
        busy = [lane for name, lane in self._roles.items() if name != role and lane is not None]
        return next((lane for lane in self._lanes if not lane.requests and lane not in busy), None)


def _both(served: _Served) -> list[_Lane]:
    return [served.lane, *([served.shadow] if served.shadow is not None else [])]


def _judge(served: _Served) -> float:
    """Tokens per round that the unseen drafts would have brought, by the finished text."""
    text = served.state.token_ids
    drafted = [(start, tree) for start, tree in served.shadow_trees if tree.num_draft_tokens]
    return sum(_would_accept(tree, text[start:]) + 1 for start, tree in drafted) / max(1, len(drafted))


def _would_accept(tree: DraftTree, text: IntArray) -> int:
    """How many tokens of a text stand on one path from the root of a tree."""
    node, count = 0, 0
    for token_id in text.tolist():
        children = ((tree.parents == node) & (tree.token_ids == token_id)).nonzero()[0]
        if not len(children):
            break
        node, count = int(children[0]), count + 1
    return count
