"""One request's drafts: from its tenant's store, laid out by the plan, allowed by the gates, paid from the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from specdec.server.sidecar.gates import Budget, LoadGate
from specdec.server.sidecar.metrics import SidecarMetrics
from specdec.server.sidecar.plan import Layout, PlanOptions, Timing, best_layout, best_round
from specdec.server.sidecar.splice import Guess
from specdec.suffix_tree.cache import SuffixCache

__all__ = ["Drafting", "Shop", "drafts_of"]

_NOTHING = np.empty(0, np.int32)


@dataclass(slots=True)
class Shop:
    """What all requests share.

    Args:
        cache: the tenants' texts.
        plan: what may be launched.
        timing: of the upstream.
        gate: closed while the upstream is busy.
        budget: of extra tokens.
        metrics: of the sidecar.
    """

    cache: SuffixCache
    plan: PlanOptions
    timing: Timing
    gate: LoadGate
    budget: Budget
    metrics: SidecarMetrics
    has_uncut: bool = field(default=False)  # an event could not be cut: sampled requests are passed through from then

    @property
    def is_crowded(self) -> bool:
        """Branches are under way."""
        return self.budget.num_branches > 0

    def saw_gap(self, seconds: float, num_tokens: int, *, was_crowded: bool) -> None:
        """Time between two events of a client's own stream.

        Args:
            seconds: between them.
            num_tokens: of the later one.
            was_crowded: branches were under way at the earlier one.
        """
        self.timing.saw_gap(seconds, num_tokens)
        self.gate.saw_gap(seconds / max(num_tokens, 1), is_crowded=was_crowded)


def drafts_of(
    cache: SuffixCache, request_id: str, new_ids: Sequence[int], *, limit: int, threshold: float
) -> tuple[list[int], list[float]]:
    """Append tokens to a live request; its draft as (ids, probabilities that the path is accepted)."""
    made = cache.step([request_id], [np.array(new_ids, np.int32)], [limit], threshold=threshold, as_tree=False)
    return made.token_ids[1:].tolist(), made.values[1:].tolist()


class Drafting:
    """Drafts for one request (`specdec.server.sidecar.splice.Guesser`).

    Args:
        shop: shared.
        request_id: unique.
        tenant: whose store is read and, if ``may_learn``, written.
        limit: output tokens of the request.
        may_learn: the output is kept.
        may_write: events of a branch can be written now.
        is_sampled: a continuation is another draw.
        proto: race, grid or rounds.
    """

    def __init__(
        self,
        shop: Shop,
        request_id: str,
        tenant: str,
        *,
        limit: int,
        may_learn: bool,
        may_write: Callable[[], bool],
        is_sampled: bool,
        proto: str = "grid",
    ) -> None:
        self._shop, self._id, self._tenant, self._limit = shop, request_id, tenant, limit
        self._may_learn, self._may_write, self._is_sampled = may_learn, may_write, is_sampled
        self._proto = proto
        self._layout: Callable[[Sequence[float], Timing, PlanOptions], Layout] = (
            best_round if proto == "rounds" else best_layout
        )
        self._is_live = False
        self._num_output = 0
        self._draft: tuple[list[int], list[float]] = ([], [])
        self._reserved: list[int] = []
        self.num_adopted = 0

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """The prompt is known; without it nothing is drafted."""
        if not self._is_live:
            self._shop.cache.start(
                self._id, np.array(prompt_ids, np.int32), tenant=self._tenant, caching=self._may_learn
            )
            self._is_live = True

    def close(self) -> None:
        """The request is over."""
        if self._is_live:
            self._shop.cache.finish(self._id)
            self._is_live = False

    def extend(self, token_ids: Sequence[int]) -> None:
        self._num_output += len(token_ids)
        self._shop.budget.earn(self._tenant, len(token_ids))
        if self._is_live:
            plan = self._shop.plan
            room = max(0, min(plan.max_draft, self._limit - self._num_output - 1))
            self._draft = drafts_of(self._shop.cache, self._id, token_ids, limit=room, threshold=plan.min_probability)

    def guess(self) -> Guess:
        shop = self._shop
        ids, reach = self._draft
        if len(ids) < shop.plan.min_segment or not self._may_write():
            return Guess()
        layout = self._layout(reach, shop.timing, shop.plan)
        if not layout.offsets or shop.gate.why_closed is not None or (self._is_sampled and shop.has_uncut):
            return Guess()
        segment = layout.offsets[0]
        # A branch reads its part of the draft, and runs until the base stream tells that it is wrong.
        costs = [offset + segment for offset in layout.offsets]
        if not shop.budget.spend(self._tenant, len(costs), sum(costs)):
            shop.metrics.exhausted.inc()
            return Guess()
        self._reserved += costs
        shop.metrics.drafts.inc(layout.offsets[-1])
        return Guess(tuple(ids[: layout.offsets[-1]]), layout.offsets)

    def ended(self, result: str, *, num_ready: int, num_wasted: int) -> None:
        shop = self._shop
        reserved = self._reserved.pop(0)
        wasted = 0 if result == "adopted" else reserved if result == "miss" else min(reserved, num_wasted)
        shop.budget.settle(self._tenant, 1, reserved - wasted)
        shop.metrics.attempts.labels(self._proto, result).inc()
        shop.metrics.wasted.labels("decode").inc(num_wasted)
        shop.has_uncut |= result == "uncut"
        if result == "adopted":
            self.num_adopted += 1
            shop.metrics.accepted.inc(num_ready)
            shop.metrics.jumps.observe(num_ready)
            shop.metrics.saved.inc(num_ready * (shop.timing.step_s or 0.0))
