"""A scripted server of one text and a sidecar before it, in step: how fast the machine is changes nothing.

The server says the next token of a client's stream only when the sidecar has dealt with the one before, and when every
branch that the sidecar opened there has its first token or was refused. The sidecar takes the server's pace as given.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from specdec.server.sidecar.app import Sidecar
from specdec.server.sidecar.gates import Budget, BudgetOptions, LoadGate
from specdec.server.sidecar.options import RelayOptions
from specdec.server.sidecar.plan import PlanOptions, Timing
from specdec.server.sidecar.service import SpeedOptions
from specdec.server.sidecar.tokens import Tokens
from tests.server.sidecar.rig import chunked, exchange, front, piece, request, sse, upstream

__all__ = [
    "ANSWER",
    "PLAN",
    "PROMPT",
    "ROOMY",
    "Reciter",
    "Words",
    "accelerated",
    "asking",
    "both",
    "counts",
    "prompt_of",
    "say",
    "steady",
]

PROMPT = [1, 2, 3]
ANSWER = [10 + i % 90 for i in range(120)]  # a recitation: token i follows from the tokens before it
PLAN = PlanOptions(max_branches=3, max_draft=96, min_segment=4, min_probability=0.2, min_gain_s=0.0)
ROOMY = BudgetOptions(ratio=10.0, burst=100_000, max_branches=64, max_branches_per_tenant=64)
PROBE = 8  # tokens of a probe at most


class Words:
    """The tokenizer of what is said."""

    all_special_ids = (7,)

    def decode(self, ids, **_):
        return say(ids)


class Steady(Timing):
    """The pace is as given."""

    num_opened = 0

    def saw_gap(self, seconds, num_tokens):
        pass

    def saw_open(self, seconds):
        self.num_opened += 1


class Counting(Budget):
    """Counts what was launched and what clients received."""

    num_launched = num_received = 0

    def earn(self, tenant, num_tokens):
        self.num_received += num_tokens
        super().earn(tenant, num_tokens)

    def spend(self, tenant, num_branches, num_tokens):
        may = super().spend(tenant, num_branches, num_tokens)
        self.num_launched += num_branches if may else 0
        return may


def steady(sidecar, *, step_s=0.004, open_s=0.004, budget=ROOMY):
    """Make a sidecar that has started take this pace as given."""
    shop = sidecar.speed.shop
    shop.timing = Steady(step_s=step_s, open_s=open_s)
    shop.gate = LoadGate(shop.timing, max_own_inflation=1e9)
    shop.budget = Counting(budget)


@dataclass
class Reciter:
    """A server of one text, with token ids: what it says is a function of the prompt's ids alone.

    Args:
        joins: tokens per event of client's streams.
        traps: number of the continuation -> what goes wrong with it.
        shape: how `token_ids` look when nobody asks.
        lag: turns of the event loop per token of a continuation.
    """

    joins: int = 1
    traps: dict[int, str] = field(default_factory=dict)
    shape: str = "absent"
    answer: list[int] = field(default_factory=lambda: list(ANSWER))
    lag: int = 0
    sidecar: Sidecar | None = None
    continuations: int = 0
    unopened: int = 0  # of the branches of the present stream: refused, or held back

    async def __call__(self, asked, writer):
        if asked.target == "/v1/models":
            return self.whole(writer, {"data": [{"id": "m", "owned_by": "vllm", "max_model_len": 4096}]})
        if asked.method == "GET":
            return self.whole(writer, {"version": "0.33.0"})
        if not asked.target.endswith("completions"):
            return self.whole(writer, {"error": "not found"}, status=404)
        body = asked.json
        done = len(prompt_of(body)) - len(PROMPT)
        trap = None
        if done and body["max_tokens"] > PROBE:
            self.continuations += 1
            trap = self.traps.get(self.continuations)
        if trap in ("hang up", "429", "503", "400", "slow"):
            self.unopened += 1
        if trap == "hang up":
            return writer.close()
        if trap in ("429", "503", "400"):
            return self.whole(writer, {"error": trap}, status=int(trap))
        if trap == "slow":  # until whoever asked has gone
            await asyncio.sleep(60)
        if not body.get("stream"):
            return self.whole(writer, self.answered(body, done))
        writer.write(chunked("200 OK", "Content-Type: text/event-stream"))
        await self.events(writer, body, done, trap)
        writer.write(b"0\r\n\r\n")

    def whole(self, writer, value, status=200):
        raw = json.dumps(value).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(raw)) + raw)

    def text(self, body, done):
        """What it will have said in all, given the request."""
        if prompt_of(body)[len(PROMPT) :] != self.answer[:done]:
            return self.answer[:done] + [7] * len(self.answer)  # behind what was never said comes something else
        return self.answer

    def answered(self, body, done):
        ids = self.text(body, done)[done : done + body["max_tokens"]]
        own = {"message": {"role": "assistant", "content": say(ids)}} if "messages" in body else {"text": say(ids)}
        choice = {"index": 0, **own, "logprobs": None, "finish_reason": "length", "stop_reason": None}
        count = {"prompt_tokens": len(PROMPT) + done, "completion_tokens": len(ids)}
        return {"id": "x", "object": "whole", "created": 7, "model": "m", "choices": [choice], "é": 1,
                "usage": {**count, "total_tokens": sum(count.values())}}  # fmt: skip

    async def events(self, writer, body, done, trap):
        ids = self.text(body, done)[done : done + body["max_tokens"]]
        wants = body.get("return_token_ids", False)
        in_step = wants and not done and body["max_tokens"] > PROBE
        before = self.begin() if in_step else 0
        step = self.joins if not done else 1
        for at in range(0, len(ids), step):
            for _ in range(self.lag if done else 0):
                await asyncio.sleep(0)
            if trap == "reset" and at > 3:
                return writer.transport.abort()
            if trap == "short" and at > 3:
                return None
            if trap == "garbage" and at == 3:
                writer.write(piece(b"data: {half\n\n"))
            raw = sse(self.event(body, ids[at : at + step], done, is_first=not at, is_last=at + step >= len(ids)))
            for part in (raw[:9], raw[9:]) if trap == "split" else (raw,):
                writer.write(piece(part))
                await writer.drain()
            if in_step:
                await self.dealt_with(before + min(at + step, len(ids)))
        if (body.get("stream_options") or {}).get("include_usage"):
            count = {"prompt_tokens": len(PROMPT) + done, "completion_tokens": len(ids)}
            usage = {**count, "total_tokens": sum(count.values())}
            writer.write(piece(sse({"id": "x", "created": 7, "model": "m", "choices": [], "usage": usage, "é": 1})))
        if trap != "no done":
            writer.write(piece(sse("[DONE]")))

    def event(self, body, some, done, *, is_first, is_last):
        wants = body.get("return_token_ids", False)
        choice = {"index": 0, **({"delta": {"content": say(some)}} if "messages" in body else {"text": say(some)}),
                  "finish_reason": "length" if is_last else None}  # fmt: skip
        if wants or self.shape == "null":
            choice["token_ids"] = some if wants else None
            choice["prompt_token_ids"] = PROMPT + self.answer[:done] if wants and is_first else None
        choice = {k: v for k, v in choice.items() if v is not None or self.shape == "null" or k == "finish_reason"}
        return {"id": "x", "created": 7, "model": "m", "choices": [choice], "é": 1}

    def begin(self):
        """A client's stream begins; tokens that clients received before it."""
        if self.sidecar is None:
            return 0
        self.unopened = 0
        shop = self.sidecar.speed.shop
        shop.budget.num_launched = shop.timing.num_opened = 0
        return shop.budget.num_received

    async def dealt_with(self, num_tokens):
        """Wait until the sidecar has taken so many tokens, and its branches are open or never will be."""
        if self.sidecar is None:
            return
        shop = self.sidecar.speed.shop
        while self.sidecar.num_in_flight and (
            shop.budget.num_received < num_tokens or shop.timing.num_opened + self.unopened < shop.budget.num_launched
        ):
            await asyncio.sleep(0)


def prompt_of(body):
    """The ids of a request's prompt; a text or a chat has the one prompt."""
    prompt = body.get("prompt", PROMPT)
    return PROMPT if isinstance(prompt, str) or not isinstance(prompt[0], int) else prompt


def say(ids):
    return "".join(f"<{i}é🦎>" for i in ids)


def asking(**more):
    body: dict[str, Any] = {"model": "m", "max_tokens": len(ANSWER), "stream": True, "temperature": 0, **more}
    if "messages" not in body:
        body.setdefault("prompt", PROMPT)
    target = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return request(body, target=target, headers=("Authorization: Bearer k", "Content-Type: application/json"))


def accelerated(server, ask, *, mode="grid", plan=PLAN, known=None, tokenizer=None, **options):
    """What ``ask(url, upstream, sidecar)`` returns before a sidecar that knows a text already."""

    async def main():
        async with upstream(server) as up:
            speed = SpeedOptions(mode=mode, plan=plan, budget=ROOMY, is_single_tenant=True, **options)
            sidecar = Sidecar(RelayOptions(up.url), speed, tokens=Tokens(tokenizer))
            async with front(sidecar) as url:
                steady(sidecar)
                server.sidecar = sidecar
                cache = sidecar.speed.shop.cache
                for number in range(3 if known is not None else 0):
                    cache.insert(f"k{number}", np.array([*PROMPT, *known], np.int32), tenant="single")
                return await ask(url, up, sidecar)

    return asyncio.run(main())


def both(raw):
    """The same request, plain and through the sidecar."""

    async def ask(url, up, sidecar):
        plain = await exchange(up.url, raw)
        return plain, await exchange(url, raw), sidecar, up

    return ask


def counts(sidecar):
    """Branches by what became of them."""
    samples = next(iter(sidecar.metrics.attempts.collect())).samples
    found: dict[str, int] = {}
    for sample in samples:
        if sample.name.endswith("_total"):
            result = sample.labels["result"]
            found[result] = found.get(result, 0) + int(sample.value)
    return found
