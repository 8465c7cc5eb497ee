"""Learning from what passes: answers go through a bounded queue into their tenant's part of the store.

A thread does the reading and the tokenizing, so that the relay waits for neither. When the queue is full an answer is
dropped and counted. Before anything is turned on, the *shadow estimate* says what each protocol would have saved on the
very answers that passed, at the speed that was measured.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from time import monotonic
from typing import Any

import numpy as np

from specdec.server.sidecar.drafting import Shop, drafts_of
from specdec.server.sidecar.events import EventSplitter, read_event
from specdec.server.sidecar.plan import PlanOptions, Timing, best_layout, best_round
from specdec.server.sidecar.requests import Asked
from specdec.server.sidecar.tokens import Tokens

__all__ = ["Learner", "Passed", "simulate"]

_QUEUED = 64
_PATIENCE_S = 0.2
_MAX_SHADOW_TOKENS = 2048  # of one answer; the estimate walks token by token


@dataclass(frozen=True, slots=True)
class Passed:
    """An answer that passed.

    Args:
        asked: the request.
        tenant: whose it is.
        body: of the answer, whole.
        is_stream: it came in events.
    """

    asked: Asked
    tenant: str
    body: bytes
    is_stream: bool


def simulate(
    shop: Shop, request_id: str, prompt_ids: Sequence[int], output_ids: Sequence[int], *, tenant: str,
    plan: PlanOptions, timing: Timing, is_rounds: bool = False,
) -> tuple[float, int]:  # fmt: skip
    """What the segment rule, or rounds, would save on a recorded answer, drafting from the store as it is now.

    Returns:
        Seconds that the answer takes less, and branches launched. The request is live only within this call.
    """
    cache, step_s = shop.cache, timing.step_s
    if step_s is None:
        return 0.0, 0
    cache.start(request_id, np.array(prompt_ids, np.int32), tenant=tenant, caching=False)
    saved, launched, at = 0.0, 0, 0
    output, new = list(output_ids), 1
    try:
        while at + new <= len(output):
            piece = output[at : at + new]
            at, new = at + new, 1
            room = max(0, min(plan.max_draft, len(output) - at))
            ids, reach = drafts_of(cache, request_id, piece, limit=room, threshold=plan.min_probability)
            rule = best_round if is_rounds else best_layout
            layout = rule(reach, timing, plan) if len(ids) >= plan.min_segment else None
            if layout is None or not layout.offsets:
                continue
            launched += len(layout.offsets)
            segment = layout.offsets[0]
            right = next((i for i, token in enumerate(ids) if output[at + i] != token), len(ids))
            if is_rounds:
                new, won_s = _round(min(right + 1, len(output) - at - 1), timing, step_s)
                saved += won_s
                continue
            adopted = sum(1 for offset in layout.offsets if offset <= right and at + offset < len(output))
            if adopted:
                # The last one adopted goes on alone; all that it had produced by then comes at once.
                ready = segment - timing.open_s / step_s
                ends = at + adopted * segment + max(0, int(ready))
                new = max(1, min(ends, len(output)) - at)
                saved += max(0.0, (new - segment) * step_s)
            else:
                new = max(1, min(right + 1, len(output) - at))
    finally:
        cache.finish(request_id)
    return saved, launched


def _round(num_said: int, timing: Timing, step_s: float) -> tuple[int, float]:
    """Tokens until the next draft, and seconds saved, of a verdict that says so many tokens."""
    once_s = timing.open_s + step_s  # for the verdict, and again for the continuation behind it
    ahead = num_said - int(once_s / step_s)
    if (ahead - 1) * step_s <= timing.open_s:
        return max(1, int(once_s / step_s)), 0.0
    return max(1, num_said), max(0.0, (num_said + 1) * step_s - 2 * once_s)


class Learner:
    """Takes answers into the store.

    Args:
        shop: the store and the metrics.
        tokens: the tokenizer, if there is one.
        is_busy: requests are under way; an answer waits a moment for a pause, because Python runs one thread at a time.
    """

    def __init__(self, shop: Shop, tokens: Tokens, is_busy: Callable[[], bool]) -> None:
        self._shop, self._tokens, self._is_busy = shop, tokens, is_busy
        self._queue: asyncio.Queue[Passed] = asyncio.Queue(_QUEUED)
        self._numbers = count()
        self._task: asyncio.Task[None] | None = None
        self.saved: dict[str, float] = {"race": 0.0, "grid": 0.0, "rounds": 0.0}  # seconds; rounds: greedy answers only
        self.total_s = 0.0  # of the answers that the estimate covers, at the measured step
        self.num_answers = 0
        self.on_text: Callable[[str], None] | None = None  # called by the thread that learns, for each answer

    def start(self) -> None:
        """Begin to work off the queue; on the event loop."""
        self._task = asyncio.ensure_future(self._work())

    async def close(self) -> None:
        """Stop; what is queued is dropped."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def take(self, passed: Passed) -> None:
        """Queue an answer; never waits."""
        try:
            self._queue.put_nowait(passed)
        except asyncio.QueueFull:
            self._shop.metrics.learn_dropped.inc()

    async def idle(self) -> None:
        """Wait until everything queued is learned."""
        await self._queue.join()

    async def _work(self) -> None:
        while True:
            passed = await self._queue.get()
            try:
                deadline = monotonic() + _PATIENCE_S
                while self._is_busy() and monotonic() < deadline:
                    await asyncio.sleep(_PATIENCE_S / 20)
                await asyncio.to_thread(self._learn, passed)
            finally:
                self._queue.task_done()

    def _learn(self, passed: Passed) -> None:
        prompt, output, said = self._read(passed)
        if self.on_text is not None:
            self.on_text(said)
        if not output:
            return
        if prompt is not None and passed.is_stream:
            self._estimate(passed.tenant, prompt, output, is_greedy=passed.asked.is_greedy)
        text = [*(prompt or [])[-64:], *output]  # the prompt's end tells where such an answer begins
        self._shop.cache.insert(f"learned-{next(self._numbers)}", np.array(text, np.int32), tenant=passed.tenant)
        self._shop.metrics.learned.inc(len(output))

    def _estimate(self, tenant: str, prompt: Sequence[int], output: Sequence[int], *, is_greedy: bool) -> None:
        timing, plan = replace(self._shop.timing), self._shop.plan
        if timing.step_s is None:
            return
        output = output[:_MAX_SHADOW_TOKENS]
        self.num_answers += 1
        self.total_s += len(output) * timing.step_s
        for proto, branches in (("race", 1), ("grid", max(2, plan.max_branches)), ("rounds", 1)):
            if proto == "rounds" and not is_greedy:
                continue
            saved, _ = simulate(
                self._shop, f"shadow-{next(self._numbers)}", prompt, output, tenant=tenant,
                plan=replace(plan, max_branches=branches), timing=timing, is_rounds=proto == "rounds",
            )  # fmt: skip
            self.saved[proto] += saved
            self._shop.metrics.shadow.labels(proto).inc(saved)

    def _read(self, passed: Passed) -> tuple[list[int] | None, list[int], str]:
        """Token ids of prompt and output, as the upstream tells them, else by the tokenizer; and the output's text."""
        prompt: list[int] | None = None
        output: list[int] = []
        text = ""
        for event in _events(passed):
            if event[1] is not None:
                prompt = list(event[1])
            output += event[0]
            text += event[2]
        if not output:
            output = self._tokens.encode(text) or []
        return prompt if prompt is not None else self._tokens.prompt_ids(passed.asked), output, text

    def shadow(self) -> dict[str, Any]:
        """The estimate so far."""
        after = {proto: self.total_s - seconds for proto, seconds in self.saved.items()}
        speedups = {proto: self.total_s / left for proto, left in after.items() if left > 0}
        rounded = {proto: round(seconds, 3) for proto, seconds in self.saved.items()}
        return {
            "answers": self.num_answers,
            "plain_seconds": round(self.total_s, 3),
            "saved_seconds": rounded,
            "speedup": {proto: round(value, 3) for proto, value in speedups.items()},
        }


def _events(passed: Passed) -> list[tuple[tuple[int, ...], tuple[int, ...] | None, str]]:
    """(output ids, prompt ids if stated, text) of each part of an answer of one choice; tool calls are text too."""
    if passed.is_stream:
        pieces = [read_event(raw) for raw in EventSplitter().feed(passed.body)]
        return [(p.token_ids, p.prompt_ids, p.text + _arguments(p.event, "delta")) for p in pieces]
    try:
        whole = json.loads(passed.body)
        (choice,) = whole["choices"]
        ids, prompt = choice.get("token_ids"), choice.get("prompt_token_ids") or whole.get("prompt_token_ids")
        text = choice["text"] if "text" in choice else (choice.get("message") or {}).get("content")
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    return [(tuple(ids or ()), None if prompt is None else tuple(prompt), (text or "") + _arguments(whole, "message"))]


def _arguments(event: Mapping[str, Any] | None, part: str) -> str:
    """What a call of tools says, which repeats like any text."""
    try:
        calls = ((event or {})["choices"][0].get(part) or {}).get("tool_calls") or []
        return "".join(call.get("function", {}).get("arguments") or "" for call in calls)
    except (KeyError, IndexError, TypeError, AttributeError):
        return ""
