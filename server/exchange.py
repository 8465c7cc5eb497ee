"""Between the event loop and the engine's thread: who waits for which request's updates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from specdec.server.worker import EngineWorker, Job, Update

__all__ = ["Mailboxes", "conversation"]


class Mailboxes:
    """Hands every update to the coroutine that waits for its request.

    Args:
        loop: the event loop; all methods but ``deliver`` are called on it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._boxes: dict[str, asyncio.Queue[Update]] = {}

    def open(self, request_ids: Sequence[str]) -> asyncio.Queue[Update]:
        """One box for several requests."""
        box: asyncio.Queue[Update] = asyncio.Queue()
        self._boxes.update((request_id, box) for request_id in request_ids)
        return box

    def close(self, request_ids: Sequence[str]) -> None:
        """Updates of these requests are dropped from now on."""
        for request_id in request_ids:
            self._boxes.pop(request_id, None)

    def deliver(self, updates: Sequence[Update]) -> None:
        """Hand over the updates of one step; from the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._sort, updates)

    def _sort(self, updates: Sequence[Update]) -> None:
        for update in updates:
            box = self._boxes.get(update.request_id)
            if box is not None:
                box.put_nowait(update)


@asynccontextmanager
async def conversation(
    worker: EngineWorker, mailboxes: Mailboxes, jobs: Sequence[Job], *, deadline_s: float | None
) -> AsyncIterator[AsyncIterator[tuple[int, Update]]]:
    """Submit jobs and iterate over (index of the job, update) until all are done.

    Leaving the block, for whatever reason, ends what is still running: a client that goes away costs one more step.

    Args:
        worker: runs the jobs.
        mailboxes: where their updates arrive.
        jobs: all or none are taken.
        deadline_s: seconds for all of them.

    Raises:
        Overloaded, Draining: nothing was submitted.
        TimeoutError: from the iterator, when the deadline has passed.
    """
    ids = [job.request.request_id for job in jobs]
    index = {request_id: row for row, request_id in enumerate(ids)}
    live = set(ids)
    box = mailboxes.open(ids)

    async def updates() -> AsyncIterator[tuple[int, Update]]:
        async with asyncio.timeout(deadline_s):
            while live:
                update = await box.get()
                if update.finish_reason is not None:
                    live.discard(update.request_id)
                yield index[update.request_id], update

    try:
        worker.submit(jobs)
        yield updates()
    finally:
        mailboxes.close(ids)
        for request_id in live:
            worker.cancel(request_id)
