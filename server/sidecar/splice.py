"""The segment rule: beside the client's stream, continuations that start where a draft would end.

The client's own request is the *base* stream; its pieces go out as they come. A *branch* is the same request continued
from the prompt and a part of the draft. When the current stream has itself produced the draft up to a branch's offset,
the branch takes over, always; what it produced meanwhile is there at once. One branch is a race, several are a grid.

Why the law of the output is that of the plain stream, whatever the sampler: a branch's tokens are drawn from the true
law given the prompt and the draft, independently of the base stream, and they are used on the event that the base
stream's tokens *are* that draft. The choice may depend on the draft and on failures, never on what either stream
produced beyond the offset: not on length, quality, or which was first. Where an event of the current stream crosses an
offset, its tokens beyond the offset are therefore discarded. To keep them instead, because the event's text cannot be
cut, is such a choice: then the branch result is ``uncut``, and who keeps the accounts must not guess for sampled
requests any more.

Source: the sample-match rule (a deterministic draft's case of Leviathan et al. 2023), run in parallel as in Distributed
Speculative Inference (2405.14105).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from specdec.server.sidecar.events import Piece

__all__ = ["Guess", "Guesser", "Opener", "Spliced", "Splicer", "Stream", "StreamBroken"]

_MAX_QUEUED = 1024  # events of a branch that wait; then its connection is not read any more


class StreamBroken(Exception):
    """A stream ended without its end."""


class Stream(Protocol):
    """Events of one upstream request."""

    async def next(self) -> Piece | None:
        """The next event; None behind the last one.

        Raises:
            StreamBroken: there will be no more, although the answer is not complete.
        """
        ...

    async def close(self) -> None:
        """Stop the request."""
        ...


class Opener(Protocol):
    """Starts continuations of one request."""

    async def open(self, output_ids: Sequence[int]) -> Stream:
        """The request continued behind its prompt and these output tokens, with randomness of its own.

        Raises:
            StreamBroken: the upstream does not take it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Guess:
    """A draft and where its branches start.

    Args:
        token_ids: behind the current position, up to the last offset.
        offsets: of the branches, ascending, from the current position; empty: nothing to launch.
    """

    token_ids: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()


class Guesser(Protocol):
    """Drafts for one request, and keeps the accounts of its branches."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """The client received tokens."""
        ...

    def guess(self) -> Guess:
        """What to launch now. What it launches is settled by ``ended``, once for each branch."""
        ...

    def ended(self, result: str, *, num_ready: int, num_wasted: int) -> None:
        """A branch ended: ``adopted`` with so many tokens ready, or dropped.

        Args:
            result: else ``miss`` (the draft was wrong), ``late``, ``failed``, ``unclean`` (a character is incomplete
                there), ``uncut``, or ``end`` (of the request).
            num_ready: tokens that were there at once.
            num_wasted: tokens that nobody saw.
        """
        ...


@dataclass(frozen=True, slots=True)
class Spliced:
    """A piece of the client's stream.

    Args:
        piece: as its stream gave it.
        start: output tokens that stood before that stream's first; 0 for the base stream.
    """

    piece: Piece
    start: int


class _Branch:
    """A continuation that runs in the background."""

    def __init__(self, opener: Opener, output_ids: Sequence[int]) -> None:
        self.offset = len(output_ids)
        self.num_ready = 0
        self.is_open = self.has_failed = False
        self._queue: asyncio.Queue[Piece | None] = asyncio.Queue(_MAX_QUEUED)
        self._task = asyncio.ensure_future(self._fill(opener, list(output_ids)))

    async def _fill(self, opener: Opener, output_ids: list[int]) -> None:
        stream: Stream | None = None
        try:
            stream = await opener.open(output_ids)
            self.is_open = True
            while (piece := await stream.next()) is not None:
                self.num_ready += len(piece.token_ids)
                await self._queue.put(piece)
        except StreamBroken:
            self.has_failed = True
        finally:
            if stream is not None:
                await stream.close()
        await self._queue.put(None)

    async def next(self) -> Piece | None:
        piece = await self._queue.get()
        if piece is None and self.has_failed:
            raise StreamBroken("a branch broke off")
        return piece

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class Splicer:
    """One client's stream, spliced together from the base stream and its branches.

    Args:
        base: the client's own request, already under way.
        opener: starts branches.
        guesser: drafts.
        split: (piece, n) -> the piece with its first n tokens only, or None if it cannot be cut there.
    """

    def __init__(
        self,
        base: Stream,
        opener: Opener,
        guesser: Guesser,
        *,
        split: Callable[[Piece, int], Piece | None],
    ) -> None:
        self._current: Stream = base
        self._opener, self._guesser, self._split = opener, guesser, split
        self._has_reopened = False
        self._start = 0
        self._output: list[int] = []
        self._expected: tuple[int, ...] = ()  # behind the output, while there are branches
        self._branches: deque[_Branch] = deque()
        self._closing: set[asyncio.Task[None]] = set()
        self._may_guess = True

    async def pieces(self) -> AsyncGenerator[Spliced, None]:
        """The client's stream. Leaving it early closes everything that is under way.

        Raises:
            StreamBroken: the current stream broke, and could not be opened again.
        """
        try:
            while (piece := await self._next()) is not None:
                kept = self._kept(piece)
                yield Spliced(kept, self._start)
                self._took(kept)
                if piece.finish_reason is not None:
                    self._drop_branches("end")
                    self._may_guess = False
                elif self._may_guess and not self._branches:
                    self._launch()
        finally:
            self._drop_branches("end")
            self._retire(self._current)
            await asyncio.gather(*self._closing, return_exceptions=True)

    async def _next(self) -> Piece | None:
        try:
            return await self._current.next()
        except StreamBroken:
            if self._start == 0 or self._has_reopened:
                raise
        # A branch broke after the base stream was let go: the same request continued once more has the same law.
        self._retire(self._current)
        self._drop_branches("end")
        self._may_guess, self._has_reopened = False, True
        self._current, self._start = await self._opener.open(self._output), len(self._output)
        return await self._current.next()

    def _kept(self, piece: Piece) -> Piece:
        """The piece, cut where the next branch begins if it crosses that; branches that it refutes are dropped."""
        if piece.is_odd:
            self._drop_branches("end")
            self._may_guess = False
        if not self._branches:
            return piece
        room = self._branches[0].offset - len(self._output)
        ids = piece.token_ids[:room]
        if ids != self._expected[: len(ids)]:
            self._drop_branches("miss")
            return piece
        if len(piece.token_ids) <= room:
            return piece
        cut = self._split(piece, room)
        if cut is None:
            self._drop_branches("uncut")
            return piece
        return cut

    def _took(self, piece: Piece) -> None:
        """Account for tokens that the client has; let the next branch take over if its offset is reached."""
        ids = piece.token_ids
        self._output += ids
        self._expected = self._expected[len(ids) :]
        if ids:
            self._guesser.extend(ids)
        if not self._branches or len(self._output) < self._branches[0].offset or piece.finish_reason is not None:
            return
        branch = self._branches.popleft()
        # Whether the upstream has answered yet says nothing about what it answers, and whether a character is complete
        # behind the draft is a matter of the draft.
        is_clean = piece.text and not piece.text.endswith("\ufffd")
        if branch.has_failed or not branch.is_open or not is_clean:
            self._end(branch, "failed" if branch.has_failed else "unclean" if branch.is_open else "late")
            return
        self._guesser.ended("adopted", num_ready=branch.num_ready, num_wasted=0)
        self._retire(self._current)
        self._current, self._start = branch, branch.offset

    def _launch(self) -> None:
        guess = self._guesser.guess()
        if not guess.offsets:
            return
        self._expected = guess.token_ids
        for offset in guess.offsets:
            self._branches.append(_Branch(self._opener, [*self._output, *guess.token_ids[:offset]]))

    def _end(self, branch: _Branch, result: str) -> None:
        self._guesser.ended(result, num_ready=0, num_wasted=branch.num_ready)
        self._retire(branch)

    def _drop_branches(self, result: str) -> None:
        while self._branches:
            self._end(self._branches.popleft(), result)
        self._expected = ()

    def _retire(self, stream: Stream) -> None:
        """Close a stream without waiting for it."""
        task = asyncio.ensure_future(stream.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
