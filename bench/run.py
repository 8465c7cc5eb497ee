"""One benchmark from options to a result: simulate, replay and live, for the command line and for scripts."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from specdec.bench.arm_builder import build_arms, build_simulated_arms, short_name
from specdec.bench.arms import Arm, EngineArm
from specdec.bench.cost_curve import cost_curve
from specdec.bench.guards import OthersLoad, guard
from specdec.bench.loaders import Skips
from specdec.bench.measure import environment
from specdec.bench.metrics import summarize
from specdec.bench.replay import Plan, Run, run_rounds
from specdec.bench.results_schema import ArmInfo, BenchResult, SourceFile, Warmth, at_load, read_result, write_result
from specdec.bench.targets import Target
from specdec.bench.traces import Encode
from specdec.bench.workload import Limits, Parts, Render, Workload, built_in_calls, template_of
from specdec.build import model_max_length
from specdec.errors import ConfigError

__all__ = ["BenchOptions", "make_training", "make_workload", "run_bench"]

_REFERENCES = ("plain", "generate", "prompt-lookup")  # what speed-ups are given against, as far as they ran
_DRAFT_ROOM = 512  # KV slots beyond prompt and answer, for the nodes of one step
_BUILT_IN_CALLS = 24
_SAVE_EVERY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What is run; goes into the result file as it is.

    Args:
        mode: simulate, replay or live.
        arms: names for ``build_arms``; the first reference among them is the baseline.
        rounds: timed rounds.
        budget: most draft tokens per step; None: follows what is accepted.
        warmth: of the stores at the start of a round.
        max_new_tokens: of a live answer.
        calls: of each source; 0 = all.
        per_episode: calls of each episode, evenly spaced; 0 = all.
        max_prompt: tokens; 0 = all.
        max_response: tokens; 0 = all.
        chat_template: prompts are put into the tokenizer's own; else into a neutral frame.
        held_out: measure only the half of the episodes that nothing shipped was chosen on; warmed stores may then learn
            from the other half.
        train_calls: of each source, for warmed stores; 0 = all.
        seed: of the bootstrap, the built-in workload and random weights.
        temperature: 0 is greedy; a replay's answer stays the recorded one.
        top_p: 1 = off.
        concurrency: requests at a time; every further number runs our arms once more.
        keep_rows: False leaves rows and timeline out of the file: smaller, but it cannot be resumed.
        slo_ms: (to the first token, per further token) for goodput.
        strict: the first faulty record is an error.
        overlap: of drafting and verification; see ``EngineConfig``.
    """

    mode: str = "replay"
    arms: tuple[str, ...] = ("plain", "ngram", "generate", "prompt-lookup")
    rounds: int = 3
    budget: int | None = None
    warmth: Warmth = "self-warmed"
    max_new_tokens: int = 128
    calls: int = 0
    per_episode: int = 0
    max_prompt: int = 0
    max_response: int = 0
    chat_template: bool = False
    held_out: bool = False
    train_calls: int = 0
    seed: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    concurrency: tuple[int, ...] = (1,)
    keep_rows: bool = True
    slo_ms: tuple[float, float] | None = None
    strict: bool = False
    overlap: str = "auto"

    def __post_init__(self) -> None:
        if self.mode not in ("simulate", "replay", "live"):
            raise ConfigError(f"mode must be simulate, replay or live, got {self.mode!r}")
        if not self.arms:
            raise ConfigError("arms must name at least one, got none")
        if self.warmth not in ("cold", "self-warmed", "warmed"):
            raise ConfigError(f"warmth must be cold, self-warmed or warmed, got {self.warmth!r}")
        if self.rounds < 1:
            raise ConfigError(f"rounds must be at least 1, got {self.rounds}")
        if not self.concurrency or min(self.concurrency) < 1 or len(set(self.concurrency)) < len(self.concurrency):
            raise ConfigError(f"concurrency must be different numbers >= 1, got {self.concurrency}")
        if max(self.concurrency) > 1 and self.mode == "simulate":
            raise ConfigError("a simulation has no clock, so concurrency must be 1")
        if max(self.concurrency) > 1 and self.warmth == "cold":
            raise ConfigError("stores that forget before every call cannot serve several at a time: not with cold")


def make_workload(
    paths: Sequence[Path], encode: Encode, options: BenchOptions, *, format: str = "auto", tokenizer: Any = None
) -> Workload:
    """The calls of the traces; without any, edits of this machine's own standard library.

    Args:
        paths: trace files and folders.
        encode: text to token ids, without special tokens.
        options: how much is taken.
        format: of the traces.
        tokenizer: for its chat template.

    Raises:
        LoadError: a trace cannot be read.
        ConfigError: no usable call.
    """
    half = 1 if options.held_out else None
    limits = Limits(options.calls, options.max_prompt, options.max_response, half, options.per_episode)
    render = template_of(tokenizer) if options.chat_template else None
    if paths:
        return Workload.from_paths(
            paths, encode, limits, is_strict=options.strict, needs_response=options.mode != "live", format=format,
            render=render,
        )  # fmt: skip
    count = options.calls or _BUILT_IN_CALLS
    return Workload.of(
        [("stdlib-edits", lambda: built_in_calls(count, seed=options.seed))], encode, limits, skips=Skips(),
        files=[SourceFile(source="stdlib-edits", name="built-in")], render=render,
    )  # fmt: skip


def make_training(
    paths: Sequence[Path], traces: Sequence[Path], encode: Encode, options: BenchOptions, *, format: str = "auto"
) -> Workload | None:
    """What warmed stores know: the given traces, or without any the half of the measured ones that is not measured.

    Raises:
        LoadError: a trace cannot be read.
        ConfigError: warmed stores would know what they are measured on, or there is training for stores that forget.
    """
    if options.warmth != "warmed":
        if paths:
            raise ConfigError(f"training traces are for warmed stores, got warmth {options.warmth}")
        return None
    if not paths and not (traces and options.held_out):
        raise ConfigError("warmed stores need training traces, or held-out ones to be measured on")
    limits = Limits(options.train_calls, options.max_prompt, options.max_response, None if paths else 0)
    return Workload.from_paths(paths or traces, encode, limits, is_strict=options.strict, format=format)


def run_bench(
    target: Target | None,
    work: Workload,
    options: BenchOptions,
    *,
    output: Path | None = None,
    resume: bool = False,
    assistant: Any = None,
    training: Workload | None = None,
    tokenizer: Any = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> BenchResult:
    """Run all arms over the workload; the result is complete, or marked as partial after Ctrl-C.

    Args:
        target: the model of all arms; None: a simulation.
        work: the calls.
        options: how.
        output: file that the result goes to, also while it runs.
        resume: go on from what ``output`` holds: the sources that each round finished.
        assistant: the small model of assisted generation.
        training: answered calls for warmed stores.
        tokenizer: for live answers that later prompts quote; None: the target's own.
        on_progress: (finished calls, all calls) over all rounds.

    Raises:
        ConfigError: the options, the model and the workload do not fit each other.
    """
    if options.warmth == "warmed" and training is None:
        raise ConfigError("warmed stores need training traces")
    if (target is None) != (options.mode == "simulate"):
        raise ConfigError(f"mode {options.mode} needs {'no' if target else 'a'} model")
    arms = _arms(target, [work, *([training] if training else [])], options, assistant)
    with ExitStack() as stack:
        for arm in arms:
            stack.callback(arm.close)
        result = _empty_result(target, work, options, arms)
        before = _before(output, result) if resume else None
        words = tokenizer or (target.tokenizer if target is not None else None)
        saver = _Saver(result, output, options, on_progress)
        watch = OthersLoad()
        run = run_rounds(
            arms, work, _plan(target, options, training, words), on_step=saver.step,
            done_rows=before.rows if before else (),
            done_failures=[arm.name for arm in before.arms if arm.failure] if before else (),
            done_timeline=before.timeline if before else (),
        )  # fmt: skip
        others = watch.cores()
        _take(result, run, options)
        if before is not None and before.rows:
            result.energy_j = {}  # what was counted before the interruption belongs to calls that were done anew
        result.reliability = {
            arm.name: points for arm in arms if isinstance(arm, EngineArm) and (points := arm.reliability())
        }
        engines = [arm.engine for arm in arms if isinstance(arm, EngineArm) and arm.concurrency == 1]
        if engines and target is not None and not run.is_partial:
            result.cost_curve = cost_curve(engines[0], work)
    result.memory = _memory()
    result.flags = guard(result, others=others, cores=os.cpu_count() or 1)
    if output is not None:
        write_result(output, result if options.keep_rows else result.model_copy(update={"rows": [], "timeline": []}))
    return result


def _arms(target: Target | None, works: Sequence[Workload], options: BenchOptions, assistant: Any) -> list[Arm]:
    """The arms, the references first; they may say any token of ``works``, the first of which is asked."""
    if target is None:
        arms = build_simulated_arms(options.arms, max(map(_largest_id, works)) + 1, budget=options.budget)
    else:
        arms = build_arms(
            options.arms, target.model, budget=options.budget, assistant=assistant, concurrency=options.concurrency,
            kv_tokens=_room(target, works, options), overlap=options.overlap,
        )  # fmt: skip
    arms.sort(key=lambda arm: _REFERENCES.index(arm.name) if arm.name in _REFERENCES else len(_REFERENCES))
    return arms


def _largest_id(work: Workload) -> int:
    return max(int(ids.max(initial=0)) for item in work.items for ids in (item.prompt_ids, item.response_ids))


def _room(target: Target, works: Sequence[Workload], options: BenchOptions) -> int:
    """Tokens that an engine must hold; says which call is too long for the model."""
    work = works[0]
    answer = (lambda n: n) if options.mode == "replay" else (lambda _: options.max_new_tokens)
    lengths = [len(item.prompt_ids) + answer(len(item.response_ids)) for item in work.items]
    limit, vocab_size = model_max_length(target.model), target.model.config.get_text_config().vocab_size
    if max(lengths) >= limit:
        raise ConfigError(
            f"a call of {max(lengths)} tokens is too long for a context of {limit}: set max_prompt and max_response"
        )
    largest = max(map(_largest_id, works))
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer gives token {largest}, but the model has {vocab_size}: take its own tokenizer"
        )
    has_gaps = any(item.parts is not None for item in work.items)  # prompts that grow by live answers
    if has_gaps and max(options.concurrency) > 1:
        raise ConfigError("prompts that quote earlier live answers must be asked one after the other: concurrency 1")
    return limit if has_gaps else max(lengths) + _DRAFT_ROOM


def _plan(target: Target | None, options: BenchOptions, training: Workload | None, tokenizer: Any) -> Plan:
    is_live = options.mode == "live"
    return Plan(
        is_live=is_live,
        is_timed=target is not None,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        rounds=options.rounds,
        max_new_tokens=options.max_new_tokens,
        stop_ids=target.stop_ids if is_live and target is not None else (),
        warmth=options.warmth,
        training=training.items if training is not None else (),
        decode=None if tokenizer is None else lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        render=_renderer(tokenizer, options),
    )


def _renderer(tokenizer: Any, options: BenchOptions) -> Render | None:
    """Prompts to token ids, for those that quote live answers."""
    if tokenizer is None:
        return None
    if options.chat_template:
        return template_of(tokenizer)

    def render(parts: Parts) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += tokenizer.encode(part, add_special_tokens=False) if isinstance(part, str) else part
        return ids

    return render


def _empty_result(target: Target | None, work: Workload, options: BenchOptions, arms: Sequence[Arm]) -> BenchResult:
    # A speed-up needs a target whose time is saved.
    names = [name for name in options.arms if target is not None]
    return BenchResult.model_validate(
        {
            "mode": options.mode,
            "environment": environment(),
            "settings": json.loads(json.dumps({**asdict(options), "arms": [*map(short_name, options.arms)]})),
            "workload": work.info().model_dump(),
            "model": None if target is None else target.info.model_dump(),
            "references": [name for name in _REFERENCES if name in names] or names[:1],
            "arms": [
                ArmInfo(name=arm.name, kind=arm.kind, warmth=_warmth(arm, options), options=_arm_options(arm))
                for arm in arms
            ],
        }
    )


def _warmth(arm: Arm, options: BenchOptions) -> Warmth:
    return options.warmth if isinstance(arm, EngineArm) and arm.budget != 0 else "cold"


def _arm_options(arm: Arm) -> dict[str, Any]:
    return {"budget": arm.budget, "concurrency": arm.concurrency} if isinstance(arm, EngineArm) else {}


def _before(output: Path | None, result: BenchResult) -> BenchResult | None:
    """What an interrupted run left, if it was the same run."""
    if output is None:
        raise ConfigError("resuming needs the output file of the interrupted run")
    if not output.exists():
        return None
    before = read_result(output)
    for name in ("mode", "settings", "workload", "model"):
        if getattr(before, name) != getattr(result, name):
            raise ConfigError(f"{output} holds another run: its {name} differs, so it cannot be resumed")
    return before


class _Saver:
    """Counts what is done, and writes the result file from time to time, so that even a power cut leaves something."""

    def __init__(
        self,
        result: BenchResult,
        output: Path | None,
        options: BenchOptions,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._result, self._output, self._options = result, output, options
        self._total, self._on_progress = result.workload.num_calls * options.rounds, on_progress
        self._saved_at = -_SAVE_EVERY_S  # the first call is saved at once

    def step(self, run: Run) -> None:
        if self._on_progress is not None:
            self._on_progress(len({(row.round, row.call) for row in run.rows}), self._total)
        if self._output is not None and perf_counter() - self._saved_at > _SAVE_EVERY_S:
            _take(self._result, run, self._options)
            self._result.is_partial = True
            write_result(self._output, self._result)
            self._saved_at = perf_counter()


def _take(result: BenchResult, run: Run, options: BenchOptions) -> None:
    result.rows, result.timeline, result.is_partial = run.rows, run.timeline, run.is_partial
    result.energy_j = {name: joules for name, joules in run.energy_j.items() if joules}
    for arm in result.arms:
        arm.failure = run.failures.get(arm.name)
    loads = {row.load for row in run.rows}
    ran = {row.arm for row in run.rows}
    result.references = [
        name for name in result.references if not run.rows or any(at_load(name, load) in ran for load in loads)
    ]
    result.summaries = summarize(run.rows, result.references, seed=options.seed, slo_ms=options.slo_ms)


def _memory() -> dict[str, int]:
    # ru_maxrss is in KiB on Linux.
    memory = {"peak_process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        memory["peak_device"] = torch.cuda.max_memory_allocated()
    return memory
