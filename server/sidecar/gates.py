"""Who may speculate and how much: the upstream's load, and a budget of extra tokens for all and for each tenant."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import monotonic

from specdec.errors import ConfigError
from specdec.server.sidecar.plan import Timing

__all__ = ["Budget", "BudgetOptions", "LoadGate"]

_MAX_TENANTS = 4096
_LEAST_COMPARED, _COMPARED = 16, 96  # gaps, with branches and without
_LONGEST_PAUSE_S = 600.0


@dataclass(frozen=True, slots=True)
class BudgetOptions:
    """How much upstream work speculation may add.

    Args:
        ratio: extra tokens per token that clients received.
        burst: extra tokens before any were received.
        max_branches: under way at once, over all requests.
        max_branches_per_tenant: likewise, of one tenant.
    """

    ratio: float = 0.2
    burst: int = 2048
    max_branches: int = 8
    max_branches_per_tenant: int = 4

    def __post_init__(self) -> None:
        if self.ratio < 0 or self.burst < 0:
            raise ConfigError(f"ratio and burst must not be negative, got {self.ratio} and {self.burst}")
        if self.max_branches < 1 or self.max_branches_per_tenant < 1:
            raise ConfigError("max_branches and max_branches_per_tenant must be at least 1")


class Budget:
    """Counts extra tokens against those that clients received; shared by all requests of a sidecar.

    What a branch may cost at most is taken when it starts; what it did not waste comes back when it ends.
    """

    def __init__(self, options: BudgetOptions) -> None:
        self._options = options
        self._left = float(options.burst)
        self._tenants: OrderedDict[str, float] = OrderedDict()
        self._branches: dict[str, int] = {}

    @property
    def left(self) -> float:
        """Extra tokens that may still be spent."""
        return self._left

    @property
    def num_branches(self) -> int:
        """Branches under way."""
        return sum(self._branches.values())

    def earn(self, tenant: str, num_tokens: int) -> None:
        """A client received tokens."""
        earned = self._options.ratio * num_tokens
        # An idle hour must not save up for a flood.
        self._left = min(self._left + earned, 4.0 * self._options.burst + earned)
        self._tenants[tenant] = min(self._of(tenant) + earned, 4.0 * self._options.burst + earned)
        self._tenants.move_to_end(tenant)
        while len(self._tenants) > _MAX_TENANTS:
            self._tenants.popitem(last=False)

    def _of(self, tenant: str) -> float:
        return self._tenants.get(tenant, float(self._options.burst))

    def spend(self, tenant: str, num_branches: int, num_tokens: int) -> bool:
        """Take room for branches and their tokens; False, and nothing taken, if there is not enough."""
        options = self._options
        if self.num_branches + num_branches > options.max_branches:
            return False
        if self._branches.get(tenant, 0) + num_branches > options.max_branches_per_tenant:
            return False
        if num_tokens > self._left or num_tokens > self._of(tenant):
            return False
        self._left -= num_tokens
        self._tenants[tenant] = self._of(tenant) - num_tokens
        self._branches[tenant] = self._branches.get(tenant, 0) + num_branches
        return True

    def settle(self, tenant: str, num_branches: int, num_back: int) -> None:
        """Branches ended; tokens that were set aside and not wasted come back."""
        self._left += num_back
        self._tenants[tenant] = self._of(tenant) + num_back
        left = self._branches.get(tenant, 0) - num_branches
        if left > 0:
            self._branches[tenant] = left
        else:
            self._branches.pop(tenant, None)


class LoadGate:
    """Closed while the upstream has no room to spare.

    Args:
        timing: of the upstream.
        max_inflation: steps that take longer than this many times a quick one close it.
        max_waiting: requests that may wait in the upstream's queue, where it tells.
        cooldown_s: how long a refusal (429, 503) keeps it closed.
        max_own_inflation: if clients' tokens take longer than this many times as long while branches run, it closes,
            for twice as long each time.
        clock: seconds.
    """

    def __init__(
        self,
        timing: Timing,
        *,
        max_inflation: float = 1.5,
        max_waiting: int = 0,
        cooldown_s: float = 5.0,
        max_own_inflation: float = 1.1,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._timing, self._clock = timing, clock
        self._max_inflation, self._max_waiting, self._cooldown_s = max_inflation, max_waiting, cooldown_s
        self._max_own_inflation = max_own_inflation
        self._alone: deque[float] = deque(maxlen=_COMPARED)
        self._crowded: deque[float] = deque(maxlen=_COMPARED)
        self._pause_s, self._why = cooldown_s, ""
        self._closed_until = float("-inf")
        self.num_waiting: float | None = None  # as the upstream last said

    def refused(self) -> None:
        """The upstream said that it is busy."""
        self._closed_until, self._why = self._clock() + self._cooldown_s, "the upstream refused a request"

    def saw_gap(self, seconds: float, *, is_crowded: bool) -> None:
        """Time per token of a client's stream, while branches ran or not.

        A server that is full from the start shows no change of pace but this one: what branches themselves do to it.
        """
        (self._crowded if is_crowded else self._alone).append(seconds)
        if not is_crowded or len(self._crowded) < _LEAST_COMPARED or len(self._alone) < _LEAST_COMPARED:
            return
        if median(self._crowded) > self._max_own_inflation * median(self._alone):
            self._closed_until, self._why = self._clock() + self._pause_s, "branches slow down clients"
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            self._crowded.clear()
        elif len(self._crowded) == _COMPARED:
            self._pause_s = self._cooldown_s

    @property
    def why_closed(self) -> str | None:
        """The reason, or None while it is open."""
        if self._clock() < self._closed_until:
            return self._why
        if self.num_waiting is not None and self.num_waiting > self._max_waiting:
            return f"{self.num_waiting:.0f} requests wait upstream"
        if len(self._alone) < _LEAST_COMPARED:
            return "the upstream's pace is not known yet"
        usual, now = self._timing.usual_step_s, self._timing.step_s
        if usual is not None and now is not None and now > self._max_inflation * usual:
            return f"steps take {now / usual:.1f} times as long as usual"
        return None
