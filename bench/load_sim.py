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
import numpy.typing as npt

from specdec.bench.arrivals import Arrival
from specdec.bench.load_policies import LoadLimits, Policy, PruneModel, Served
from specdec.bench.recorded_acceptance import Answer, RecordedAcceptance
from specdec.cost_model import CostModel
from specdec.errors import ConfigError
from specdec.step_budget import StepBudget

__all__ = ["compare_policies", "prepare_arrivals", "simulate_load", "summarize_load"]


@dataclass(slots=True, eq=False)
class _Running:
    served: Served
    answer: Answer
    position: int  # in the answer
    name: str
    emitted: int = 0
    to_cache: int = 0  # prompt tokens left


class _Replica:
    """One engine on paper."""

    def __init__(
        self,
        costs: CostModel,
        acceptance: RecordedAcceptance,
        policy: Policy,
        limits: LoadLimits,
        seed: int | None,
        pruning: PruneModel,
    ) -> None:
        self._costs, self._acceptance, self._policy, self._limits = costs, acceptance, policy, limits
        self._pruning = pruning
        # The controller starts from the same tables and learns on a copy of its own.
        own = CostModel.of_dict(costs.as_dict()) if policy.base == "adaptive" else costs
        self._budget = StepBudget(own)
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
        answers = self._acceptance.answers
        if self._rng is None:
            answer, start = answers[self._num_admitted % len(answers)], 0
        else:
            answer = answers[int(self._rng.integers(len(answers)))]
            start = int(self._rng.integers(answer.num_positions))
        self._num_admitted += 1
        served = Served(arrival.time_s, arrival.prompt_tokens, arrival.response_tokens)
        self._running.append(
            _Running(served, answer, start, str(self._num_admitted), to_cache=max(arrival.prompt_tokens - 1, 0))
        )

    def _step(self) -> None:
        decoding, prefill = self._plan_prefill()
        context = 1.0
        if decoding:
            context = sum(one.served.prompt_tokens + one.emitted for one in decoding) / len(decoding)
        at = [one.answer.at(one.position) for one in decoding]
        sizes, draft_ms = self._sizes(decoding, [values for values, _ in at], context, prefill)
        drafted = int(sum(sizes))
        rejected = sum(int(size) - int(gains[size]) for (_, gains), size in zip(at, sizes, strict=True))
        verify_ms = self._verify_ms(len(decoding) + prefill, drafted, rejected, context, max(len(decoding), 1))
        step_ms = verify_ms + draft_ms
        if self._policy.overlaps and draft_ms and len(decoding) > 1:
            half = self._verify_ms((len(decoding) + prefill) / 2, drafted / 2, rejected / 2, context, len(decoding) / 2)
            step_ms = min(step_ms, 2 * max(half, draft_ms / 2))
        self.now += step_ms / 1e3
        self.busy_s += step_ms / 1e3
        emitted = 0
        for one, (_, gains), size in zip(decoding, at, sizes, strict=True):
            count = min(int(gains[size]) + 1, one.served.response_tokens - one.emitted)
            if one.emitted == 0:
                one.served.first_s = self.now
            one.emitted += count
            one.position += count
            one.served.steps += 1
            one.served.drafted += int(size)
            emitted += count
        if decoding and self._policy.base == "adaptive":
            hidden = max(step_ms - verify_ms, 0.0)  # what drafting adds to the step
            self._budget.finish(emitted, drafted, {"draft": hidden, "target": min(verify_ms, step_ms)})

    def _verify_ms(self, tokens: float, drafted: float, rejected: float, context: float, batch: float) -> float:
        """The target's time of a step with ``tokens`` others; pruned where that is expected to pay."""
        whole = self._costs.step_ms(tokens + drafted, context, batch)
        if not self._policy.prunes or not drafted:
            return whole
        model = self._pruning
        dropped = model.found * rejected
        less = self._costs.step_ms(tokens + drafted - dropped, context, batch)
        return min(whole, model.depth * whole + (1 - model.depth) * less + model.probe_ms * drafted)

    def _plan_prefill(self) -> tuple[list[_Running], int]:
        """Who decodes in this step, and how many prompt tokens share it."""
        left, decoding = self._limits.max_prefill_tokens, []
        for one in self._running:
            piece = min(one.to_cache, left)
            one.to_cache -= piece
            left -= piece
            if one.to_cache == 0:
                decoding.append(one)
        return decoding, self._limits.max_prefill_tokens - left

    def _sizes(
        self, decoding: Sequence[_Running], values: Sequence[npt.NDArray[np.float32]], context: float, prefill: int
    ) -> tuple[Sequence[int], float]:
        """How many nodes of each request are verified, and what drafting took."""
        if self._policy.base == "none" or not values:
            return [0] * len(values), 0.0
        if self._policy.length:
            return [min(len(own), self._policy.length) for own in values], self._draft_ms(len(values), context)
        most, turns = self._budget.begin(len(values), context, prefill, self._limits.max_budget), self._budget.turns
        names = [one.name for one in decoding]
        planned = [most > 0 and turns.may_draft(name) for name in names]
        if not any(planned):
            return [0] * len(values), 0.0
        bounded = [own[: most if may else 0] for own, may in zip(values, planned, strict=True)]
        flat = np.concatenate(bounded)
        order = np.argsort(-flat, kind="stable")
        chosen = order[: self._budget.choose(flat[order]) if len(flat) else 0]
        owner = np.repeat(np.arange(len(values)), [len(own) for own in bounded])
        sizes = np.bincount(owner[chosen], minlength=len(values)).tolist()
        drafted = [row for row, may in enumerate(planned) if may]
        self._budget.judge(
            [names[row] for row in drafted],
            [float(bounded[row][: sizes[row]].sum()) for row in drafted],
            [sizes[row] for row in drafted],
        )
        if len(turns) > 4 * len(names) + 64:
            turns.keep(set(names))
        return sizes, self._draft_ms(len(drafted), context)

    def _draft_ms(self, num_requests: int, context: float) -> float:
        table = self._costs.tables["draft"]
        return table.at(num_requests, context, num_requests) if table.is_measured else 0.0


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
    for number in range(min(replicas, len(arrivals))):
        replica = _Replica(
            costs, acceptance, policy, limits or LoadLimits(), None if seed is None else seed + number,
            pruning or PruneModel(),
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
