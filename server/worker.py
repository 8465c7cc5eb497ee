"""One thread owns the engine; everybody else talks to it through a queue of commands.

Requests come in with ``submit`` from any thread, updates go out in one call per step, so that a step costs the event
loop one wake-up however many requests it served. Admission is bounded: a request that finds the queue full is refused
at once, with nothing kept.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Literal, TypeAlias

from specdec.engine import Engine
from specdec.errors import SpecdecError
from specdec.prefix_cache import PrefixTotals
from specdec.server.speculation import Choice, Choices
from specdec.server.watch import StepNotes, StepTotals, StepWatcher
from specdec.types import FinishReason, Request, RequestOutput

logger = logging.getLogger(__name__)

__all__ = ["Draining", "EngineWorker", "Job", "Overloaded", "RequestStats", "Update", "WorkerState", "longest_request"]

_IDLE_SECONDS = 0.5  # how long an idle worker sleeps before it looks at its own state again
_MAX_FAILURES = 5  # steps that may fail in a row before the worker gives up


class Overloaded(SpecdecError):
    """The queue is full; nothing was kept. ``retry_after`` is in seconds."""

    retry_after = 1


class Draining(SpecdecError):
    """The server is shutting down, or its engine has failed; nothing was kept."""

    retry_after = 5


@dataclass(frozen=True, slots=True)
class RequestStats:
    """What speculation did for a request so far."""

    num_prompt_tokens: int
    num_cached_prompt_tokens: int  # those of the prompt that needed no forward
    num_output_tokens: int
    num_steps: int
    num_drafted: int
    num_accepted: int


@dataclass(frozen=True, slots=True)
class Update:
    """News of one request.

    Args:
        request_id: whose.
        new_ids: tokens since the last update.
        finish_reason: set on the last update.
        stats: of the request.
        notes: what the request wished to see of the steps.
        error: why the request failed; then it is the last update.
        is_refused: the request itself was at fault.
    """

    request_id: str
    new_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stats: RequestStats | None = None
    notes: StepNotes | None = None
    error: str | None = None
    is_refused: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A request with what the server adds to it."""

    request: Request
    choice: Choice
    num_logprobs: int | None = None
    has_steps: bool = False
    has_trace: bool = False


WorkerState: TypeAlias = Literal["starting", "running", "draining", "stopped", "failed"]
_Command: TypeAlias = tuple[Literal["submit"], Job] | tuple[Literal["cancel"], str] | tuple[Literal["wake"], None]


def longest_request(engine: Engine) -> int:
    """Most tokens that the KV pool can hold for one request, alone; at most 2**31."""
    low, high = 1, 2**31
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if engine.target.fits(middle) else (low, middle - 1)
    return low


class EngineWorker:
    """Runs an engine in a thread of its own.

    Args:
        engine: used by the worker's thread alone from ``start`` on.
        choices: what requests chose; shared with the engine's drafter and controller.
        watcher: one of the engine's observers.
        deliver: called on the worker's thread with the updates of a step; must not block.
        max_in_flight: most requests that are submitted and not finished; more are refused.
    """

    def __init__(
        self,
        engine: Engine,
        choices: Choices,
        watcher: StepWatcher,
        deliver: Callable[[Sequence[Update]], None],
        *,
        max_in_flight: int = 256,
    ) -> None:
        self._engine = engine
        self._choices = choices
        self._watcher = watcher
        self._deliver = deliver
        self._max_in_flight = max_in_flight
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._live: set[str] = set()
        self._num_failures = 0
        self._thread = threading.Thread(target=self._run, name="specdec-engine", daemon=True)
        self._capacity = longest_request(engine)
        self.kv_usage = 0.0  # share of the KV pool that running requests hold, after the last step
        self.state: WorkerState = "starting"

    @property
    def totals(self) -> StepTotals:
        """Sums over all steps so far."""
        return self._watcher.totals

    @property
    def prefix_totals(self) -> PrefixTotals:
        """Prompt tokens looked up in the prefix cache so far; zeros where there is none."""
        prefixes = getattr(self._engine.target, "prefixes", None)
        return prefixes.totals if prefixes is not None else PrefixTotals()

    @property
    def num_in_flight(self) -> int:
        """Requests that are submitted and not finished."""
        return len(self._live)

    @property
    def load(self) -> tuple[int, int]:
        """(running, waiting): requests in the engine's batch, and those that wait for room."""
        running = len(self._engine.scheduler.running)
        return running, max(0, len(self._live) - running)

    def start(self) -> None:
        """Start the thread."""
        self.state = "running"
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none; their updates come through ``deliver``. From any thread.

        Raises:
            Overloaded: too many requests are in flight.
            Draining: the worker takes no more requests.
        """
        with self._lock:
            if self.state != "running":
                raise Draining(f"the server takes no more requests: it is {self.state}")
            if len(self._live) + len(jobs) > self._max_in_flight:
                raise Overloaded(f"{len(self._live)} requests are in flight, the limit is {self._max_in_flight}")
            self._live.update(job.request.request_id for job in jobs)
        for job in jobs:
            self._commands.put(("submit", job))

    def cancel(self, request_id: str) -> None:
        """End a request at the next step; one that is unknown or finished is no error. From any thread."""
        self._commands.put(("cancel", request_id))

    def drain(self, timeout: float) -> bool:
        """Take no more requests, wait for those in flight at most ``timeout`` seconds, then end the rest and stop.

        Returns:
            True if every request could finish.
        """
        with self._lock:
            if self.state == "running":
                self.state = "draining"
        end = monotonic() + timeout
        while self._live and monotonic() < end and self._thread.is_alive():
            threading.Event().wait(0.01)
        is_clean = not self._live
        with self._lock:
            if self.state == "draining":
                self.state = "stopped"
        self._commands.put(("wake", None))
        self._thread.join(timeout=30)
        return is_clean

    def _run(self) -> None:
        while self.state in ("running", "draining"):
            self._obey()
            if not self._engine.has_work:
                continue
            try:
                outputs = self._engine.step()
            except Exception as error:  # noqa: BLE001  -- whatever a step raises, the server says so and goes on
                self._fail(error)
                continue
            if any(output.new_ids for output in outputs):  # a step that only reports the end of requests proves nothing
                self._num_failures = 0
            self.kv_usage = sum(state.num_cached for state in self._engine.scheduler.running) / self._capacity
            if outputs:
                self._deliver([self._update(output) for output in outputs])
        self._end_all("the server is shutting down")

    def _obey(self) -> None:
        """Carry out the waiting commands; sleep for the first one while there is nothing to do."""
        try:
            if not self._engine.has_work:
                self._do(self._commands.get(timeout=_IDLE_SECONDS))
            while True:
                self._do(self._commands.get_nowait())
        except queue.Empty:
            pass

    def _do(self, command: _Command) -> None:
        match command:
            case ("submit", job):
                self._start(job)
            case ("cancel", request_id):
                self._engine.cancel(request_id)
            case ("wake", _):
                pass

    def _start(self, job: Job) -> None:
        request_id = job.request.request_id
        if request_id not in self._live:  # ended with others while it waited here
            return
        self._choices.set(request_id, job.choice)
        self._watcher.watch(
            request_id, num_logprobs=job.num_logprobs, has_steps=job.has_steps, has_trace=job.has_trace,
            is_scoring=job.choice.script_ids is not None,
        )  # fmt: skip
        try:
            self._engine.submit(job.request)
        except SpecdecError as error:
            self._forget(request_id)
            self._deliver([Update(request_id, (), "error", error=str(error), is_refused=True)])

    def _update(self, output: RequestOutput) -> Update:
        state = output.state
        notes = self._watcher.take(output.request_id)
        stats = RequestStats(
            state.num_prompt_tokens, state.num_recalled, state.num_output_tokens, state.num_steps, state.num_drafted,
            state.num_accepted,
        )  # fmt: skip
        if output.finish_reason is not None:
            self._forget(output.request_id)
        return Update(output.request_id, tuple(output.new_ids), output.finish_reason, stats, notes)

    def _forget(self, request_id: str) -> None:
        self._choices.drop(request_id)
        self._watcher.drop(request_id)
        with self._lock:
            self._live.discard(request_id)

    def _fail(self, error: Exception) -> None:
        """A step failed: whose fault it was cannot be told, so every live request ends with an error."""
        logger.error("a step of the engine failed with %d requests in flight", len(self._live), exc_info=error)
        self._num_failures += 1
        self._end_all(f"the engine failed: {type(error).__name__}")
        if self._num_failures >= _MAX_FAILURES:
            with self._lock:
                self.state = "failed"

    def _end_all(self, why: str) -> None:
        self._drop_commands()
        ended = sorted(self._live)
        for request_id in ended:
            self._engine.cancel(request_id)
            self._forget(request_id)
        if ended:
            self._deliver([Update(request_id, (), "error", error=why) for request_id in ended])

    def _drop_commands(self) -> None:
        """Empty the queue; jobs in it are live and end with the others."""
        try:
            while True:
                self._commands.get_nowait()
        except queue.Empty:
            pass
