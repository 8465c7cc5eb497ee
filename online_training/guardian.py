"""Keeps a serving drafter in step with its registry: loads versions, runs trials, raises alarms, rolls back.

Runs on a thread of its own beside the engine; ``step`` is all of it, so that tests can call it themselves.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from statistics import fmean, pstdev

from torch import Tensor

from specdec.errors import ConfigError, SpecdecError
from specdec.online_training.guard import Cusum, GuardOptions, RollbackLimit, Trial, tell_apart
from specdec.online_training.registry import Registry, RegistryState
from specdec.online_training.swap import FinishedRequest, Role, VersionedDrafter
from specdec.online_training.version_weights import read_weights

logger = logging.getLogger(__name__)

__all__ = ["Guardian"]

_ROLES: tuple[Role, ...] = ("current", "canary", "pinned")
_REFERENCE = 200  # requests that say what to expect
_MIN_REFERENCE = 20
_MIN_SHADOWS = 6  # shadowed requests that a fall is judged on
_LEAST_DEVIATION = 0.02  # relative to the mean: requests that are all alike must not make every change an alarm


class Guardian:
    """Watches one ``VersionedDrafter``.

    Args:
        registry: of its versions.
        drafter: takes them.
        kind: how versions are read.
        options: see ``GuardOptions``.
        is_automatic: put new versions on trial; False: only what somebody promotes is served.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        registry: Registry,
        drafter: VersionedDrafter,
        *,
        kind: str = "eagle",
        options: GuardOptions | None = None,
        is_automatic: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry, self.drafter, self._kind = registry, drafter, kind
        self.options, self._is_automatic, self._clock = options or GuardOptions(), is_automatic, clock
        drafter.canary_share, drafter.shadow_share = self.options.canary_share, self.options.shadow_share
        self._limit = RollbackLimit(self.options)
        self._trial = Trial(self.options)
        self._trial_of = 0
        # (tokens per round, the baseline's or None) of requests under the last trusted version, and since the swap.
        self._reference: deque[tuple[float, float | None]] = deque(maxlen=_REFERENCE)
        self._recent: deque[tuple[float, float | None]] = deque(maxlen=_REFERENCE)
        self._cusum: Cusum | None = None
        self._is_alarmed = False
        self._watched = drafter.version_in("current")
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, seconds: float = 1.0) -> None:
        """Call ``step`` every so many seconds from a thread."""

        def run() -> None:
            while not self._stop.wait(seconds):
                try:
                    self.step()
                except (SpecdecError, OSError) as error:  # the next look may find it well; serving goes on as it is
                    logger.warning("the drafter registry could not be followed: %s", error)

        self._thread = threading.Thread(target=run, name="specdec-guardian", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def step(self) -> None:
        """Follow the registry, take in finished requests, decide."""
        state = self.registry.state()
        self._follow(state)
        while self.drafter.finished:
            self._take_in(self.drafter.finished.popleft())
        self._end_trial(self.registry.state())
        self._begin_trial(self.registry.state())

    def _follow(self, state: RegistryState) -> None:
        for role in _ROLES:
            version: int = getattr(state, role)
            if version == self.drafter.wanted_in(role) or (role == "current" and not version):
                continue
            try:
                self.drafter.install(role, version, self._read(version) if version else {})
            except (SpecdecError, OSError) as error:
                self._refuse(role, version, error)
                continue
            if role == "current":
                self._limit.swapped(self._clock(), is_rollback=version < self._watched)
                self._trust_nothing(version)
            if role == "canary":
                self._trial, self._trial_of = Trial(self.options), version

    def _read(self, version: int) -> Mapping[str, Tensor]:
        self.registry.check(version)
        return read_weights(self._kind, self.registry.path(version))

    def _refuse(self, role: Role, version: int, error: Exception) -> None:
        """What is served stays as it is."""
        logger.warning("version %d is refused: %s", version, error)
        self.registry.mark(version, f"refused: {error}")
        if role == "canary":
            self.registry.end_trial(f"refused: {error}")
        elif role == "current":
            self.registry.promote(self.drafter.version_in("current"), f"version {version} was refused: {error}")
        else:
            self.registry.pin(self.drafter.version_in("current"), f"version {version} was refused: {error}")

    def _trust_nothing(self, version: int) -> None:
        """A new version serves: what came before it is the reference until it has proven itself."""
        if len(self._recent) >= _MIN_REFERENCE and not self._is_alarmed:
            self._reference = self._recent.copy()
        self._recent.clear()
        self._cusum, self._watched, self._is_alarmed = None, version, False
        self.drafter.shadow_share = self.options.shadow_share

    def _take_in(self, done: FinishedRequest) -> None:
        mean = done.tokens / done.num_rounds
        if self._trial_of and (done.version == self._trial_of or not done.is_canary):
            self._trial.add(mean, is_canary=done.version == self._trial_of)
        if done.is_canary or done.version != self._watched:
            return
        self._recent.append((mean, done.shadow))
        if len(self._reference) < _MIN_REFERENCE:
            self._reference.append((mean, done.shadow))
            return
        if self._cusum is None:
            means = [value for value, _ in self._reference]
            deviation = max(pstdev(means), _LEAST_DEVIATION * fmean(means))
            self._cusum = Cusum(fmean(means), deviation, self.options)
        if self._cusum.add(mean) or self._is_alarmed:
            self._alarm()
        elif len(self._recent) == _REFERENCE:  # it has proven itself: judge what follows by it
            self._reference, self._cusum = self._recent.copy(), None
            self._recent.clear()

    def _alarm(self) -> None:
        if not self._is_alarmed:
            self._is_alarmed = True
            self.drafter.shadow_share = 1.0  # until it is clear why
            logger.warning("version %d brings fewer tokens per round than expected", self._watched)
        if self._watched == self.drafter.version_in("pinned"):
            self._settle("drift: the pinned baseline itself fell")
            return
        shadows = [(mean, base) for mean, base in self._recent if base is not None]
        if len(shadows) < _MIN_SHADOWS:
            return
        now = fmean(mean for mean, _ in shadows[-_MIN_SHADOWS:]), fmean(base for _, base in shadows[-_MIN_SHADOWS:])
        before = fmean(mean for mean, _ in self._reference)
        base_before = [base for _, base in self._reference if base is not None]
        why = tell_apart(reference=(before, fmean(base_before) if base_before else before), now=now)
        if why == "bad weights":
            self._roll_back(f"tokens per round fell from {before:.2f} to {now[0]:.2f}, the baseline's are {now[1]:.2f}")
        else:
            self._settle(f"{why or 'no fall'}: {before:.2f} to {now[0]:.2f}, the baseline's are {now[1]:.2f}")

    def _settle(self, why: str) -> None:
        """Keep the version; from now on it is judged by what it does now."""
        logger.warning("version %d stays: %s", self._watched, why)
        self._is_alarmed, self._cusum = False, None
        self._reference = deque(list(self._recent)[-_MIN_REFERENCE:], maxlen=_REFERENCE)
        self._recent.clear()
        self.drafter.shadow_share = self.options.shadow_share

    def _roll_back(self, why: str) -> None:
        try:
            back_to = self.registry.rollback(why)
        except ConfigError as error:
            self._settle(str(error))
            return
        logger.warning("rolled back to version %d: %s", back_to, why)
        self._follow(self.registry.state())

    def _end_trial(self, state: RegistryState) -> None:
        if not state.canary or state.canary != self._trial_of:
            return
        verdict, (lower, upper) = self._trial.verdict(), self._trial.bounds()
        figures = f"tokens per round {lower:+.1%} to {upper:+.1%} over {self._trial.counts[0]} requests"
        if verdict == "promote":
            self.registry.promote(state.canary, figures)
        elif verdict is not None:
            self.registry.end_trial(figures, is_worse=verdict == "reject")
        if verdict is not None:
            self._trial_of = 0
            self._follow(self.registry.state())

    def _begin_trial(self, state: RegistryState) -> None:
        if not self._is_automatic or state.canary or not self._limit.may_promote(self._clock()) or self._is_alarmed:
            return
        newest = max((v for v in self.registry.numbers() if v > state.current and v not in state.marks), default=0)
        if newest:
            self.registry.try_out(newest, "newest")
            self._follow(self.registry.state())
