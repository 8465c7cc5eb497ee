"""The arms of a benchmark: each does the same call in its own way and says what it cost.

Ours go through the engine, the peers through ``model.generate`` of the same weights. An arm never sees the
recorded answer other than through the processor that all arms share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessorList

from specdec.adaptive import controller_for
from specdec.bench.forcing import ForcedResponse
from specdec.build import compile_ahead, name_drafter
from specdec.controller_adaptive import AdaptiveController
from specdec.drafters.checkpoint import PendingDrafter
from specdec.drafters.fusion import FusedDrafter
from specdec.drafters.fusion_kernels import NUM_BINS
from specdec.errors import UnsupportedError
from specdec.types import IntArray, Request, RequestState, SamplingParams, StepEvent, StepTrace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.engine import Engine
    from specdec.protocols import Drafter

__all__ = ["Arm", "EngineArm", "EngineFactory", "GenerateArm", "Job", "JobResult", "warm_up"]

# (drafter, budget=, observers=, max_batch_size=) -> engine: ``build_engine`` or ``scripted_engine``, partly applied.
EngineFactory: TypeAlias = Callable[..., "Engine"]


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One call to be answered: prompt [P] int32; the answer to force [G] int32, or None to let the model speak.

    Temperature 0 is greedy; the seed is that of this call.
    """

    prompt_ids: IntArray
    max_new_tokens: int
    forced_ids: IntArray | None = None
    stop_ids: tuple[int, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(slots=True, eq=False)
class JobResult:
    """What one arm did with one job.

    Args:
        output_ids: what it answered.
        seconds: from the call to the last token.
        stamps: seconds at which each step's tokens were there.
        emitted: tokens of each step.
        accepted: accepted draft tokens of each step.
        drafted: draft tokens of each step; empty where the arm does not show them.
        depths: draft length of each step; likewise.
        parts_ms: milliseconds by name (draft, target, verify, commit, host); likewise. Of a step that several requests
            shared, each counts its share, and nobody can say whose the host's time was.
        start_s: seconds from the start of the run of many jobs to this one's call; None: it ran alone.
    """

    output_ids: list[int]
    seconds: float
    stamps: list[float]
    emitted: list[int]
    accepted: list[int]
    drafted: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    parts_ms: dict[str, float] = field(default_factory=dict)
    start_s: float | None = None


class Arm(Protocol):
    """One way of answering calls."""

    name: str
    kind: str  # whose code it is: specdec, transformers, arctic
    concurrency: int  # jobs at a time

    def reset(self) -> None:
        """Forget everything learned from earlier calls."""

    def warm(self, jobs: Sequence[Job]) -> None:
        """Learn from answered calls before the clock runs; arms that learn nothing pass."""

    def run(self, jobs: Sequence[Job]) -> list[JobResult]:
        """Answer the calls, ``concurrency`` at a time: as soon as one is done the next begins."""

    def close(self) -> None:
        """Give the model back as it was."""


class _StepRecorder:
    """Keeps what each step of the running job did (`specdec.protocols.Observer`); cheap, for it runs on the clock."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, StepTrace, Any]] = []

    def observe(self, events: Sequence[StepEvent]) -> None:
        now = perf_counter()
        self.steps.extend((now, event.trace, event.tree) for event in events)


@dataclass(slots=True, eq=False)
class _Live:
    """A job that is being answered."""

    index: int
    start: float
    output_ids: list[int] = field(default_factory=list)


class EngineArm:
    """Our engine with one drafter.

    Args:
        name: of the arm.
        make_engine: makes the engine around the target.
        drafter: a name for ``build_drafter`` or a function that makes a fresh drafter.
        budget: most draft tokens per step; None: follows what is accepted.
        drafter_options: of a named drafter.
        kind: whose drafter it is.
        concurrency: jobs at a time.
    """

    def __init__(
        self,
        name: str,
        make_engine: EngineFactory,
        drafter: str | Any,
        *,
        budget: int | None = None,
        drafter_options: Mapping[str, Any] | None = None,
        kind: str = "specdec",
        concurrency: int = 1,
    ) -> None:
        self.name, self.kind, self.concurrency = name, kind, concurrency
        self.budget = budget
        self._drafter, self._drafter_options = drafter, dict(drafter_options or {})
        self._recorder = _StepRecorder()
        self._engine = make_engine(
            self._fresh_drafter(), budget=budget, max_batch_size=concurrency, observers=[self._recorder]
        )
        self._count = 0
        self._judged = np.zeros((NUM_BINS, 3))  # of drafters that were replaced

    def _points(self) -> npt.NDArray[np.float64]:
        drafter = self._engine.drafter
        return drafter.acceptance.points() if isinstance(drafter, FusedDrafter) else np.zeros((NUM_BINS, 3))

    def reliability(self) -> list[tuple[float, float, int]]:
        """(predicted chance, observed share, nodes) by tenth; empty for drafters that are not calibrated."""
        points = (self._judged + self._points()).tolist()
        return [(predicted / count, hits / count, int(count)) for count, predicted, hits in points if count]

    def _fresh_drafter(self) -> Drafter | PendingDrafter:
        if not isinstance(self._drafter, str):
            made: Drafter = self._drafter()
            return made
        return name_drafter(self._drafter, **self._drafter_options)

    def reset(self) -> None:
        self._judged = self._judged + self._points()
        fresh = self._fresh_drafter()
        if not isinstance(fresh, PendingDrafter):  # those have weights, and nothing of earlier requests
            self._engine.drafter = fresh
        compile_ahead(self._engine.drafter)
        before = self._engine.controller  # what steps cost is the machine's, and no memory of earlier calls
        costs = before.costs if isinstance(before, AdaptiveController) else None
        self._engine.controller = controller_for([self._engine.drafter], self.budget, costs=costs)

    def warm(self, jobs: Sequence[Job]) -> None:
        warm_up(self._engine.drafter, jobs)

    def close(self) -> None:
        self._engine.close()

    def run(self, jobs: Sequence[Job]) -> list[JobResult]:
        done: dict[int, JobResult] = {}
        for _ in self.run_steps(jobs, done):
            pass
        return [done[index] for index in range(len(jobs))]

    def run_steps(self, jobs: Sequence[Job], done: dict[int, JobResult]) -> Iterator[None]:
        """Answer the calls and halt after every step; ``done`` gets the results by place."""
        self._recorder.steps.clear()
        waiting, live = deque(enumerate(jobs)), dict[str, _Live]()
        begin = perf_counter()
        try:
            while waiting or live:
                while waiting and len(live) < self.concurrency:
                    index, job = waiting.popleft()
                    request = self._request(job)
                    live[request.request_id] = _Live(index, perf_counter())
                    self._engine.submit(request)
                for output in self._engine.step():
                    one = live.get(output.request_id)
                    if one is None:
                        continue  # of a run that was interrupted
                    one.output_ids.extend(output.new_ids)
                    if output.finish_reason is not None:
                        done[one.index] = self._result(live.pop(output.request_id), output.request_id, begin)
                yield
        finally:
            for request_id in live:
                self._engine.cancel(request_id)

    @property
    def engine(self) -> Engine:
        """The engine, for measurements of its parts."""
        return self._engine

    def _request(self, job: Job) -> Request:
        self._count += 1
        processors = () if job.forced_ids is None else (ForcedResponse([job.forced_ids], len(job.prompt_ids)),)
        sampling = SamplingParams(
            max_new_tokens=job.max_new_tokens, logits_processors=processors, stop_token_ids=job.stop_ids,
            temperature=job.temperature, top_p=job.top_p, seed=job.seed,
        )  # fmt: skip
        return Request(f"job-{self._count}", job.prompt_ids, sampling)

    def _result(self, job: _Live, request_id: str, begin: float) -> JobResult:
        seconds = perf_counter() - job.start
        steps = [step for step in self._recorder.steps if step[1].request_id == request_id]
        traces = [trace for _, trace, _ in steps]
        parts = {
            name: sum(getattr(trace, f"{name}_ms") / trace.batch_size for trace in traces)
            for name in ("draft", "target", "verify", "commit")
        }
        if self.concurrency == 1:
            # The rest of the wall clock: scheduling, streaming, and prompt chunks, whose steps decode nothing.
            parts["host"] = 1e3 * seconds - sum(parts.values())
        return JobResult(
            job.output_ids,
            seconds,
            stamps=[now - job.start for now, _, _ in steps],
            emitted=[trace.num_emitted for trace in traces],
            accepted=[min(trace.num_accepted, trace.num_emitted) for trace in traces],
            drafted=[trace.num_draft_tokens for trace in traces],
            depths=[int(tree.depths().max()) for _, _, tree in steps],
            parts_ms=parts,
            start_s=None if self.concurrency == 1 else job.start - begin,
        )


def warm_up(drafter: Drafter, jobs: Sequence[Job]) -> None:
    """Show a drafter answered calls as if it had served them, without a model."""
    for number, job in enumerate(jobs):
        if job.forced_ids is None:
            continue
        state = RequestState(Request(f"warm-{number}", job.prompt_ids))
        drafter.start([state])
        state.append(job.forced_ids)
        drafter.propose([state], [0])
        drafter.stop([state.request_id])


class _Stamps:
    """A streamer that notes when tokens come (transformers' ``put``/``end``)."""

    def __init__(self) -> None:
        self.puts: list[tuple[float, int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.puts.append((perf_counter(), value.numel()))

    def end(self) -> None:
        """Nothing is buffered."""


class GenerateArm:
    """``model.generate`` as its users call it.

    Args:
        name: of the arm.
        model: the target; a copy if other arms pack the weights of theirs.
        assistant: a small model for assisted generation.
        **config: fields of ``GenerationConfig``, such as ``prompt_lookup_num_tokens``.
    """

    kind = "transformers"
    concurrency = 1  # its speculative ways take one request at a time

    def __init__(self, name: str, model: PreTrainedModel, *, assistant: Any = None, **config: Any) -> None:
        self.name = name
        self._model, self._assistant, self._config = model, assistant, config
        self._is_speculating = assistant is not None or bool(config)

    def reset(self) -> None:
        """It keeps nothing from call to call."""

    def warm(self, jobs: Sequence[Job]) -> None:
        """It learns nothing."""

    def close(self) -> None:
        """It holds nothing."""

    def run(self, jobs: Sequence[Job]) -> list[JobResult]:
        return [self._answer(job) for job in jobs]

    def _answer(self, job: Job) -> JobResult:
        if self._assistant is not None and job.forced_ids is not None:
            raise UnsupportedError(
                "transformers runs the target's processors on the assistant as well, so a forced assistant would "
                "guess everything right: assisted generation can be measured live only"
            )
        law = {"temperature": job.temperature, "top_p": job.top_p, "top_k": 0} if job.temperature else {}
        config = GenerationConfig(
            do_sample=bool(law), max_new_tokens=job.max_new_tokens, use_cache=True,
            eos_token_id=list(job.stop_ids) or None, pad_token_id=0, **law, **self._config,
        )  # fmt: skip
        processors = LogitsProcessorList()
        if job.forced_ids is not None:
            processors.append(ForcedResponse([job.forced_ids], len(job.prompt_ids)))
        ids = torch.from_numpy(job.prompt_ids.astype(np.int64))[None].to(self._model.device)
        extra = {} if self._assistant is None else {"assistant_model": self._assistant}
        stamps = _Stamps()
        with torch.random.fork_rng():
            torch.manual_seed(job.seed)
            start = perf_counter()
            output = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, logits_processor=processors,
                streamer=stamps, **extra,
            )  # fmt: skip
        output_ids = output[0, ids.shape[1] :].tolist()
        seconds = perf_counter() - start
        puts = stamps.puts[1:]  # the first one is the prompt
        emitted = [count for _, count in puts]
        accepted = [count - 1 for count in emitted] if self._is_speculating else [0] * len(emitted)
        return JobResult(output_ids, seconds, [now - start for now, _ in puts], emitted, accepted)
