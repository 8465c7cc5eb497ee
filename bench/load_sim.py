"""Discrete-event simulation of a served load: arrivals against a cost table and recorded acceptance, on paper.

Each replica works as the engine does: senior requests first, prompts in pieces that share the step with decoding, every
running request one step at a time; what a step costs is read from the table, what it brings from the record. Replicas
share nothing but the arrivals, which go to them in turn. So thousands of them are a matter of minutes, and a policy can
be chosen before anything is deployed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec.bench.arrivals import Arrival
from specdec.bench.load_policies import LoadLimits, Policy, PruneModel, Served
from specdec.bench.load_steps import StepTimes
from specdec.bench.recorded_acceptance import Answer, RecordedAcceptance
from specdec.cost_model import CostModel
from specdec.errors import ConfigError
from specdec.step_budget import StepBudget

__all__ = ["compare_policies", "prepare_arrivals", "simulate_load", "summarize_load"]


@dataclass(slots=True, eq=False)
class _Running:
    served: Served
    answer: Answer
    starts: list[int]  # of the answer, for reading one at a time
    gains: list[int]
    position: int  # in the answer
    name: str
    emitted: int = 0
    to_cache: int = 0  # prompt tokens left

    @property
    def place(self) -> int:
        """In the answer, which starts again behind its end."""
        return self.position % (len(self.starts) - 1)


class _Replica:
    """One engine on paper."""

    def __init__(
        self,
        costs: CostModel,
        answers: Sequence[tuple[Answer, list[int], list[int]]],
        policy: Policy,
        limits: LoadLimits,
        seed: int | None,
        times: StepTimes,
    ) -> None:
        self._answers, self._policy, self._limits, self._times = answers, policy, limits, times
        # The controller starts from the same tables and learns on a copy of its own.
        self._budget = StepBudget(CostModel.of_dict(costs.as_dict()) if policy.base == "adaptive" else costs)
        self._rng = None if seed is None else np.random.default_rng(seed)
        self._num_admitted = 0
        self._running: list[_Running] = []
        self.now = 0.0
        self.busy_s = 0.0

    def run(self, arrivals: Sequence[Arrival]) -> list[Served]:
        """Serve everything to its end."""
        waiting, done = deque(arrivals), list[Served]()
        while waiting or self._running:
            if not self._running:
                self.now = max(self.now, waiting[0].time_s)
            while waiting and waiting[0].time_s <= self.now and len(self._running) < self._limits.max_batch_size:
                self._admit(waiting.popleft())
            self._step()
            for one in self._running:
                if one.emitted >= one.served.response_tokens:
                    one.served.last_s = self.now
                    done.append(one.served)
            self._running = [one for one in self._running if one.emitted < one.served.response_tokens]
        return done

    def _admit(self, arrival: Arrival) -> None:
        if self._rng is None:
            answer, start = self._answers[self._num_admitted % len(self._answers)], 0
        else:
            answer = self._answers[int(self._rng.integers(len(self._answers)))]
            start = int(self._rng.integers(answer[0].num_positions))
        self._num_admitted += 1
        served = Served(arrival.time_s, arrival.prompt_tokens, arrival.response_tokens)
        self._running.append(
            _Running(served, *answer, start, str(self._num_admitted), to_cache=max(arrival.prompt_tokens - 1, 0))
        )

    def _step(self) -> None:
        decoding, prefill = self._plan_prefill()
        context = 1.0
        if decoding:
            context = sum([one.served.prompt_tokens + one.emitted for one in decoding]) / len(decoding)
        places = [one.place for one in decoding]
        sizes, num_drafting = self._sizes(decoding, places, context, prefill)
        others = len(decoding) + prefill
        draft_ms = self._times.draft_ms(others + sum(sizes), context, num_drafting) if num_drafting else 0.0
        gains = []
        for one, p, size in zip(decoding, places, sizes, strict=True):
            first = one.starts[p] + p
            gains.append(one.gains[first : first + size + 1])
        step_ms = self._times.step_ms(others, sizes, gains, draft_ms, context)
        self.now += step_ms / 1e3
        self.busy_s += step_ms / 1e3
        emitted = 0
        for one, own, size in zip(decoding, gains, sizes, strict=True):
            served = one.served
            count = min(own[size] + 1, served.response_tokens - one.emitted)
            if one.emitted == 0:
                served.first_s = self.now
            one.emitted += count
            one.position += count
            served.steps += 1
            served.drafted += size
            emitted += count
        if decoding and self._policy.base == "adaptive":
            # Of what overlaps, drafting has what it adds.
            target_ms = min(self._times.verify_ms(others, sum(sizes), 0, context, len(decoding)), step_ms)
            self._budget.finish(emitted, sum(sizes), {"draft": step_ms - target_ms, "target": target_ms})

    def _plan_prefill(self) -> tuple[list[_Running], int]:
        """Who decodes in this step, and how many prompt tokens share it."""
        left, decoding = self._limits.max_prefill_tokens, []
        for one in self._running:
            if one.to_cache:
                piece = min(one.to_cache, left)
                one.to_cache -= piece
                left -= piece
            if one.to_cache == 0:
                decoding.append(one)
        return decoding, self._limits.max_prefill_tokens - left

    def _sizes(
        self, decoding: Sequence[_Running], places: Sequence[int], context: float, prefill: int
    ) -> tuple[Sequence[int], int]:
        """How many nodes of each request are verified, and for how many requests something was drafted."""
        if self._policy.base == "none" or not decoding:
            return [0] * len(decoding), 0
        if most := self._policy.length:
            pairs = zip(decoding, places, strict=True)
            return [min(one.starts[p + 1] - one.starts[p], most) for one, p in pairs], len(decoding)
        most, turns = self._budget.begin(len(decoding), context, prefill, self._limits.max_budget), self._budget.turns
        names = [one.name for one in decoding]
        drafted = [row for row, name in enumerate(names) if turns.may_draft(name)] if most > 0 else []
        if not drafted:
            return [0] * len(decoding), 0
        bounded = []
        for row in drafted:
            starts, p = decoding[row].starts, places[row]
            bounded.append(decoding[row].answer.values[starts[p] : min(starts[p + 1], starts[p] + most)])
        flat = np.concatenate(bounded)
        order = np.argsort(-flat, kind="stable")
        chosen = order[: self._budget.choose(flat[order]) if len(flat) else 0]
        owner = np.repeat(drafted, [len(own) for own in bounded])
        sizes: list[int] = np.bincount(owner[chosen], minlength=len(decoding)).tolist()
        self._budget.judge([names[row] for row in drafted], bounded)
        if len(turns) > 4 * len(names) + 64:
            turns.keep(set(names))
        return sizes, len(drafted)


def prepare_arrivals(
    arrivals: Iterable[Arrival], *, load: float = 1.0, max_requests: int = 0, max_tokens: int = 0
) -> list[Arrival]:
    """Arrivals for a simulation: in order of time, ``load`` times as fast, without those that nothing was answered to.

    Args:
        arrivals: of a trace.
        load: > 0; 2 = the same requests in half the time.
        max_requests: the first so many; 0: all.
        max_tokens: prompts and responses are cut to so many; 0: not.

    Raises:
        ConfigError: the load is not positive, or nothing is left.
    """
    if not load > 0:
        raise ConfigError(f"load must be > 0, got {load}")
    kept = sorted((a for a in arrivals if a.response_tokens > 0), key=lambda a: a.time_s)[: max_requests or None]
    if not kept:
        raise ConfigError("the arrival trace has no request with a response")
    most = max_tokens or max(max(a.prompt_tokens, a.response_tokens) for a in kept)
    first = kept[0].time_s
    return [
        Arrival(
            (a.time_s - first) / load, max(min(a.prompt_tokens, most), 1), min(a.response_tokens, most), a.session_id
        )
        for a in kept
    ]


def simulate_load(
    arrivals: Sequence[Arrival],
    costs: CostModel,
    acceptance: RecordedAcceptance,
    policy: Policy,
    *,
    limits: LoadLimits | None = None,
    replicas: int = 1,
    seed: int | None = 0,
    pruning: PruneModel | None = None,
) -> tuple[list[Served], float]:
    """Serve all arrivals.

    Args:
        arrivals: in order of time; they go to the replicas in turn.
        costs: measured.
        acceptance: what drafts bring.
        policy: how much is drafted.
        limits: of each replica.
        replicas: engines, >= 1.
        seed: which answer each request gives, and from where on; the same for every policy. None: the answers in
            order, each from its beginning.
        pruning: of policies that prune.

    Returns:
        The requests, and the mean share of time that a replica was busy.

    Raises:
        ConfigError: a number is outside its rule, or the cost table is empty.
    """
    if replicas < 1:
        raise ConfigError(f"replicas must be at least 1, got {replicas}")
    if not costs.is_measured:
        raise ConfigError("the cost table is empty: measure it first")
    served: list[Served] = []
    busy = 0.0
    times = StepTimes(costs, policy, pruning or PruneModel())
    answers = [(answer, answer.starts.tolist(), answer.gains.tolist()) for answer in acceptance.answers]
    for number in range(min(replicas, len(arrivals))):
        replica = _Replica(
            costs, answers, policy, limits or LoadLimits(), None if seed is None else seed + number, times
        )  # fmt: skip
        served += replica.run(arrivals[number::replicas])
        busy += replica.busy_s / max(replica.now, 1e-9)
    return served, busy / replicas


def summarize_load(served: Sequence[Served], *, ttft_ms: float, tpot_ms: float) -> dict[str, Any]:
    """The figures that a policy is chosen by.

    Args:
        served: what ``simulate_load`` gave.
        ttft_ms: time to the first token that is good enough.
        tpot_ms: time per further token that is good enough.

    Returns:
        Throughput and goodput (tokens of requests that met both) in tokens per second from the first arrival to the
        last token, the share of such requests, TTFT and TPOT percentiles in ms, tokens per step, drafted per step.
    """
    ttft = np.array([one.ttft_ms for one in served])
    tpot = np.array([one.tpot_ms for one in served])
    tokens = np.array([one.response_tokens for one in served])
    steps = sum(one.steps for one in served)
    seconds = max(one.last_s for one in served) - min(one.arrival_s for one in served)
    is_good = (ttft <= ttft_ms) & (tpot <= tpot_ms)
    return {
        "requests": len(served),
        "seconds": float(seconds),
        "tokens_per_s": float(tokens.sum() / seconds),
        "goodput_tokens_per_s": float(tokens[is_good].sum() / seconds),
        "good_share": float(is_good.mean()),
        "ttft_p50_ms": float(np.percentile(ttft, 50)),
        "ttft_p99_ms": float(np.percentile(ttft, 99)),
        "tpot_p50_ms": float(np.percentile(tpot, 50)),
        "tpot_p99_ms": float(np.percentile(tpot, 99)),
        "tpot_mean_ms": float(tpot.mean()),
        "tokens_per_step": float(tokens.sum() / max(steps, 1)),
        "drafted_per_step": sum(one.drafted for one in served) / max(steps, 1),
    }


def compare_policies(
    arrivals: Sequence[Arrival],
    costs: CostModel,
    acceptance: RecordedAcceptance,
    policies: Sequence[Policy],
    *,
    slo_ms: tuple[float, float],
    limits: LoadLimits | None = None,
    replicas: int = 1,
    seed: int = 0,
    pruning: PruneModel | None = None,
) -> dict[str, dict[str, Any]]:
    """``simulate_load`` and ``summarize_load`` of several policies over the same requests and answers.

    Args:
        arrivals: in order of time.
        costs: measured.
        acceptance: what drafts bring.
        policies: to compare.
        slo_ms: (TTFT, TPOT) that are good enough.
        limits: of each replica.
        replicas: engines.
        seed: which answer each request gives.
        pruning: of policies that prune.

    Returns:
        By policy: the summary, the share of time that replicas were busy, and the busy seconds of all of them.
    """
    found = {}
    for policy in policies:
        served, busy = simulate_load(
            arrivals, costs, acceptance, policy, limits=limits, replicas=replicas, seed=seed, pruning=pruning
        )
        figures = summarize_load(served, ttft_ms=slo_ms[0], tpot_ms=slo_ms[1])
        found[policy.name] = {**figures, "busy_share": busy, "work_s": busy * replicas * figures["seconds"]}
    return found
