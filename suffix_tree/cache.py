"""Live requests over tenants' indexes: the one object that drafters and servers talk to.

Every method takes a lock, and everything that runs long runs in machine code without the GIL: any number of threads
may read and write. Tenants never see each other's text or calibration; the shared tier is filled on purpose only.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate

import numpy as np

from specdec.suffix_tree import _layout as at
from specdec.suffix_tree.drafts import Drafts
from specdec.suffix_tree.index import SuffixIndex
from specdec.suffix_tree.live import UNKNOWN_REACH, Live, LiveTable, as_tokens
from specdec.suffix_tree.memory import Int32Array, Int64Array
from specdec.suffix_tree.prior import Prior, load_prior
from specdec.suffix_tree.steps import extend_batch, replay, step_batch, step_one

__all__ = ["Drafts", "SuffixCache", "as_tokens"]

_CHUNK = 1 << 14  # tokens inserted while the lock is held
_DEFAULT_BYTES = 256 << 20


class SuffixCache:
    """Drafts for live requests from their own text and from earlier responses of their tenant.

    Args:
        max_bytes: bound of each tenant's index in bytes.
        max_responses: bound of the number of cached responses of each tenant, or None.
        max_tenants: how many tenants are kept; the one idle longest is dropped whole for a new one.
        ttl: seconds that a finished response is kept, or None for no limit.
        caching: False keeps no responses: requests draft from their own text only.
        prior: where calibration starts; the shipped tables if None.
        clock: seconds, for ``ttl``.

    Raises:
        ValueError: an option is outside its rule.
    """

    def __init__(
        self,
        *,
        max_bytes: int = _DEFAULT_BYTES,
        max_responses: int | None = None,
        max_tenants: int = 1024,
        ttl: float | None = None,
        caching: bool = True,
        prior: Prior | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_tenants < 1:
            raise ValueError(f"max_tenants must be at least 1, got {max_tenants}")
        if ttl is not None and ttl <= 0:
            raise ValueError(f"ttl must be positive seconds, got {ttl}")
        self.max_bytes = max_bytes
        self.max_responses = max_responses
        self.max_tenants = max_tenants
        self.ttl = ttl
        self.caching = caching
        self.lock = threading.RLock()
        self._prior = load_prior() if prior is None else prior
        self._clock = clock
        self._tenants: dict[str, SuffixIndex] = {}  # least recently started first
        self.shared: SuffixIndex | None = None
        self._live: dict[Hashable, Live] = {}
        self._table = LiveTable()
        self._finished: dict[tuple[str, Hashable], float] = {}  # when each response was completed, oldest first
        self.index("")  # reject a bad bound now, not in the first request

    # --- tenants ------------------------------------------------------------------------------------------------------

    def index(self, tenant: str) -> SuffixIndex:
        """The tenant's index, made on first use."""
        with self.lock:
            index = self._tenants.pop(tenant, None)
            if index is None:
                if len(self._tenants) >= self.max_tenants:
                    self._drop_idle_tenant()
                index = SuffixIndex(self._prior, max_bytes=self.max_bytes, max_responses=self.max_responses)
            self._tenants[tenant] = index
            return index

    def _drop_idle_tenant(self) -> None:
        busy = {live.tenant for live in self._live.values()}
        for tenant in self._tenants:
            if tenant not in busy:
                self.forget_tenant(tenant)
                return
        raise ValueError(f"all {self.max_tenants} tenants have live requests: raise max_tenants")

    @property
    def tenants(self) -> Mapping[str, SuffixIndex]:
        """Indexes by tenant."""
        return self._tenants

    def share(self, responses: Sequence[Sequence[int] | Int32Array]) -> None:
        """Add texts to the shared tier, which every tenant reads and no request writes. For operators."""
        with self.lock:
            if self.shared is None:
                self.shared = SuffixIndex(self._prior, max_bytes=self.max_bytes, learning=False)
            for response in responses:
                self._insert(self.shared, len(self.shared.responses), as_tokens(response))
            for live in self._live.values():
                self._table.rows[live.slot, at.R_SHARED] = self.shared.address

    def insert(self, key: Hashable, token_ids: Sequence[int] | Int32Array, *, tenant: str = "") -> None:
        """Add a text to a tenant's index as if a request had produced it: warm start from a corpus or a trace."""
        tokens = as_tokens(token_ids)
        with self.lock:
            self._insert(self.index(tenant), key, tokens)
            self._note_finished(tenant, key)

    def _insert(self, index: SuffixIndex, key: Hashable, tokens: Int32Array) -> None:
        number = index.open(key)
        live = self._table.add("", index, None, np.empty(0, np.int32), number)
        for start in range(0, len(tokens), _CHUNK):
            piece = tokens[start : start + _CHUNK]
            self._table.make_room([live], [len(piece)])
            extend_batch(self._table.rows, np.array([live.slot]), piece, np.array([0, len(piece)]))
        self._table.release(live)
        index.close(key)

    # --- life of a request --------------------------------------------------------------------------------------------

    @property
    def active_requests(self) -> Mapping[Hashable, object]:
        """Live requests."""
        return self._live

    def start(
        self, request_id: Hashable, prompt_ids: Sequence[int] | Int32Array, *, tenant: str = "", caching: bool = True
    ) -> None:
        """Take up a request and index its prompt.

        Args:
            request_id: not live yet. A response cached under this id is deleted.
            prompt_ids: [P] token ids.
            tenant: whose text this is.
            caching: whether its response is kept for later requests.

        Raises:
            ValueError: the request is live already, or the prompt is not token ids.
        """
        prompt = as_tokens(prompt_ids)
        with self.lock:
            if request_id in self._live:
                raise ValueError(f"request {request_id!r} is already active")
            self.expire()
            index = self.index(tenant)
            caching = caching and self.caching
            if caching and request_id in index.responses:
                self._delete(tenant, request_id)
            number = index.open(request_id) if caching else 0
            live = self._table.add(tenant, index, self.shared, prompt, number)
            live.key = request_id if number else None
            self._live[request_id] = live

    def _batch(self, request_ids: Sequence[Hashable]) -> list[Live]:
        try:
            return [self._live[request_id] for request_id in request_ids]
        except KeyError as error:
            raise ValueError(f"request {error.args[0]!r} is not active") from None

    @staticmethod
    def _flatten(batch: Sequence[Live], new_ids: Sequence[Int32Array]) -> tuple[Int32Array, Int64Array]:
        if len(batch) != len(new_ids):
            raise ValueError(f"{len(batch)} requests need as many token lists, got {len(new_ids)}")
        offsets = np.array([0, *accumulate(map(len, new_ids))], np.int64)
        flat = np.concatenate(new_ids) if len(batch) else np.empty(0, np.int32)
        return flat.astype(np.int32, copy=False), offsets

    def extend(self, request_ids: Sequence[Hashable], new_ids: Sequence[Int32Array]) -> None:
        """Append committed tokens to live requests, and learn how their last drafts fared.

        Args:
            request_ids: R live requests, each once.
            new_ids: R arrays of int32 token ids; empty ones are fine.

        Raises:
            ValueError: a request is not live; nothing was appended.
        """
        with self.lock:
            batch = self._batch(request_ids)
            flat, offsets = self._flatten(batch, new_ids)
            self._table.make_room(batch, [len(ids) for ids in new_ids])
            extend_batch(self._table.rows, np.array([live.slot for live in batch], np.int64), flat, offsets)

    def speculate(
        self, request_ids: Sequence[Hashable], budgets: Sequence[int], *, threshold: float, as_tree: bool
    ) -> Drafts:
        """Draft for live requests.

        Args:
            request_ids: R live requests.
            budgets: R numbers: most draft tokens for each; 0 = none. At most 256 are drafted.
            threshold: the cost of a draft token over the cost of a step, see ``stopping``; no token is drafted whose
                path is accepted with a smaller probability.
            as_tree: draft trees; else paths.

        Raises:
            ValueError: a request is not live, or there are not as many budgets as requests.
        """
        nothing = [np.empty(0, np.int32)] * len(request_ids)
        return self.step(request_ids, nothing, budgets, threshold=threshold, as_tree=as_tree)

    def step(
        self,
        request_ids: Sequence[Hashable],
        new_ids: Sequence[Int32Array],
        budgets: Sequence[int],
        *,
        threshold: float,
        as_tree: bool,
    ) -> Drafts:
        """``extend`` for all requests, then ``speculate`` for all, in one call: what an engine step needs."""
        with self.lock:
            batch = self._batch(request_ids)
            if len(budgets) != len(batch):
                raise ValueError(f"{len(batch)} requests need as many budgets, got {len(budgets)}")
            slots = np.array([live.slot for live in batch], np.int64)
            flat, offsets = self._flatten(batch, new_ids)
            most = np.array(budgets, np.int64)
            ends = np.empty(len(batch) + 1, np.int64)
            size = len(batch) * (1 + min(max(0, max(budgets, default=0)), at.MAX_DRAFT))
            tokens, parents, values = np.empty(size, np.int32), np.empty(size, np.int32), np.empty(size, np.float32)
            arguments = (
                self._table.rows, slots, flat, offsets, most, float(threshold), bool(as_tree), ends, tokens, parents,
                values,
            )  # fmt: skip
            if not step_batch(*arguments):
                self._table.make_room(batch, [len(ids) for ids in new_ids])
                step_batch(*arguments)
            size = ends[-1]
            return Drafts(ends, tokens[:size], parents[:size], values[:size])

    def advance(
        self, request_id: Hashable, new_ids: Int32Array, *, budget: int, threshold: float, as_tree: bool
    ) -> Live:
        """``step`` for one request, with as little around the kernel as Python allows.

        Returns:
            The request: the first ``count`` lines of its ``draft`` are the nodes (token, parent with -1 for the root),
            those of ``values`` their probabilities; valid until the next call for it.

        Raises:
            ValueError: the request is not live.
        """
        with self.lock:
            live = self._live.get(request_id)
            if live is None:
                raise ValueError(f"request {request_id!r} is not active")
            count = step_one(live.address, new_ids, budget, threshold, as_tree)
            if count < 0:
                self._table.make_room([live], [len(new_ids)])
                count = step_one(live.address, new_ids, budget, threshold, as_tree)
            live.count = count
            return live

    def match_length(self, request_id: Hashable) -> int:
        """Longest match that the last ``speculate`` of a request found, in tokens."""
        with self.lock:
            return int(self._table.rows[self._batch([request_id])[0].slot, at.R_BEST_LENGTH])

    def replay(
        self, request_id: Hashable, response_ids: Int32Array, *, budget: int, threshold: float, as_tree: bool
    ) -> tuple[int, int, int]:
        """Draft and verify a recorded response to its end, as a target that produces exactly it would.

        Args:
            request_id: a live request.
            response_ids: [G] int32: what the request goes on with.
            budget: most draft tokens of a step.
            threshold: as in ``speculate``.
            as_tree: likewise.

        Returns:
            Steps, accepted draft tokens, draft tokens.
        """
        totals = np.zeros(3, np.int64)
        with self.lock:
            (live,) = self._batch([request_id])
            self._table.make_room([live], [len(response_ids)])
            row = self._table.rows[live.slot]
            replay(row, as_tokens(response_ids), int(budget), float(threshold), bool(as_tree), totals)
        steps, accepted, drafted = totals.tolist()
        return steps, accepted, drafted

    def finish(self, request_id: Hashable) -> None:
        """Let a request go; its response stays cached.

        Raises:
            ValueError: the request is not live.
        """
        with self.lock:
            (live,) = self._batch([request_id])
            del self._live[request_id]
            self._table.release(live)
            if live.key is not None:
                live.index.close(live.key)
                self._note_finished(live.tenant, live.key)

    # --- forgetting ---------------------------------------------------------------------------------------------------

    def _note_finished(self, tenant: str, key: Hashable) -> None:
        self._finished.pop((tenant, key), None)
        if self.ttl is not None:
            self._finished[tenant, key] = self._clock()

    def expire(self) -> int:
        """Delete responses that were completed longer than ``ttl`` ago; returns how many."""
        if self.ttl is None:
            return 0
        with self.lock:
            expired = 0
            limit = self._clock() - self.ttl
            while self._finished and next(iter(self._finished.values())) <= limit:
                tenant, key = next(iter(self._finished))
                del self._finished[tenant, key]
                index = self._tenants.get(tenant)
                if index is not None and key in index.responses:
                    self._delete(tenant, key)
                    expired += 1
            return expired

    def _delete(self, tenant: str, key: Hashable) -> None:
        index = self._tenants[tenant]
        live = self._live.get(key)
        if live is not None and live.index is index and live.key == key:
            live.key = None
            self._table.rows[live.slot, at.R_SEQUENCE] = 0
            self._table.rows[live.slot, at.R_POSITION] = 0
        index.delete(key)
        self._finished.pop((tenant, key), None)

    def forget(self, request_id: Hashable, *, tenant: str = "") -> None:
        """Delete a request's cached response, live or finished; a live request goes on without being cached.

        Raises:
            ValueError: nothing is cached under this id.
        """
        with self.lock:
            index = self._tenants.get(tenant)
            if index is None or request_id not in index.responses:
                raise ValueError(f"request {request_id!r} is not cached")
            self._delete(tenant, request_id)

    def forget_tenant(self, tenant: str) -> None:
        """Drop everything of a tenant: responses and calibration. Its live requests go on with an empty index.

        Raises:
            ValueError: the tenant is unknown.
        """
        with self.lock:
            if tenant not in self._tenants:
                raise ValueError(f"tenant {tenant!r} is unknown")
            del self._tenants[tenant]
            for key in [key for key in self._finished if key[0] == tenant]:
                del self._finished[key]
            for live in self._live.values():
                if live.tenant == tenant:
                    live.index, live.key = self.index(tenant), None
                    row = self._table.rows[live.slot]
                    row[at.R_INDEX] = live.index.address
                    row[[at.R_SEQUENCE, at.R_POSITION, at.R_PIN_CACHED, at.R_DRAFTED]] = 0
                    row[at.R_REACH_CACHED] = UNKNOWN_REACH

    def warmup(self) -> None:
        """Compile every kernel, so that no request waits for it. Later runs of the program find them on disk."""
        other = SuffixCache(max_bytes=1 << 16, prior=self._prior)
        text = np.array([1, 2, 3, 1, 2], np.int32)
        other.start("r", text)
        for as_tree in (False, True):
            other.speculate(["r"], [4], threshold=0.0, as_tree=as_tree)
            other.step(["r"], [text], [4], threshold=0.0, as_tree=as_tree)
        other.extend(["r"], [text])
        other.forget("r")

    @property
    def nbytes(self) -> int:
        """Bytes in use: all indexes and the buffers of live requests."""
        with self.lock:
            shared = 0 if self.shared is None else self.shared.nbytes
            live = sum(r.tokens.nbytes + r.links.nbytes + r.heads.nbytes + r.record.nbytes for r in self._live.values())
            return shared + live + sum(index.nbytes for index in self._tenants.values())
