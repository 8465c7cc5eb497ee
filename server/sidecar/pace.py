"""A steady pace for an accelerated stream, so that its packets do not tell which tokens were foreseen.

Tokens that a branch or a verification brings are there at once, while others come one step at a time. Who sees packets'
times and sizes reads from that which text was foreseen, hence what the store holds (2411.01076). Here events leave on
the ticks of a clock that starts with the first of them, a fixed number of tokens at each; what is early waits, and a
tick for which too few are there passes unused. Events are never altered, reordered or cut.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from prometheus_client import Counter

from specdec.errors import ConfigError

__all__ = ["Pace", "PaceOptions", "Written"]

Written = tuple[bytes, int]  # an event as the client gets it, and how many tokens it brings

_MAX_QUEUED = 1024  # events that wait; then the stream is not read any more
_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class PaceOptions:
    """The pace of accelerated streams.

    Args:
        tick_s: seconds between two releases.
        num_tokens: of each release; the last of a stream may be smaller.
    """

    tick_s: float
    num_tokens: int = 1

    def __post_init__(self) -> None:
        if not 0.001 <= self.tick_s <= 10:
            raise ConfigError(f"shaping needs a tick of 1 to 10000 ms, got {self.tick_s * 1e3:g} ms")
        if not 1 <= self.num_tokens <= _MAX_TOKENS:
            raise ConfigError(f"shaping needs 1 to {_MAX_TOKENS} tokens per release, got {self.num_tokens}")


@dataclass(slots=True)
class Pace:
    """Releases streams at one pace.

    Args:
        options: see ``PaceOptions``.
        released: counts releases.
        starved: counts ticks that passed unused, each of which an observer can see.
    """

    options: PaceOptions
    released: Counter
    starved: Counter
    num_released: int = field(default=0, init=False)
    num_starved: int = field(default=0, init=False)

    def table(self) -> dict[str, float | int]:
        """For ``/health``."""
        own = self.options
        return {"tick_ms": own.tick_s * 1e3, "tokens": own.num_tokens, "releases": self.num_released,
                "starved_ticks": self.num_starved}  # fmt: skip

    async def paced(self, events: AsyncGenerator[Written, None]) -> AsyncGenerator[bytes, None]:
        """The same bytes in releases. Leaving early closes ``events``, and so does the end.

        What comes before the first token passes at once: nothing is foreseen until then.

        Raises:
            Exception: whatever ``events`` raised, when all that came before it was released.
        """
        source = _Ahead(events)
        try:
            while (event := await source.next()) is not None:
                if event[0]:
                    yield event[0]
                if event[1]:
                    break
            due = asyncio.get_running_loop().time()
            while not source.is_over:
                due = await self._tick(due)
                release = source.take(self.options.num_tokens)
                if release is None:
                    self.num_starved += 1
                    self.starved.inc()
                elif release:
                    self.num_released += 1
                    self.released.inc()
                    yield release
            await source.settle()
        finally:
            await source.close()

    async def _tick(self, last: float) -> float:
        """Wait for the next tick. A client that was slow has missed some; they are not made up for."""
        now, tick_s = asyncio.get_running_loop().time(), self.options.tick_s
        due = last + tick_s * max(1, int((now - last) / tick_s) + 1)
        await asyncio.sleep(due - now)
        return due


class _Ahead:
    """Reads events before they are due.

    Args:
        events: closed at the end.
    """

    def __init__(self, events: AsyncGenerator[Written, None]) -> None:
        self._queue: asyncio.Queue[Written | None] = asyncio.Queue(_MAX_QUEUED)
        self._waiting: deque[Written] = deque()
        self._num_waiting = 0  # tokens
        self._has_ended = False
        self._task = asyncio.ensure_future(self._read(events))

    async def _read(self, events: AsyncGenerator[Written, None]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    await self._queue.put(event)
        finally:
            if not self._task.cancelling():
                await self._queue.put(None)

    async def next(self) -> Written | None:
        """The next event, when it comes; None behind the last one."""
        event = await self._queue.get()
        self._has_ended = event is None
        return event

    @property
    def is_over(self) -> bool:
        """All was taken."""
        return self._has_ended and not self._waiting

    def take(self, num_tokens: int) -> bytes | None:
        """Events with so many tokens, or the rest of a stream that ended; None if there are not enough yet."""
        while self._num_waiting < num_tokens and not self._has_ended and not self._queue.empty():
            event = self._queue.get_nowait()
            if event is None:
                self._has_ended = True
            else:
                self._waiting.append(event)
                self._num_waiting += event[1]
        if self._num_waiting < num_tokens and not self._has_ended:
            return None
        parts, taken = list[bytes](), 0
        while self._waiting and taken < num_tokens:
            data, count = self._waiting.popleft()
            parts.append(data)
            taken += count
        self._num_waiting -= taken
        return b"".join(parts)

    async def settle(self) -> None:
        """Raise what ended the stream, if it was no proper end."""
        await self._task

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
