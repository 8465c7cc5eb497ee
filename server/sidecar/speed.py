"""Acceleration of one request over HTTP: the client's own stream, branches beside it, and one way to write both."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import aiohttp

from specdec.server.sidecar.drafting import Drafting, Shop
from specdec.server.sidecar.events import EventSplitter, Framing, Piece, client_usage, read_event, restore
from specdec.server.sidecar.pace import Pace, Written
from specdec.server.sidecar.plan import Timing
from specdec.server.sidecar.probe import Capabilities
from specdec.server.sidecar.requests import Continuable
from specdec.server.sidecar.rounds import Rounds
from specdec.server.sidecar.splice import Spliced, Splicer, Stream, StreamBroken
from specdec.server.sidecar.tokens import TextCutter, Tokens
from specdec.server.sidecar.upstream import Question, Unreachable, Upstream
from specdec.server.sidecar.verify import Verdict, ask_verdict
from specdec.server.sidecar.whole import Misfit, Parts, WholeShape

__all__ = ["EventStream", "HttpOpener", "Run"]

_BUSY = (429, 503)


class EventStream:
    """The events of an answer (`specdec.server.sidecar.splice.Stream`).

    Args:
        answer: its head is there.
        idle_s: longest pause between two pieces.
        owner: closes the answer.
    """

    def __init__(self, answer: aiohttp.ClientResponse, idle_s: float, owner: AsyncExitStack) -> None:
        self._answer, self._idle_s, self._owner = answer, idle_s, owner
        self._splitter = EventSplitter()
        self._waiting: deque[bytes] = deque()
        self._is_done = False

    async def next(self) -> Piece | None:
        while not self._waiting:
            if self._is_done:
                return None
            try:
                async with asyncio.timeout(self._idle_s):
                    data = await self._answer.content.readany()
            except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
                raise StreamBroken(f"the upstream's stream broke: {type(error).__name__}") from error
            self._is_done = not data
            self._waiting.extend(self._splitter.feed(data))
            if self._is_done and self._splitter.rest:
                self._waiting.append(self._splitter.rest)
        return read_event(self._waiting.popleft())

    async def close(self) -> None:
        await self._owner.aclose()


@dataclass(slots=True)
class HttpOpener:
    """Continues one request by asking the upstream anew (`specdec.server.sidecar.splice.Opener`).

    Args:
        upstream: the one.
        question: the client's; its headers go along, its key included.
        plan: how to continue it.
        shop: for timing and the gate.
        extra: further fields, such as a cache salt.
        prompt_ids: filled when the client's stream tells them.
    """

    upstream: Upstream
    question: Question
    plan: Continuable
    shop: Shop
    extra: dict[str, Any]
    prompt_ids: tuple[int, ...] = ()

    async def open(self, output_ids: Sequence[int]) -> Stream:
        body: dict[str, Any] = {
            **self.plan.sampling, **self.extra, "prompt": [*self.prompt_ids, *output_ids],
            "max_tokens": self.plan.limit - len(output_ids), "stream": True, "return_token_ids": True,
        }  # fmt: skip
        if self.plan.has_usage:
            body["stream_options"] = {"include_usage": True}
        if self.plan.seed is not None:
            body["seed"] = self.plan.seed
        target = self.question.target.replace("/chat/completions", "/completions")
        question = Question("POST", target, self.question.headers, json.dumps(body, separators=(",", ":")).encode())
        owner = AsyncExitStack()
        sent = perf_counter()
        try:
            answer = await owner.enter_async_context(self.upstream.ask(question, is_extra=True))
            if answer.status != 200:
                if answer.status in _BUSY:
                    self.shop.gate.refused()
                raise StreamBroken(f"the upstream answered a continuation with {answer.status}")
        except Unreachable as error:
            await owner.aclose()
            raise StreamBroken(str(error)) from error
        except BaseException:
            await owner.aclose()
            raise
        self.shop.metrics.wasted.labels("prefill").inc(len(output_ids))
        stream = EventStream(answer, self.upstream.options.timeouts.idle_s, owner)
        return _Opened(stream, sent, self.shop.timing)


class _Opened:
    """A continuation that notes when its first token came, and breaks if it ends without its end."""

    def __init__(self, stream: EventStream, sent: float, timing: Timing) -> None:
        self._stream, self._sent, self._timing = stream, sent, timing
        self._has_token = self._has_end = False

    async def next(self) -> Piece | None:
        piece = await self._stream.next()
        if piece is None:
            if not self._has_end:
                raise StreamBroken("a continuation ended without its end")
            return None
        if piece.is_odd:
            raise StreamBroken("a continuation says something that we do not understand")
        if piece.token_ids and not self._has_token:
            self._has_token = True
            self._timing.saw_open(perf_counter() - self._sent)
        self._has_end |= piece.finish_reason is not None
        return piece

    async def close(self) -> None:
        await self._stream.close()


class _Base:
    """The client's own stream, watched: its framing is learned, its speed measured, its prompt taken over."""

    def __init__(self, stream: EventStream, run: Run) -> None:
        self._stream, self._run = stream, run
        self._last: float | None = None
        self._was_crowded = False

    async def next(self) -> Piece | None:
        piece = await self._stream.next()
        if piece is None:
            return None
        run = self._run
        run.framing.learn(piece)
        if piece.prompt_ids and not run.opener.prompt_ids:
            run.opener.prompt_ids = piece.prompt_ids
            run.drafting.begin(piece.prompt_ids)
        if piece.token_ids:
            now = perf_counter()
            if self._last is not None:
                run.shop.saw_gap(now - self._last, len(piece.token_ids), was_crowded=self._was_crowded)
            self._last, self._was_crowded = now, run.shop.is_crowded
        return piece

    async def close(self) -> None:
        await self._stream.close()


class Run:
    """One accelerated request from the head of its answer on.

    Args:
        shop: shared.
        opener: of continuations.
        framing: of the client's stream.
        drafting: the accounts.
        tokens: to cut events.
        capabilities: of the upstream.
        contradicted: drafts are verified by the upstream's scores; called when a stream says other than these. None:
            branches are opened instead.
        pace: at which events leave; None: as they come.
    """

    def __init__(
        self, shop: Shop, opener: HttpOpener, framing: Framing, drafting: Drafting, tokens: Tokens,
        capabilities: Capabilities, *, contradicted: Callable[[], None] | None = None, pace: Pace | None = None,
    ) -> None:  # fmt: skip
        self.shop, self.opener, self.framing, self.drafting = shop, opener, framing, drafting
        self._cutter = TextCutter(tokens)
        self._hidden = tokens.special_ids | set(opener.plan.sampling.get("stop_token_ids", ()))
        self._capabilities = capabilities
        self._contradicted, self._pace = contradicted, pace
        self.output_ids: list[int] = []

    def _spliced(self, base: Stream) -> AsyncGenerator[Spliced, None]:
        if self._contradicted is None:
            return Splicer(base, self.opener, self.drafting, split=self._split).pieces()
        return Rounds(
            base, self.opener, self.drafting, verify=self._verdict, show=self._show, split=self._split,
            is_worth=self._is_worth, contradicted=self._contradicted,
        ).pieces()  # fmt: skip

    async def _verdict(self, output_ids: Sequence[int], draft: Sequence[int]) -> Verdict | None:
        opener, able, sent = self.opener, self._capabilities, perf_counter()
        assert able.verifies is not None
        verdict = await ask_verdict(
            opener.upstream, opener.question, able.verifies, opener.plan.sampling.get("model"),
            [*opener.prompt_ids, *output_ids], draft, salt=opener.extra.get("cache_salt"),
            has_start=able.kind == "specdec",
        )  # fmt: skip
        self.shop.metrics.wasted.labels("prefill").inc(len(draft))
        if verdict is not None:
            self.shop.timing.saw_open(perf_counter() - sent)
        return verdict

    def _show(self, token_ids: Sequence[int]) -> Sequence[Piece]:
        """What may be shown ahead of the upstream; it says the last token itself, since that ends the answer."""
        room = self.opener.plan.limit - 1 - len(self.output_ids)
        return self._cutter.shown(token_ids[: max(0, room)], self._hidden)

    def _is_worth(self, num_tokens: int) -> bool:
        timing = self.shop.timing
        return timing.step_s is not None and (num_tokens - 1) * timing.step_s > timing.open_s

    async def pieces(self, answer: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """What the client gets, event by event or at the pace.

        Raises:
            StreamBroken: the answer ends without its end.
        """
        if self._pace is not None:
            async with aclosing(self._pace.paced(self._events(answer))) as releases:
                async for release in releases:
                    yield release
            return
        async with aclosing(self._events(answer)) as events:
            async for data, _ in events:
                if data:
                    yield data

    async def _events(self, answer: aiohttp.ClientResponse) -> AsyncGenerator[Written, None]:
        async with aclosing(self._walk(answer)) as walk:
            async for spliced in walk:
                yield self._written(spliced), len(spliced.piece.token_ids)

    async def whole(self, answer: aiohttp.ClientResponse, shape: WholeShape) -> bytes:
        """The same as one answer that is not streamed.

        Raises:
            StreamBroken: the answer ends without its end.
            Misfit: it does not fit the shape.
        """
        parts = Parts()
        async with aclosing(self._walk(answer)) as walk:
            async for spliced in walk:
                told = (spliced.piece.event or {}).get("usage") if spliced.start else None
                usage = client_usage(told, len(self.opener.prompt_ids), spliced.start) if told else None
                parts.take(spliced.piece, usage)
                if self.framing.is_odd:
                    raise Misfit("an event that is not understood")
        return shape.write(parts)

    async def _walk(self, answer: aiohttp.ClientResponse) -> AsyncGenerator[Spliced, None]:
        base = EventStream(answer, self.opener.upstream.options.timeouts.idle_s, AsyncExitStack())
        try:
            async with aclosing(self._spliced(_Base(base, self))) as pieces:
                async for spliced in pieces:
                    yield spliced
                    if spliced.piece.token_ids:
                        self._cutter.extend(spliced.piece.token_ids)
                        self.output_ids += spliced.piece.token_ids
        finally:
            self.drafting.close()

    def _split(self, piece: Piece, count: int) -> Piece | None:
        return self._cutter.cut(piece, count) if self.framing.can_write else None

    def _written(self, spliced: Spliced) -> bytes:
        piece = spliced.piece
        is_hidden = not piece.text and bool(piece.token_ids) and piece.finish_reason is None
        if is_hidden and self._capabilities.drops_empty:
            return b""
        if piece.event is None and piece.token_ids:
            return self.framing.write_text(piece.text)
        is_cut = piece.event is not None and len(_stated(piece)) != len(piece.token_ids)
        if spliced.start == 0 and not is_cut:
            return restore(piece.raw, self.framing.shapes)
        if is_cut and piece.finish_reason is None:
            return self.framing.write_text(piece.text)
        return self.framing.write(piece, prompt_tokens=len(self.opener.prompt_ids), earlier_tokens=spliced.start)


def _stated(piece: Piece) -> tuple[int, ...]:
    """The token ids of the event that the piece came from, which may be more than it kept."""
    return read_event(piece.raw).token_ids
