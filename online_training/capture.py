"""From an engine's steps to trace records, without ever making the engine wait.

The engine's thread appends references to what a step left behind; building records, looking for text that must not be
kept, and writing shards happen on a thread of the capture's own. What does not fit the queue between them is dropped
and counted.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from specdec.errors import ConfigError
from specdec.online_training.live_trace import LiveTrace
from specdec.online_training.privacy import Consent, KeyedHash, Redactor
from specdec.online_training.records import TraceRecord
from specdec.online_training.trace_queue import QueueLimits, TraceQueue
from specdec.online_training.transport import TraceTransport
from specdec.types import RequestState, StepEvent

logger = logging.getLogger(__name__)

__all__ = ["CaptureMode", "CaptureOptions", "TraceCapture"]

CaptureMode: TypeAlias = Literal["tokens", "features", "features+rejected"]
_POLL_SECONDS = 0.2
_EARLY = 0.25  # a queue that is this full is written before its time
_MAX_ERRORS = 3  # of the sink in a row, before it is left alone for a while


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """What is kept, and how it is handed on.

    Args:
        mode: ``tokens``: text and rounds; ``features``: the states that the drafter reads too; ``features+rejected``:
            and the target's laws at rejected draft tokens.
        top_k: entries of such a law that are kept.
        shard_bytes: a shard is closed at this size,
        shard_s: or after so many seconds.
        pause_s: how long a failing sink is left alone, twice as long each time, at most an hour.
        queue: bounds of what waits.
    """

    mode: CaptureMode = "tokens"
    top_k: int = 64
    shard_bytes: int = 64 * 2**20
    shard_s: float = 30.0
    pause_s: float = 60.0
    queue: QueueLimits = field(default_factory=QueueLimits)

    def __post_init__(self) -> None:
        if self.mode not in ("tokens", "features", "features+rejected"):
            raise ConfigError(f"capture mode must be tokens, features or features+rejected, got {self.mode!r}")
        for name in ("top_k", "shard_bytes", "shard_s", "pause_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")


class TraceCapture:
    """Keeps the requests of tenants that opted in (`specdec.protocols.Observer`).

    Args:
        sink: where shards go; it may be as slow as it likes.
        consent: whose text may be kept.
        hashes: makes names of tenants and prompts.
        target: fingerprint of the model, see ``specdec.online_training.fingerprint``.
        options: see ``CaptureOptions``.
        redactor: with ``decode``: text that it finds something in is dropped.
        decode: token ids -> text.
        opts_out: asked once per request, by its id, before anything of it is kept.
        drafter_of: (name, version) of the drafter that guessed for a request in the step that is observed.

    Raises:
        ConfigError: a redactor without ``decode``.
    """

    def __init__(
        self,
        sink: TraceTransport,
        *,
        consent: Consent,
        hashes: KeyedHash,
        target: str,
        options: CaptureOptions | None = None,
        redactor: Redactor | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
        opts_out: Callable[[str], bool] = lambda _: False,
        drafter_of: Callable[[str], tuple[str, int]] = lambda _: ("", 0),
    ) -> None:
        if redactor is not None and decode is None:
            raise ConfigError("a redactor reads text: decode must be given")
        self._sink, self._consent, self._hashes, self._target = sink, consent, hashes, target
        self.options = options or CaptureOptions()
        self._redactor, self._decode = redactor, decode
        self._opts_out, self._drafter_of = opts_out, drafter_of
        self.queue: TraceQueue[LiveTrace] = TraceQueue(self.options.queue)
        self.counts: Counter[str] = self.queue.counts
        self._live: dict[str, tuple[RequestState, LiveTrace | None]] = {}  # None: not to be kept
        self._breaker = _Breaker(self.options.pause_s)
        self._lock = threading.Lock()  # of the live requests; held for microseconds
        self._wake = threading.Event()
        self._is_writing = self._is_urgent = self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="specdec-capture", daemon=True)
        self._thread.start()

    def observe(self, events: Sequence[StepEvent]) -> None:
        options = self.options
        with self._lock:
            self._sweep()
            for event in events:
                request_id = event.state.request_id
                state, trace = self._live.get(request_id, (None, None))
                if state is not event.state:
                    trace = self._begin(event.state)
                if trace is None:
                    continue
                if event.tree.num_draft_tokens:
                    trace.drafter, version = self._drafter_of(request_id)
                    trace.note_round(event, version)
                if options.mode != "tokens":
                    trace.note_features(event, options.top_k, has_rejected=options.mode == "features+rejected")

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until all finished requests are on disk or dropped; False if that took longer than ``timeout``."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            with self._lock:
                self._sweep()
                if not len(self.queue) and not self._is_writing:
                    return True
                self._is_urgent = True
            self._wake.set()
            time.sleep(0.005)
        return False

    def close(self, timeout: float = 30.0) -> None:
        """Write what is finished and stop the thread."""
        self.flush(timeout)
        self._is_closing = True
        self._wake.set()
        self._thread.join(timeout)

    def _begin(self, state: RequestState) -> LiveTrace | None:
        request_id = state.request_id
        trace = None
        if self._opts_out(request_id):
            self.counts["opted out"] += 1
        elif not self._consent.allows(state.request.tenant):
            self.counts["no consent"] += 1
        else:
            trace = LiveTrace(state)
        self._live[request_id] = state, trace
        return trace

    def _sweep(self) -> None:
        """Queue finished requests; the engine sets their reason after their last event."""
        for request_id in [name for name, (state, _) in self._live.items() if state.is_finished]:
            trace = self._live.pop(request_id)[1]
            if trace is not None:
                self.queue.offer(trace)

    def _run(self) -> None:
        last = time.monotonic()
        while not self._is_closing:
            self._wake.wait(_POLL_SECONDS)
            self._wake.clear()
            with self._lock:
                self._sweep()
                is_due = self._is_urgent or time.monotonic() - last >= self.options.shard_s
                self._is_writing = len(self.queue) > 0 and (is_due or self.queue.fill > _EARLY)
                self._is_urgent = False
            if self._is_writing:
                while traces := self.queue.take(self.options.shard_bytes):
                    self._write(traces)
                self._is_writing = False
                last = time.monotonic()
            elif not len(self.queue):
                last = time.monotonic()

    def _write(self, traces: Sequence[LiveTrace]) -> None:
        if not self._breaker.is_closed:
            self.counts["sink failed"] += len(traces)
            return
        try:
            records = [record for record in map(self._record, traces) if record is not None]
            if records:
                self._sink.put(records)
        except Exception as error:  # noqa: BLE001  -- no sink may end the capture, let alone the server
            self.counts["sink failed"] += len(traces)
            self._breaker.failed()
            logger.warning("the trace sink failed, %d requests are lost: %s", len(traces), type(error).__name__)
        else:
            self._breaker.worked()
            self.counts["written"] += len(records)

    def _record(self, trace: LiveTrace) -> TraceRecord | None:
        if self._redactor is not None and self._decode is not None:
            text = self._decode(trace.state.token_ids.tolist())
            if self._redactor.hit(text) is not None:
                self.counts["redacted"] += 1
                return None
        return trace.record(self._hashes, self._target)


class _Breaker:
    """Leaves a failing sink alone: after some errors in a row for a while, each time for longer."""

    def __init__(self, pause_s: float) -> None:
        self._first_s = self._pause_s = pause_s
        self._num_errors, self._until = 0, 0.0

    @property
    def is_closed(self) -> bool:
        """True if the sink may be tried."""
        return time.monotonic() >= self._until

    def failed(self) -> None:
        self._num_errors += 1
        if self._num_errors >= _MAX_ERRORS:
            self._until = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, 3600.0)

    def worked(self) -> None:
        self._num_errors, self._pause_s = 0, self._first_s
