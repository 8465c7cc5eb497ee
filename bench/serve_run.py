"""A serve benchmark from options to a result: every server under every load, in rounds."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from specdec.bench.arrivals import Arrival, read_arrivals
from specdec.bench.guards import guard
from specdec.bench.http_client import Endpoint
from specdec.bench.loaders import Skips, load_calls, trace_files
from specdec.bench.measure import environment
from specdec.bench.metrics import summarize
from specdec.bench.results_schema import (
    ArmInfo,
    BenchResult,
    Row,
    SourceFile,
    WorkloadInfo,
    at_load,
    read_result,
    write_result,
)
from specdec.bench.serve import Load, Question, poisson_load, run_load, trace_load
from specdec.bench.workload import built_in_calls, fingerprint, source_name
from specdec.errors import ConfigError, LoadError

__all__ = ["ServeOptions", "make_loads", "make_questions", "read_some_arrivals", "run_serve"]

_DEFAULT_REQUESTS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What is asked of the servers; goes into the result file as it is.

    Args:
        rates: requests per second of open loads.
        concurrency: numbers of clients of closed loads.
        time_scale: of arrival traces.
        requests: how many; 0: as many as the arrivals have, or 32.
        max_new_tokens: of an answer; an arrival's own length if that is less.
        temperature: 0 is greedy.
        seed: of the arrival times and of every request.
        rounds: how often every load is run.
        timeout_s: of one request.
        slo_ms: (to the first token, per further token) for goodput.
    """

    rates: tuple[float, ...] = ()
    concurrency: tuple[int, ...] = ()
    time_scale: float = 1.0
    requests: int = 0
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    rounds: int = 3
    timeout_s: float = 600.0
    slo_ms: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.timeout_s > 0:
            raise ConfigError(f"timeout_s must be above 0, got {self.timeout_s}")


def make_questions(
    paths: Sequence[Path], options: ServeOptions, *, arrivals: Sequence[Arrival] = ()
) -> tuple[list[Question], WorkloadInfo]:
    """The requests: calls of the traces in order, or edits of this machine's own standard library.

    Args:
        paths: trace files; their sources take turns.
        options: how many, how long.
        arrivals: recorded requests; each bounds the length of one answer.

    Raises:
        LoadError: a trace cannot be read.
        ConfigError: there is no call.
    """
    skips, count = Skips(), options.requests or len(arrivals) or _DEFAULT_REQUESTS
    units = [(source_name(path), path) for path in paths]
    streams = [
        ((name, call) for call in load_calls(path, skips=skips, needs_response=False)) for name, path in units
    ] or [(("stdlib-edits", call) for call in built_in_calls(count, seed=options.seed))]
    share = -(-count // len(streams))
    turns = [list(islice(stream, share)) for stream in streams]
    calls = [turn[place] for place in range(share) for turn in turns if place < len(turn)][:count]
    if not calls:
        raise ConfigError(f"the traces hold no call; passed over: {skips}")
    lengths = [max(1, a.response_tokens) for a in arrivals][: len(calls)] or [options.max_new_tokens] * len(calls)
    questions = [
        Question(name, call, min(length, options.max_new_tokens))
        for (name, call), length in zip(calls, lengths, strict=False)
    ]
    digest = hashlib.sha256(
        json.dumps([[q.call.parts, q.max_tokens] for q in questions], ensure_ascii=False).encode()
    ).hexdigest()
    files = [fingerprint(name, file) for name, path in units for file in trace_files(path)]
    return questions, WorkloadInfo(
        files=files or [SourceFile(source="stdlib-edits", name="built-in")],
        num_calls=len(questions), prompt_tokens=0, response_tokens=0,  # only the server can count them
        skipped=dict(skips.counts), tokens_sha256=digest,
    )  # fmt: skip


def make_loads(options: ServeOptions, count: int, *, arrivals: Sequence[Arrival] = ()) -> list[Load]:
    """Every load of the sweep.

    Raises:
        ConfigError: none was asked for, or two are the same.
    """
    loads = [poisson_load(rate, count, seed=options.seed) for rate in options.rates]
    loads += [Load.closed(number) for number in options.concurrency]
    if arrivals:
        loads.append(trace_load(arrivals, time_scale=options.time_scale))
    if not loads:
        raise ConfigError("say how requests come: rates, concurrency, or an arrival trace")
    names = [load.name for load in loads]
    if len(set(names)) < len(names):
        raise ConfigError(f"loads must be different, got {', '.join(names)}")
    return loads


def read_some_arrivals(path: Path, count: int) -> list[Arrival]:
    """The first arrivals of a trace; 0: all."""
    return list(islice(read_arrivals(path, skips=Skips()), count or None))


def run_serve(
    endpoints: Sequence[Endpoint],
    questions: Sequence[Question],
    workload: WorkloadInfo,
    loads: Sequence[Load],
    options: ServeOptions,
    *,
    output: Path | None = None,
    resume: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Every server under every load, the servers in turns; whole, or marked as partial after Ctrl-C.

    Args:
        endpoints: the first one is the baseline.
        questions: the requests.
        workload: about them.
        loads: the sweep.
        options: how.
        output: file that the result goes to, also while it runs.
        resume: keep what ``output`` has of whole (round, load, server) runs.
        on_progress: (finished requests, all requests).

    Raises:
        ConfigError: names of servers are not different, or ``output`` holds another run.
    """
    names = [endpoint.name for endpoint in endpoints]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"servers must have different names, at least one, got {', '.join(names) or 'none'}")
    result = BenchResult.model_validate(
        {
            "mode": "serve", "environment": environment(), "workload": workload.model_dump(), "model": None,
            "settings": json.loads(json.dumps({**asdict(options), "api": {e.name: e.api for e in endpoints},
                                               "models": {e.name: e.model for e in endpoints}})),
            "references": names if len(names) > 1 else [],
            "arms": [ArmInfo(name=at_load(name, load.name), kind="server") for load in loads for name in names],
        }
    )  # fmt: skip
    rows = _kept(output, result, len(questions)) if resume else []
    done = {(row.round, row.arm) for row in rows}
    total = options.rounds * len(loads) * len(names) * len(questions)

    def on_row(row: Row) -> None:
        rows.append(row)
        if on_progress is not None:
            on_progress(len(rows), total)

    def on_load() -> None:
        if output is not None:
            write_result(output, _taken(result, rows, options, is_partial=True))

    try:
        asyncio.run(_all(endpoints, questions, loads, options, done, on_row, on_load))
        is_partial = False
    except KeyboardInterrupt:
        is_partial = True
    result = _taken(result, rows, options, is_partial=is_partial)
    if output is not None:
        write_result(output, result)
    return result


async def _all(
    endpoints: Sequence[Endpoint],
    questions: Sequence[Question],
    loads: Sequence[Load],
    options: ServeOptions,
    done: set[tuple[int, str]],
    on_row: Callable[[Row], None],
    on_load: Callable[[], None],
) -> None:
    try:
        import httpx
    except ImportError:
        raise LoadError("serve mode needs httpx: install specdec-toolkit[server]") from None
    limits = httpx.Limits(max_connections=None)
    law: dict[str, Any] = {"temperature": options.temperature, "seed": options.seed}
    async with httpx.AsyncClient(timeout=options.timeout_s, limits=limits) as client:
        for number in range(options.rounds):
            for load in loads:
                turn = number % len(endpoints)
                for endpoint in [*endpoints[turn:], *endpoints[:turn]]:
                    if (number, at_load(endpoint.name, load.name)) in done:
                        continue
                    await run_load(client, endpoint, questions, load, round=number, on_row=on_row, **law)
                    on_load()


def _kept(output: Path | None, result: BenchResult, num_questions: int) -> list[Row]:
    if output is None:
        raise ConfigError("resuming needs the output file of the interrupted run")
    if not output.exists():
        return []
    before = read_result(output)
    for name in ("mode", "settings", "workload", "arms"):
        if getattr(before, name) != getattr(result, name):
            raise ConfigError(f"{output} holds another run: its {name} differs, so it cannot be resumed")
    counts = Counter((row.round, row.arm) for row in before.rows)
    return [row for row in before.rows if counts[row.round, row.arm] == num_questions]


def _taken(result: BenchResult, rows: list[Row], options: ServeOptions, *, is_partial: bool) -> BenchResult:
    """The result with its rows and all that follows from them; at temperature 0 all servers must say the same."""
    rows = sorted(rows, key=lambda row: (row.round, row.arm, row.call))
    if options.temperature == 0 and result.references:
        rows = _compared(rows, result.references[0])
    made = result.model_copy(update={"rows": rows, "is_partial": is_partial})
    made.summaries = summarize(rows, made.references, seed=options.seed, slo_ms=options.slo_ms)
    made.flags = guard(made, others=None, cores=os.cpu_count() or 1)
    return made


def _compared(rows: list[Row], baseline: str) -> list[Row]:
    said = {
        row.call: row.output_sha256
        for row in reversed(rows)
        if row.arm == at_load(baseline, row.load) and row.error is None
    }
    return [
        row.model_copy(update={"same_output": row.output_sha256 == said[row.call]})
        if row.error is None and row.call in said
        else row
        for row in rows
    ]
