"""Load on a server: requests that come at a rate, at recorded times, or as fast as so many clients read their answers.

Open loads (a rate, a trace) send each request when its time has come, whatever became of the others, so a server that
is too slow gets a queue and shows it. Closed loads keep a number of requests under way. The requests, their times and
their order are the same for every server and every round.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from specdec.bench.arrivals import Arrival
from specdec.bench.http_client import Answer, Endpoint, ask, request_body
from specdec.bench.metrics import distinct_ngrams
from specdec.bench.results_schema import Row, at_load
from specdec.bench.traces import Call
from specdec.errors import ConfigError

__all__ = ["Load", "Question", "poisson_load", "run_load", "trace_load"]


@dataclass(frozen=True, slots=True)
class Question:
    """One request of a workload: its source, the recorded call, and how long the answer may get."""

    source: str
    call: Call
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: at given seconds, or so many at a time.

    Args:
        name: "2/s", "trace", "x4": part of the arm's name.
        times_s: when each request is sent; empty: as soon as one of ``concurrency`` clients is free.
        concurrency: clients of a closed load; 0 for an open one.
    """

    name: str
    times_s: tuple[float, ...] = ()
    concurrency: int = 0

    @classmethod
    def closed(cls, concurrency: int) -> Load:
        """So many requests under way at any time.

        Raises:
            ConfigError: fewer than one.
        """
        if concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, got {concurrency}")
        return cls(f"x{concurrency}", (), concurrency)


def poisson_load(rate: float, count: int, *, seed: int = 0) -> Load:
    """Requests that come independently of each other, ``rate`` per second on average; the first one at once.

    Raises:
        ConfigError: a rate that is not above 0.
    """
    if not rate > 0:
        raise ConfigError(f"rate must be above 0 requests per second, got {rate}")
    gaps = np.random.default_rng(seed).exponential(1 / rate, max(count - 1, 0))
    return Load(f"{rate:g}/s", (0.0, *np.cumsum(gaps).tolist()))


def trace_load(arrivals: Sequence[Arrival], *, time_scale: float = 1.0) -> Load:
    """Requests at recorded times; a scale of 0.1 lets them come ten times as fast.

    Raises:
        ConfigError: no arrival, or a scale that is not above 0.
    """
    if not time_scale > 0:
        raise ConfigError(f"time_scale must be above 0, got {time_scale}")
    if not arrivals:
        raise ConfigError("the arrival trace holds no request")
    return Load("trace", tuple(arrival.time_s * time_scale for arrival in sorted(arrivals, key=lambda a: a.time_s)))


@dataclass(slots=True)
class _Watch:
    """The clock of one load, and how late requests were sent."""

    start: float = field(default_factory=perf_counter)

    def now(self) -> float:
        return perf_counter() - self.start


async def run_load(
    client: Any,
    endpoint: Endpoint,
    questions: Sequence[Question],
    load: Load,
    *,
    round: int,
    on_row: Callable[[Row], None],
    **options: Any,
) -> None:
    """Send all questions under a load; every answer, right or failed, becomes a row.

    Args:
        client: an open ``httpx.AsyncClient`` without a limit of connections.
        endpoint: the server.
        questions: as many as the load has times.
        load: when they are sent.
        round: of the benchmark.
        on_row: takes the rows as they come.
        **options: fields of every request, such as temperature.

    Raises:
        ConfigError: the load has fewer times than there are questions, or the api cannot carry a prompt.
    """
    if not load.concurrency and len(load.times_s) < len(questions):
        raise ConfigError(f"{len(questions)} requests need as many times, got {len(load.times_s)}")
    bodies = [request_body(endpoint, q.call.parts, max_tokens=q.max_tokens, **options) for q in questions]
    watch = _Watch()
    slots = asyncio.Semaphore(load.concurrency or len(questions))

    async def one(index: int) -> None:
        start = watch.now()
        answer = await ask(client, endpoint, bodies[index])
        slots.release()
        on_row(_row(answer, endpoint, load, round, index, questions[index], start))

    async with asyncio.TaskGroup() as tasks:
        async for index in _due(len(questions), load, watch, slots):
            tasks.create_task(one(index))


async def _due(count: int, load: Load, watch: _Watch, slots: asyncio.Semaphore) -> AsyncIterator[int]:
    """The numbers of the requests, each when it is to be sent."""
    for index in range(count):
        if load.times_s:
            await asyncio.sleep(load.times_s[index] - watch.now())
        await slots.acquire()
        yield index


def _row(
    answer: Answer, endpoint: Endpoint, load: Load, round: int, index: int, question: Question, start_s: float
) -> Row:
    tokens = answer.output_tokens
    error = answer.error
    if error is None and tokens is None:
        error = "no usage"  # pieces of text are not tokens: a speculating server sends several at once
    shown = answer.speculation
    accepted, drafts = int(shown.get("num_accepted_draft_tokens", 0)), int(shown.get("num_spec_steps", 0))
    return Row(
        arm=at_load(endpoint.name, load.name),
        round=round,
        call=index,
        source=question.source,
        trace=question.call.trace,
        prompt_tokens=answer.prompt_tokens or 0,
        output_tokens=0 if error else int(tokens or 0),
        seconds=answer.seconds,
        first_token_s=answer.stamps[0] if answer.stamps else answer.seconds,
        # The block counts the steps that drafted; every other token came alone.
        num_steps=int(tokens or 0) - accepted if shown and not error else 0,
        num_accepted=accepted,
        num_drafted=int(shown.get("num_draft_tokens", 0)) if shown else None,
        num_drafting_steps=drafts,
        accepted_histogram=[],
        output_sha256=hashlib.sha256(answer.text.encode()).hexdigest(),
        distinct_ngrams=distinct_ngrams(answer.text.split()),
        load=load.name,
        start_s=start_s,
        error=error,
    )
