"""Drafting for one half of a batch while the target verifies the other half.

Two engines over one model share its forward by a lock that is free while either of them drafts, so the draft of one
half runs beside the forward of the other: numba code and torch operations both let go of the interpreter. Whether that
pays is a question of costs. A step of n requests takes T(n) + D(n) in sequence and 2 max(T(n / 2), D(n / 2)) in halves:
halves win where drafting is dear or the target's time follows the number of its tokens, and lose where the target takes
as long for half of them.

Sources: CoSine (2503.10325) and FASER (2604.20503) alternate batches between the stages; the criterion is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Lock, Thread

from specdec.cost_model import CostModel
from specdec.engine import Engine
from specdec.errors import ConfigError
from specdec.protocols import Drafter
from specdec.types import DraftTree, Request, RequestOutput, RequestState, StepEvent

__all__ = ["HalfBatches", "overlap_gain"]


def overlap_gain(costs: CostModel, num_requests: int, context: float, tokens_each: float = 1.0) -> float:
    """How much sooner a step is over in halves: time in sequence over time in halves; 1 where nothing is known.

    Args:
        costs: of a whole step's parts, drafting too.
        num_requests: of the batch.
        context: mean tokens of a request.
        tokens_each: query tokens of a request in a step.
    """
    draft = costs.tables["draft"]
    if num_requests < 2 or not draft.is_measured or not costs.is_measured:
        return 1.0

    def times(share: float) -> tuple[float, float]:
        tokens, requests = share * num_requests * tokens_each, share * num_requests
        return costs.step_ms(tokens, context, requests), draft.at(tokens, context, requests)

    return sum(times(1.0)) / (2 * max(times(0.5)))


class _Unlocked:
    """Drafts while somebody else may have the target (`specdec.protocols.Drafter`)."""

    def __init__(self, inner: Drafter, lock: Lock) -> None:
        self.inner, self.needs, self._lock = inner, inner.needs, lock

    def start(self, states: Sequence[RequestState]) -> None:
        self.inner.start(states)

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        self._lock.release()
        try:
            return self.inner.propose(states, budgets)
        finally:
            self._lock.acquire()

    def observe(self, events: Sequence[StepEvent]) -> None:
        self.inner.observe(events)

    def stop(self, request_ids: Sequence[str]) -> None:
        self.inner.stop(request_ids)


class HalfBatches:
    """Serves requests with two engines whose drafting and forwards overlap.

    Args:
        engines: two, idle, over one model, each with a drafter of its own; drafters may share a store that is safe for
            threads. They must not be used otherwise any more.
        costs: decides whether a batch is split; None: it always is.

    Raises:
        ConfigError: not two engines, or they share a drafter.
    """

    def __init__(self, engines: Sequence[Engine], *, costs: CostModel | None = None) -> None:
        if len(engines) != 2 or engines[0].drafter is engines[1].drafter:
            raise ConfigError("half batches need two engines, each with a drafter of its own")
        self.engines, self._costs, self._lock = list(engines), costs, Lock()
        for engine in self.engines:
            engine.drafter = _Unlocked(engine.drafter, self._lock)

    def __enter__(self) -> HalfBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close both engines."""
        for engine in self.engines:
            engine.close()

    def splits(self, requests: Sequence[Request]) -> bool:
        """True if these requests are served in two halves."""
        if len(requests) < 2:
            return False
        context = sum(len(request.prompt_ids) for request in requests) / len(requests)
        return self._costs is None or overlap_gain(self._costs, len(requests), context) > 1.0

    def generate(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        """Serve all requests and stream their tokens; closing the iterator cancels the rest.

        Raises:
            RequestError: a request breaks a rule; nothing is served.
        """
        batch = list(requests)
        halves = self.engines if self.splits(batch) else self.engines[:1]
        submitted: list[tuple[Engine, str]] = []
        outputs: SimpleQueue[RequestOutput | BaseException | None] = SimpleQueue()
        is_over = Event()
        threads = [Thread(target=self._serve, args=(engine, outputs, is_over), daemon=True) for engine in halves]
        try:
            for number, request in enumerate(batch):
                engine = halves[number % len(halves)]
                engine.submit(request)
                submitted.append((engine, request.request_id))
            for thread in threads:
                thread.start()
            num_serving = len(threads)
            while num_serving:
                output = outputs.get()
                if isinstance(output, BaseException):
                    raise output
                num_serving -= output is None
                if output is not None:
                    yield output
        finally:
            is_over.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            for engine, request_id in submitted:
                engine.cancel(request_id)
            for engine in halves:
                with self._lock:
                    engine.step()  # nothing is live: it takes the last outputs of cancelled requests away

    def _serve(
        self, engine: Engine, outputs: SimpleQueue[RequestOutput | BaseException | None], is_over: Event
    ) -> None:
        try:
            while engine.has_work and not is_over.is_set():
                with self._lock:
                    found = engine.step()
                for output in found:
                    outputs.put(output)
            outputs.put(None)
        except BaseException as error:  # noqa: BLE001  -- whatever it is, the caller raises it
            outputs.put(error)
