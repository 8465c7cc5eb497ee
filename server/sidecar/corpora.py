"""Learned text as a corpus of SGLang's n-gram speculation, which the server drafts from for everybody it serves.

SGLang takes corpora while it runs (``--speculative-algorithm NGRAM`` with a budget for external ones), but cannot add
to one: a new one is loaded, and when that is done the old one goes. Since all requests are drafted from it, how fast
they are answered tells what is in it: so this is for one tenant only.

Source: ``/add_external_corpus`` and ``/remove_external_corpus`` of SGLang 0.5.23.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections import deque
from typing import Any

import aiohttp
from multidict import CIMultiDict

from specdec.server.sidecar.upstream import Question, Unreachable, Upstream

logger = logging.getLogger(__name__)

__all__ = ["CorpusFeeder"]

_LEAST = 32  # characters of a text that is worth keeping


class CorpusFeeder:
    """Keeps one corpus of the latest answers at the upstream.

    Args:
        upstream: the one.
        key: bearer token for its administrative routes.
        max_chars: of a corpus; a character is at least one token, and the server's own limit is 10 million tokens.
        min_new_chars: that make it worth loading a new one.
        poll_s: seconds between two looks at what is new.
    """

    def __init__(
        self, upstream: Upstream, key: str | None, *, max_chars: int = 4_000_000, min_new_chars: int = 20_000,
        poll_s: float = 5.0,
    ) -> None:  # fmt: skip
        self._upstream, self._max_chars, self._min_new_chars, self._poll_s = upstream, max_chars, min_new_chars, poll_s
        self._headers: CIMultiDict[str] = CIMultiDict({"Authorization": f"Bearer {key}"} if key else {})
        self._headers["Content-Type"] = "application/json"
        self._texts: deque[str] = deque()  # appended by the thread that learns
        self._num_chars = self._num_new = 0
        self._names: list[str] = []  # of corpora that may be there
        self._task: asyncio.Task[None] | None = None
        self.num_loaded = 0
        self.last_error: str | None = None

    def take(self, text: str) -> None:
        """Keep an answer; the oldest ones go. From any thread."""
        if len(text) < _LEAST:
            return
        self._texts.append(text[: self._max_chars])
        self._num_chars += len(self._texts[-1])
        self._num_new += len(self._texts[-1])
        while self._num_chars > self._max_chars:
            self._num_chars -= len(self._texts.popleft())

    def start(self) -> None:
        """Begin to follow what is learned; on the event loop."""
        self._task = asyncio.ensure_future(self._work())

    async def close(self) -> None:
        """Stop, and leave nothing at the upstream."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for name in self._names:
            await self._ask("/remove_external_corpus", {"corpus_id": name})

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            if self._num_new >= self._min_new_chars:
                await self.load()

    async def load(self) -> bool:
        """Put a corpus of what is kept now in the place of the old one; True if the upstream took it."""
        documents, self._num_new = list(self._texts), 0
        name, old = f"specdec-{secrets.token_hex(8)}", list(self._names)
        self._names.append(name)
        if not await self._ask("/add_external_corpus", {"corpus_id": name, "documents": documents}):
            self._names.remove(name)
            return False
        self.num_loaded += 1
        for one in old:
            if await self._ask("/remove_external_corpus", {"corpus_id": one}):
                self._names.remove(one)
        return True

    async def _ask(self, path: str, body: Any) -> bool:
        """The server did it; why not, else, is kept and logged."""
        question = Question("POST", path, self._headers, json.dumps(body).encode())
        try:
            async with self._upstream.ask(question, is_extra=True) as answer:
                said = json.loads(await answer.read())
                if answer.status == 200 and said.get("success") is True:
                    self.last_error = None
                    return True
                self.last_error = f"{path}: {answer.status} {said.get('message', '')}"[:200]
        except (Unreachable, aiohttp.ClientError, TimeoutError, ValueError, AttributeError) as error:
            self.last_error = f"{path}: {type(error).__name__}"
        logger.warning("the upstream's corpus was not changed: %s", self.last_error)
        return False

    def table(self) -> dict[str, Any]:
        """For ``/health``."""
        return {"characters": self._num_chars, "loaded": self.num_loaded, "last_error": self.last_error}
