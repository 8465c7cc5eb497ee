"""K/V of requests that are over, kept until their room is needed, for requests that begin with the same tokens.

An agent sends its whole conversation with every call, and many requests share a system prompt. A newcomer takes over
the K/V of the longest common beginning instead of computing it: it *moves in* where the former request's tokens are
all a beginning of its own (the next turn of a conversation; nothing is copied), and copies rows otherwise, also from
requests that still run. A copy costs one pass over the rows' memory, a small part of what a forward over them costs,
and leaves every request in a run of slots of its own, which is what attention on a CPU needs. Tokens are compared
themselves, never hashes of them, and only within one tenant: no request can be served another text's K/V, nor learn
from a quick answer what another tenant asked.

Room that cached beginnings take is free room: the least recently used one is dropped as soon as anybody needs it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from specdec.kv_cache import KVPool
from specdec.types import IntArray, RequestState

__all__ = ["PrefixCache", "PrefixTotals"]

_LEAST_TOKENS = 16  # a shorter beginning is computed as fast as it is found
_GLANCE = 64  # tokens compared first: most texts that differ do so early


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """A request that is over: whose it was, and the tokens whose K/V the pool holds under ``name``."""

    name: str
    tenant: str
    token_ids: IntArray


@dataclass(slots=True)
class PrefixTotals:
    """Tokens of all prompts that were looked up, and those of them that needed no forward."""

    num_queried: int = 0
    num_recalled: int = 0


class PrefixCache:
    """Cached beginnings in a KV pool. Only the target that owns the pool calls it.

    Args:
        pool: where the K/V lies.
    """

    def __init__(self, pool: KVPool) -> None:
        self._pool = pool
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # least recently used first
        self._live: dict[str, RequestState] = {}
        self._num_names = 0
        self.totals = PrefixTotals()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_tokens(self) -> int:
        """Tokens of all cached beginnings; their room can be had at any time."""
        return sum(len(kept.token_ids) for kept in self._kept.values())

    def recall(self, state: RequestState, expected_length: int) -> int:
        """Give a request that holds nothing yet the K/V of the longest known beginning of its tokens.

        Args:
            state: the newcomer.
            expected_length: tokens that it is likely to need in all.

        Returns:
            How many leading tokens are cached now; at most all but the last, which the next forward needs as its root.
        """
        wanted = state.token_ids[:-1]
        source, length = self._longest(state.request.tenant, wanted)
        if length < _LEAST_TOKENS or not self._take(source, state.request_id, length, expected_length):
            length = 0
        self._live[state.request_id] = state
        self.totals.num_queried += len(wanted)
        self.totals.num_recalled += length
        return length

    def keep(self, state: RequestState) -> None:
        """Take over the K/V of a request that is over, and drop cached beginnings that it contains."""
        self._live.pop(state.request_id, None)
        token_ids = state.token_ids[: state.num_cached].copy()
        if len(token_ids) < _LEAST_TOKENS or not self._pool.holds(state.request_id, len(token_ids)):
            self._pool.release(state.request_id)
            return
        tenant = state.request.tenant
        for kept in [k for k in self._kept.values() if k.tenant == tenant]:
            if _common_length(kept.token_ids, token_ids) == len(kept.token_ids):
                self._drop(kept.name)
        self._num_names += 1
        name = f"\0kept-{self._num_names}"  # no request of a user has such a name
        self._pool.rename(state.request_id, name)
        self._pool.expect(name, 0)
        self._kept[name] = _Kept(name, tenant, token_ids)

    def forget(self, request_id: str) -> None:
        """A request lost its K/V without being over."""
        self._live.pop(request_id, None)

    def make_room(self, expected_length: int, *, spare: str | None = None) -> None:
        """Drop beginnings until a newcomer gets a run of slots of its own, over which attention on a CPU is fast.

        Gives up when twice its length was dropped in vain: then it is running requests that leave no run.

        Args:
            expected_length: tokens that the newcomer is likely to need.
            spare: a beginning to keep; the most recently used one.
        """
        num_left = 2 * expected_length
        while self._kept and num_left > 0 and not self._pool.has_run(expected_length):
            oldest = next(iter(self._kept.values()))
            if oldest.name == spare:
                return
            num_left -= len(oldest.token_ids)
            self._drop(oldest.name)

    def drop_oldest(self) -> bool:
        """Free the room of the least recently used beginning; False if there is none."""
        if not self._kept:
            return False
        self._drop(next(iter(self._kept)))
        return True

    def clear(self) -> None:
        """Drop every cached beginning."""
        while self.drop_oldest():
            pass

    def _drop(self, name: str) -> None:
        del self._kept[name]
        self._pool.release(name)

    def _longest(self, tenant: str, wanted: IntArray) -> tuple[str, int]:
        """(name in the pool, length) of the longest common beginning that the pool still holds whole."""
        best, length = "", 0
        sources = [(k.name, k.token_ids) for k in reversed(self._kept.values()) if k.tenant == tenant]
        sources += [
            (s.request_id, s.token_ids[: s.num_cached]) for s in self._live.values() if s.request.tenant == tenant
        ]
        for name, token_ids in sources:
            common = _common_length(token_ids, wanted)
            if common > length and self._pool.holds(name, common):
                best, length = name, common
        return best, length

    def _take(self, source: str, request_id: str, length: int, expected_length: int) -> bool:
        """Move in or copy; False if the source is a running request and there is no room for a copy."""
        kept = self._kept.get(source)
        if kept is None:
            self.make_room(expected_length)
            return self._pool.copy_prefix(source, request_id, length, expected_length)
        self._kept.move_to_end(source)
        if length < len(kept.token_ids):  # others may want what this request does not
            self.make_room(expected_length, spare=source)
            if self._pool.copy_prefix(source, request_id, length, expected_length):
                return True
        del self._kept[source]
        self._pool.rename(source, request_id)
        self._pool.cut(request_id, length)
        self._pool.expect(request_id, expected_length)
        return True


def _common_length(first: IntArray, second: IntArray) -> int:
    """Length of the common beginning of two token sequences."""
    length = min(len(first), len(second))
    for end in (min(_GLANCE, length), length):
        differs = first[:end] != second[:end]
        if differs.any():
            return int(differs.argmax())
    return length
