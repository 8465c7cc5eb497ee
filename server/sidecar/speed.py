"""Acceleration of one request over HTTP: the client's own stream, branches beside it, and one way to write both."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import aiohttp

from specdec.server.sidecar.drafting import Drafting, Shop
from specdec.server.sidecar.events import EventSplitter, Framing, Piece, read_event, restore
from specdec.server.sidecar.plan import Timing
from specdec.server.sidecar.probe import Capabilities
from specdec.server.sidecar.requests import Continuable
from specdec.server.sidecar.splice import Spliced, Splicer, Stream, StreamBroken
from specdec.server.sidecar.tokens import TextCutter, Tokens
from specdec.server.sidecar.upstream import Question, Unreachable, Upstream

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
    """

    def __init__(
        self, shop: Shop, opener: HttpOpener, framing: Framing, drafting: Drafting, tokens: Tokens,
        capabilities: Capabilities,
    ) -> None:  # fmt: skip
        self.shop, self.opener, self.framing, self.drafting = shop, opener, framing, drafting
        self._cutter = TextCutter(tokens)
        self._capabilities = capabilities
        self.output_ids: list[int] = []

    async def pieces(self, answer: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        """What the client gets, event by event.

        Raises:
            StreamBroken: the answer ends without its end.
        """
        base = EventStream(answer, self.opener.upstream.options.timeouts.idle_s, AsyncExitStack())
        splicer = Splicer(_Base(base, self), self.opener, self.drafting, split=self._split)
        try:
            async with aclosing(splicer.pieces()) as pieces:
                async for spliced in pieces:
                    data = self._written(spliced)
                    if spliced.piece.token_ids:
                        self._cutter.extend(spliced.piece.token_ids)
                        self.output_ids += spliced.piece.token_ids
                    if data:
                        yield data
        finally:
            self.drafting.close()

    def _split(self, piece: Piece, count: int) -> Piece | None:
        return self._cutter.cut(piece, count) if self.framing.can_write else None

    def _written(self, spliced: Spliced) -> bytes:
        piece = spliced.piece
        is_hidden = not piece.text and bool(piece.token_ids) and piece.finish_reason is None
        if is_hidden and self._capabilities.drops_empty:
            return b""
        is_cut = piece.event is not None and len(_stated(piece)) != len(piece.token_ids)
        if spliced.start == 0 and not is_cut:
            return restore(piece.raw, self.framing.shapes)
        if is_cut:
            return self.framing.write_text(piece.text)
        return self.framing.write(piece, prompt_tokens=len(self.opener.prompt_ids), earlier_tokens=spliced.start)


def _stated(piece: Piece) -> tuple[int, ...]:
    """The token ids of the event that the piece came from, which may be more than it kept."""
    return read_event(piece.raw).token_ids
