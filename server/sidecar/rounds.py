"""Rounds: greedy drafts verified by the upstream's scores of a prompt, beside the client's stream.

The client's own stream flows on while a draft is verified. What the verdict says beyond the stream goes to the client
at once; then the request is continued from there, and whichever stream first says something new is kept. The first
stream is let go only then, so that a continuation that fails costs nothing.

Greedy decoding says one text, so it may be taken from wherever it comes first. That is the whole argument: it does not
hold for samplers, and it rests on the server's scores and steps agreeing. A stream that contradicts what its own scores
said is reported, and nothing is verified after that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace

from specdec.server.sidecar.events import Piece
from specdec.server.sidecar.splice import Guesser, Opener, Spliced, Stream, StreamBroken
from specdec.server.sidecar.verify import Verdict

__all__ = ["Rounds"]


class _Follower:
    """A stream of the request from some token on, and how far it is.

    Args:
        start: output tokens that stand before its first.
        stream: None while it is to be opened.
        opener: opens it.
        output_ids: what it continues.
    """

    def __init__(
        self, start: int, stream: Stream | None = None, opener: Opener | None = None, output_ids: Sequence[int] = ()
    ) -> None:
        self.start = self.at = start
        self._stream, self._opener, self._output_ids = stream, opener, list(output_ids)
        self._task: asyncio.Task[Piece | None] | None = None

    @property
    def task(self) -> asyncio.Task[Piece | None]:
        """Brings the next event."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._next())
        return self._task

    def take(self) -> Piece | None:
        """The event that came.

        Raises:
            StreamBroken: none will come.
        """
        task, self._task = self.task, None
        return task.result()

    async def _next(self) -> Piece | None:
        if self._stream is None:
            assert self._opener is not None
            self._stream = await self._opener.open(self._output_ids)
        return await self._stream.next()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._stream is not None:
            await self._stream.close()


class Rounds:
    """One client's greedy stream, ahead of itself wherever a draft was verified.

    Args:
        base: the client's own request, already under way.
        opener: continues it.
        guesser: drafts; each guess has one offset, the length of its draft.
        verify: (output ids, draft) -> what greedy decoding says behind them, or None if that cannot be had.
        show: the events of token ids that follow the output, as many of them as may be shown.
        split: (piece, n) -> the piece with its first n tokens only, or None.
        is_worth: so many tokens ahead pay for a continuation.
        contradicted: called when a stream says other than its server's scores.
    """

    def __init__(
        self, base: Stream, opener: Opener, guesser: Guesser, *,
        verify: Callable[[Sequence[int], Sequence[int]], Awaitable[Verdict | None]],
        show: Callable[[Sequence[int]], Sequence[Piece]],
        split: Callable[[Piece, int], Piece | None],
        is_worth: Callable[[int], bool],
        contradicted: Callable[[], None],
    ) -> None:  # fmt: skip
        self._opener, self._guesser = opener, guesser
        self._verify, self._show, self._split = verify, show, split
        self._is_worth, self._contradicted = is_worth, contradicted
        self._followers = [_Follower(0, base)]
        self._output: list[int] = []
        self._verdict: asyncio.Task[Verdict | None] | None = None
        self._from = 0  # where the draft under verification begins
        self._may_guess = True
        self._has_reopened = self._is_ahead = False
        self._closing: set[asyncio.Task[None]] = set()

    async def pieces(self) -> AsyncGenerator[Spliced, None]:
        """The client's stream. Leaving it early closes everything that is under way.

        Raises:
            StreamBroken: every stream of the request broke.
        """
        try:
            while self._followers:
                waiting: set[asyncio.Task[object]] = {follower.task for follower in self._followers}
                if self._verdict is not None:
                    waiting.add(self._verdict)
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if self._verdict is not None and self._verdict.done():
                    for piece in self._judged(self._verdict.result()):
                        yield Spliced(piece, len(self._output))
                        self._took(piece)
                for follower in list(self._followers):
                    if follower not in self._followers or not follower.task.done():
                        continue
                    new = self._read(follower)
                    if new is not None:
                        yield Spliced(new, follower.start)
                        self._took(new)
                        self._launch()
        finally:
            self._end_verdict("end")
            for follower in self._followers:
                self._retire(follower)
            await asyncio.gather(*self._closing, return_exceptions=True)

    # --- streams ------------------------------------------------------------------------------------------------------

    def _read(self, follower: _Follower) -> Piece | None:
        """What is new in a stream's next event."""
        try:
            piece = follower.take()
        except StreamBroken:
            self._lost(follower)
            return None
        behind = len(self._output) - follower.at
        if behind and (piece is None or piece.is_odd):  # it says nothing that leads to where the client is
            self._lost(follower)
            return None
        if piece is None:
            self._keep_only(None)
            return None
        if piece.is_odd:
            self._end_verdict("end")
            self._may_guess = False
        new = self._new_part(piece, behind) if behind else piece
        known = tuple(self._output[follower.at : follower.at + len(piece.token_ids)])
        if piece.token_ids[: len(known)] != known or (behind and new is None and piece.finish_reason is not None):
            self._contradicted()
            self._may_guess = False
            self._lost(follower)
            return None
        follower.at += len(piece.token_ids)
        if new is not None and (new.token_ids or new.finish_reason is not None):
            self._keep_only(follower)
        return new

    def _new_part(self, piece: Piece, behind: int) -> Piece | None:
        """An event of a stream that is behind, without the tokens that the client has."""
        if len(piece.token_ids) <= behind:
            return None
        head = self._split(piece, behind)
        text = piece.text[len(head.text) :] if head is not None else "".join(
            shown.text for shown in self._show(piece.token_ids[behind:]))  # fmt: skip
        return replace(piece, token_ids=piece.token_ids[behind:], text=text)

    def _lost(self, follower: _Follower) -> None:
        """A stream is of no more use; the last one is opened again, once, if the client is beyond its own stream.

        Raises:
            StreamBroken: there is no other.
        """
        self._followers.remove(follower)
        self._retire(follower)
        if self._followers:
            return
        if not self._is_ahead or self._has_reopened:
            raise StreamBroken("the stream broke")
        self._has_reopened, self._may_guess = True, False
        self._end_verdict("end")
        self._open()

    def _open(self) -> None:
        self._followers.append(_Follower(len(self._output), None, self._opener, self._output))

    def _keep_only(self, kept: _Follower | None) -> None:
        for follower in self._followers:
            if follower is not kept:
                self._retire(follower)
        self._followers = [] if kept is None else [kept]

    def _retire(self, follower: _Follower) -> None:
        task = asyncio.ensure_future(follower.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # --- drafts -------------------------------------------------------------------------------------------------------

    def _took(self, piece: Piece) -> None:
        self._output += piece.token_ids
        if piece.token_ids:
            self._guesser.extend(piece.token_ids)
        if piece.finish_reason is not None:
            self._end_verdict("end")
            self._may_guess = False

    def _launch(self) -> None:
        if not self._may_guess or self._verdict is not None or len(self._followers) != 1:
            return
        guess = self._guesser.guess()
        if guess.offsets:
            self._from = len(self._output)
            self._verdict = asyncio.ensure_future(self._judge(list(self._output), guess.token_ids))

    async def _judge(self, output_ids: list[int], draft: Sequence[int]) -> Verdict | None:
        return await self._verify(output_ids, draft)

    def _judged(self, verdict: Verdict | None) -> Sequence[Piece]:
        """What the client gets ahead of its stream."""
        self._verdict = None
        if verdict is None:
            self._guesser.ended("failed", num_ready=0, num_wasted=0)
            return ()
        known = self._output[self._from : self._from + len(verdict.token_ids)]
        shown = self._show(verdict.token_ids[len(known) :]) if list(verdict.token_ids[: len(known)]) == known else ()
        count = sum(len(piece.token_ids) for piece in shown)
        if not count or not self._is_worth(count):
            self._guesser.ended("miss" if not verdict.num_accepted else "late", num_ready=0, num_wasted=0)
            return ()
        self._guesser.ended("adopted", num_ready=count, num_wasted=0)
        self._is_ahead = True
        output = [*self._output, *(token for piece in shown for token in piece.token_ids)]
        self._followers.append(_Follower(len(output), None, self._opener, output))
        return shown

    def _end_verdict(self, result: str) -> None:
        if self._verdict is not None:
            self._verdict.cancel()
            self._verdict = None
            self._guesser.ended(result, num_ready=0, num_wasted=0)
