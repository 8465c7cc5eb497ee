"""One store behind the retrieval drafters: what was said before, by tenant, kept in memory and on disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from specdec.drafters.successors import SuccessorTable
from specdec.errors import ConfigError, LoadError, RequestError
from specdec.suffix_tree.branch_memory import BranchMemory
from specdec.suffix_tree.cache import SuffixCache
from specdec.suffix_tree.files import ArrayFile, DamagedFileError, open_arrays, save_arrays
from specdec.suffix_tree.index import Section, SuffixIndex
from specdec.suffix_tree.ppm import MAX_ORDER, prior_weights
from specdec.tree import IntArray

__all__ = ["RetrievalStore"]

_MAX_BRANCH_NODES = 1 << 20
_MAX_BRANCH_TOKENS = 1 << 18
_MAX_CONTEXT_NODES = 1 << 21


class RetrievalStore:
    """Earlier text of every tenant, as each retrieval drafter needs it.

    Tenants are isolated: nothing inserted by one changes any draft of another. ``share`` fills a tier that all tenants
    read; requests never write to it. All methods may be called from any thread.

    Args:
        max_bytes: bound of each tenant's suffix index in bytes; the responses used longest ago go first.
        max_responses: bound of each tenant's number of cached responses, or None.
        max_tenants: how many tenants are kept; the one idle longest is dropped for a new one.
        ttl: seconds that a finished response is kept, or None for no limit.

    Raises:
        ConfigError: an option is outside its rule.
    """

    def __init__(
        self,
        *,
        max_bytes: int = 256 << 20,
        max_responses: int | None = None,
        max_tenants: int = 1024,
        ttl: float | None = None,
    ) -> None:
        try:
            self.suffix = SuffixCache(
                max_bytes=max_bytes, max_responses=max_responses, max_tenants=max_tenants, ttl=ttl
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.lock: threading.RLock = self.suffix.lock
        self._branches: dict[str, BranchMemory] = {}
        self._contexts: dict[str, BranchMemory] = {}
        self._successors: dict[str, SuccessorTable] = {}

    def branches(self, tenant: str, depth: int) -> BranchMemory:
        """The tenant's memory for trie lookahead.

        Raises:
            ConfigError: it was made with another depth.
        """
        made = partial(BranchMemory, depth, _MAX_BRANCH_NODES, _MAX_BRANCH_TOKENS)
        memory: BranchMemory = self._part(self._branches, tenant, made)
        if memory.trie.depth != depth:
            raise ConfigError(f"this store counts strings of {memory.trie.depth} tokens, the drafter needs {depth}")
        return memory

    def contexts(self, tenant: str) -> BranchMemory:
        """The tenant's memory for prediction by partial matching."""
        made = partial(BranchMemory, MAX_ORDER + 1, _MAX_CONTEXT_NODES, _MAX_BRANCH_TOKENS, prior_weights())
        memory: BranchMemory = self._part(self._contexts, tenant, made)
        return memory

    def successors(self, tenant: str) -> SuccessorTable:
        """The tenant's successor matrix."""
        table: SuccessorTable = self._part(self._successors, tenant, SuccessorTable)
        return table

    def _part(self, parts: dict[str, Any], tenant: str, make: Callable[[], Any]) -> Any:
        """What the tenant has there, made if it has nothing; the tenants' order is that of their last use.

        Of more tenants than ``max_tenants`` what the one idle longest has goes; its live requests keep what they hold.
        """
        with self.lock:
            parts[tenant] = part = parts.pop(tenant) if tenant in parts else make()
            while len(parts) > self.suffix.max_tenants:
                del parts[next(iter(parts))]
            return part

    @property
    def nbytes(self) -> int:
        """Bytes in use over all tenants."""
        with self.lock:
            parts = (self._branches, self._contexts, self._successors)
            return self.suffix.nbytes + sum(part.nbytes for of_kind in parts for part in of_kind.values())

    # --- filling and forgetting ---------------------------------------------------------------------------------------

    def insert(self, key: Hashable, token_ids: Sequence[int] | IntArray, *, tenant: str = "") -> None:
        """Add a text to a tenant as if a request had produced it: warm start from a corpus or a trace."""
        self.suffix.insert(key, token_ids, tenant=tenant)

    def share(self, texts: Sequence[Sequence[int] | IntArray]) -> None:
        """Add texts to the shared tier, which every tenant reads. For operators, on purpose."""
        self.suffix.share(texts)

    def forget(self, request_id: str, *, tenant: str = "") -> None:
        """Delete what a request left behind: its response, its counts, the matrix rows that it wrote last.

        Raises:
            RequestError: nothing of this request is kept.
        """
        with self.lock:
            found = False
            index = self.suffix.tenants.get(tenant)
            if index is not None and request_id in index.responses:
                self.suffix.forget(request_id, tenant=tenant)
                found = True
            for parts in (self._branches, self._contexts, self._successors):
                if tenant in parts:
                    found |= parts[tenant].forget(request_id)
            if not found:
                raise RequestError(f"nothing is kept of request {request_id!r} of tenant {tenant!r}")

    def forget_tenant(self, tenant: str) -> None:
        """Drop everything of a tenant, calibration included. Its live requests go on without a past.

        Raises:
            RequestError: the tenant is unknown.
        """
        with self.lock:
            parts = (self._branches, self._contexts, self._successors)
            known = [of_kind.pop(tenant, None) is not None for of_kind in parts]
            if tenant in self.suffix.tenants:
                self.suffix.forget_tenant(tenant)
            elif not any(known):
                raise RequestError(f"tenant {tenant!r} is unknown")

    # --- disk ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the store to a file, all or nothing: until the end the old file stays, whatever happens.

        Request ids must be strings or integers.

        Raises:
            LoadError: the file cannot be written; the old one is untouched.
        """
        file = Path(path)
        arrays: dict[str, np.ndarray] = {}
        with self.lock:
            meta: dict[str, Any] = {"suffix": {}, "branches": {}, "contexts": {}, "successors": {}}
            indexes: list[tuple[str, str, SuffixIndex]] = [
                (f"suffix/{i}", tenant, index) for i, (tenant, index) in enumerate(self.suffix.tenants.items())
            ]
            for name, tenant, index in indexes:
                meta["suffix"][tenant] = {"name": name, **_checked(index.counters())}
            if self.suffix.shared is not None:
                indexes.append(("shared", "", self.suffix.shared))
                meta["shared"] = {"name": "shared", **_checked(self.suffix.shared.counters())}
            for name, _, index in indexes:
                arrays |= {f"{name}/{field}": array for field, array in index.arrays()}
            for kind, memories in (("branches", self._branches), ("contexts", self._contexts)):
                for i, (tenant, memory) in enumerate(memories.items()):
                    meta[kind][tenant] = {"name": f"{kind}/{i}", "depth": memory.trie.depth, "keys": memory.keys}
                    arrays |= {f"{kind}/{i}/{field}": array for field, array in memory.arrays().items()}
            for i, (tenant, table) in enumerate(self._successors.items()):
                meta["successors"][tenant] = {"name": f"successors/{i}", "owners": table.owner_numbers}
                arrays |= {f"successors/{i}/{field}": array for field, array in table.arrays().items()}
            try:
                save_arrays(file, meta, arrays)
            except OSError as error:
                raise LoadError(f"cannot save the store to {file}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], **options: Any) -> RetrievalStore:
        """A store from a file; its arrays are mapped, so a large one is ready at once.

        Args:
            path: written by ``save``.
            **options: as for the constructor.

        Raises:
            LoadError: the file cannot be read or is damaged; the message says how.
        """
        file = Path(path)
        store = cls(**options)
        try:
            with open_arrays(file) as saved:
                store._restore(saved)
        except (DamagedFileError, OSError) as error:
            raise LoadError(f"cannot load the store: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise LoadError(f"cannot load the store from {file}: {error}") from error
        return store

    def _restore(self, saved: ArrayFile) -> None:
        for tenant, entry in saved.meta["suffix"].items():
            self.suffix.index(tenant).restore(entry, _sections(saved, entry["name"]))
        if "shared" in saved.meta:
            self.suffix.share([])
            if self.suffix.shared is not None:
                self.suffix.shared.restore(saved.meta["shared"], _sections(saved, "shared"))
        for tenant, entry in saved.meta["branches"].items():
            self.branches(tenant, entry["depth"]).restore(entry["keys"], _counted(saved, entry))
        for tenant, entry in saved.meta.get("contexts", {}).items():  # older files have none
            self.contexts(tenant).restore(entry["keys"], _counted(saved, entry))
        for tenant, entry in saved.meta["successors"].items():
            fields = {field: saved.read(f"{entry['name']}/{field}") for field in ("rows", "owners", "tries", "hits")}
            self.successors(tenant).restore(entry["owners"], fields)


def _checked(counters: dict[str, Any]) -> dict[str, Any]:
    for key, _ in counters["responses"]:
        if not isinstance(key, str | int):
            raise ConfigError(f"a store is saved with string or integer request ids, got {key!r}")
    return counters


def _counted(saved: ArrayFile, entry: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {field: saved.read(f"{entry['name']}/{field}") for field in ("lengths", "texts", "tries", "hits")}


def _sections(saved: ArrayFile, name: str) -> Mapping[str, Section]:
    prefix = f"{name}/"
    return {
        full.removeprefix(prefix): Section(saved.file_descriptor, offset, nbytes)
        for full, (offset, nbytes, _, _) in saved.sections.items()
        if full.startswith(prefix)
    }
