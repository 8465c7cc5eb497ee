"""The spool: a directory of shards, the default way from a server to a trainer (`TraceTransport`).

    spool/tmp/       shards that are being written, and what is being deleted
    spool/ready/     complete shards, oldest name first
    spool/leased/W/  shards that worker W holds
    spool/done/      shards that were learned from; kept for replay until they are too old or too many

A shard is written whole under ``tmp``, made to last (fsync) and renamed: it is there completely or not at all, whenever
its writer dies. Every file's checksum stands in the shard's manifest. Moving between directories is a rename, which one
of several workers wins. Files have mode 0600, directories 0700.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.errors import ConfigError, LoadError
from specdec.online_training.privacy import write_private
from specdec.online_training.records import TraceRecord, read_meta, read_tensors, write_meta, write_tensors
from specdec.online_training.transport import Lease, TransportStats

__all__ = ["Spool", "SpoolLimits", "fsync_folder", "read_shard"]

_META, _TENSORS, _MANIFEST = "meta.arrow", "tensors.safetensors", "manifest.json"


@dataclass(frozen=True, slots=True)
class SpoolLimits:
    """How much is kept and how long.

    Args:
        max_bytes: of all shards; beyond it the oldest that nobody holds are deleted, those done with first.
        ttl_s: seconds after which a shard is deleted.
        lease_s: seconds after which a shard of a silent worker is free again.
    """

    max_bytes: int = 2**30
    ttl_s: float = 86_400.0
    lease_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("max_bytes", "ttl_s", "lease_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")


def fsync_folder(path: Path) -> None:
    """Make renames within a directory last."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_shard(folder: Path) -> list[TraceRecord]:
    """The records of a shard.

    Raises:
        LoadError: a file is missing or differs from its checksum.
    """
    manifest = _manifest(folder)
    contents: dict[str, bytes] = {}
    for name, digest in manifest["sha256"].items():
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise LoadError(f"cannot read {folder.name}/{name}: {error}") from error
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise LoadError(f"{folder.name}/{name} differs from its checksum")
    tensors = read_tensors(contents[_TENSORS]) if _TENSORS in contents else {}
    return read_meta(contents[_META], tensors)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read the manifest of {folder.name}: {error}") from error
    if not isinstance(manifest, dict) or _META not in manifest.get("sha256", {}):
        raise LoadError(f"the manifest of {folder.name} names no {_META}")
    return manifest


class Spool:
    """Shards in a directory; any number of writers and workers, on one machine or a shared file system.

    Args:
        root: the directory; made if it is not there.
        limits: see ``SpoolLimits``.
        clock: seconds of Unix time; for tests.

    Raises:
        LoadError: the directory cannot be made.
    """

    def __init__(
        self, root: Path, limits: SpoolLimits | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.root, self.limits, self._clock = root, limits or SpoolLimits(), clock
        self._tmp, self._ready, self._done = root / "tmp", root / "ready", root / "done"
        self._leased = root / "leased"
        self._num_deleted = 0
        try:
            for folder in (root, self._tmp, self._ready, self._leased, self._done):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise LoadError(f"cannot make the spool {root}: {error}") from error

    def put(self, records: Sequence[TraceRecord]) -> str:
        """Write one shard and enforce the limits.

        Raises:
            OSError: the disk refuses; nothing is visible.
        """
        shard_id = f"shard-{int(self._clock() * 1e3):013d}-{secrets.token_hex(6)}"
        draft = self._tmp / f"{shard_id}.{os.getpid()}"
        draft.mkdir(mode=0o700)
        try:
            self._fill(draft, records)
            draft.rename(self._ready / shard_id)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        fsync_folder(self._ready)
        self.enforce()
        return shard_id

    def _fill(self, folder: Path, records: Sequence[TraceRecord]) -> None:
        files = {_META: write_meta(records)}
        tensors = write_tensors(records)
        if tensors is not None:
            files[_TENSORS] = tensors
        for name, data in files.items():
            write_private(folder / name, data)
        manifest = {
            "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
            "num_records": len(records),
            "num_tokens": sum(len(record.token_ids) for record in records),
            "tenants": sorted({record.tenant for record in records}),
            "versions": sorted({int(v) for record in records for v in record.rounds.versions}),
            "ts_ms": int(self._clock() * 1e3),
        }
        write_private(folder / _MANIFEST, json.dumps(manifest).encode())
        fsync_folder(folder)

    def lease(self, worker: str) -> Lease | None:
        """Take the oldest shard that waits. One that cannot be read is deleted and the next one tried."""
        self._return_stale()
        mine = self._leased / _checked(worker)
        mine.mkdir(mode=0o700, exist_ok=True)
        for folder in sorted(self._ready.iterdir()):
            try:
                os.utime(folder, (self._clock(), self._clock()))  # before the rename: a fresh lease is never stale
                folder.rename(mine / folder.name)
            except OSError:
                continue  # another worker was faster, or the limits removed it
            try:
                return Lease(folder.name, read_shard(mine / folder.name))
            except LoadError:
                self._delete(mine / folder.name)
        return None

    def ack(self, worker: str, shard_id: str) -> None:
        self._move(self._leased / _checked(worker) / _checked(shard_id), self._done)

    def release(self, worker: str, shard_id: str) -> None:
        self._move(self._leased / _checked(worker) / _checked(shard_id), self._ready)

    def keep_alive(self, worker: str) -> None:
        """Say that a worker still uses what it holds."""
        for folder in self._entries(self._leased / _checked(worker)):
            self._touch(folder)

    def held(self, worker: str) -> list[str]:
        return [folder.name for folder in self._entries(self._leased / _checked(worker))]

    def done(self) -> list[Path]:
        """Shards for replay, oldest first; any of them may be gone when it is read."""
        return self._entries(self._done)

    def kept(self, shard_ids: Sequence[str]) -> set[str]:
        return {folder.name for folder in self._all()} & set(shard_ids)

    def forget(self, tenant: str) -> list[str]:
        """Delete every shard with a record of a tenant, wherever it is; other records in it go too."""
        gone = []
        for folder in self._all():
            try:
                tenants = _manifest(folder)["tenants"]
            except LoadError:
                tenants = [tenant]  # what cannot be read cannot be cleared of it
            if tenant in tenants:
                self._delete(folder)
                gone.append(folder.name)
        return gone

    def enforce(self) -> None:
        """Delete what is too old, abandoned or too much."""
        now = self._clock()
        for folder in self._entries(self._tmp):
            if now - _mtime(folder, now) > self.limits.lease_s:  # its writer died
                shutil.rmtree(folder, ignore_errors=True)
        kept = [(folder, _nbytes(folder)) for folder in (*self._entries(self._done), *self._entries(self._ready))]
        total = sum(nbytes for _, nbytes in kept) + sum(_nbytes(f) for f in self._entries(self._leased, deep=True))
        for folder, nbytes in kept:
            is_old = now - int(folder.name.split("-")[1]) / 1e3 > self.limits.ttl_s
            if is_old or total > self.limits.max_bytes:
                self._num_deleted += folder.parent == self._ready
                self._delete(folder)
                total -= nbytes

    def stats(self) -> TransportStats:
        ready, leased = self._entries(self._ready), self._entries(self._leased, deep=True)
        nbytes = sum(map(_nbytes, (*ready, *leased, *self._entries(self._done))))
        return TransportStats(len(ready), len(leased), nbytes, self._num_deleted)

    def _all(self) -> list[Path]:
        return [*self._entries(self._ready), *self._entries(self._leased, deep=True), *self._entries(self._done)]

    def _entries(self, folder: Path, *, deep: bool = False) -> list[Path]:
        pattern = "*/shard-*" if deep else "shard-*"
        return sorted(folder.glob(pattern), key=lambda path: path.name)

    def _return_stale(self) -> None:
        now = self._clock()
        for folder in self._entries(self._leased, deep=True):
            if now - _mtime(folder, now) > self.limits.lease_s:
                self._move(folder, self._ready)

    def _touch(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # it is gone: forgotten, or taken back
            os.utime(folder, (self._clock(), self._clock()))

    def _move(self, folder: Path, to: Path) -> None:
        try:
            folder.rename(to / folder.name)
        except FileNotFoundError:
            return
        fsync_folder(to)

    def _delete(self, folder: Path) -> None:
        """Out of sight at once, then off the disk."""
        trash = self._tmp / f"{folder.name}.gone.{secrets.token_hex(4)}"
        try:
            folder.rename(trash)
        except FileNotFoundError:
            return
        shutil.rmtree(trash, ignore_errors=True)


def _checked(name: str) -> str:
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"a worker or shard must be a plain file name, got {name!r}")
    return name


def _mtime(folder: Path, default: float) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return default


def _nbytes(folder: Path) -> int:
    try:
        return sum(file.stat().st_size for file in folder.iterdir())
    except OSError:
        return 0
