"""Versions of one drafter on disk: published whole, numbered, one of them current.

    registry/v000012/      a checkpoint in its published format, and manifest.json with a checksum of every file
    registry/state.json    which version is current, which one is on trial, which one is pinned, and what was decided

A version is written beside its place, made to last (fsync) and renamed, so it is there completely or not at all.
``state.json`` is replaced, never edited; changes to it are serialised by a lock that dies with its holder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from specdec.errors import ConfigError, LoadError
from specdec.online_training.privacy import write_private
from specdec.online_training.spool import fsync_folder

__all__ = ["Manifest", "Registry", "RegistryState"]

_FORMAT = 1
_MANIFEST, _STATE = "manifest.json", "state.json"
_NAME = re.compile(r"v(\d{6})")
_MAX_EVENTS = 200
_ABANDONED_S = 3600.0  # what a publisher that died left behind


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a version says of itself.

    Args:
        version: its number, from 1.
        parent: the version that its training began from; 0: none.
        kind: how it is loaded, as in ``KIND:PATH``.
        target: fingerprint of the model that it drafts for.
        step: optimizer steps behind it.
        window: ids of the shards that it learned from since its parent.
        tenants: keyed hashes of whose text those held.
        acceptance_length: simulated, on text that it did not learn from; None: not measured.
        sha256: of every file.
        ts_ms: milliseconds of Unix time.
    """

    version: int
    parent: int
    kind: str
    target: str
    step: int = 0
    window: tuple[str, ...] = ()
    tenants: tuple[str, ...] = ()
    acceptance_length: float | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    ts_ms: int = 0
    format: int = _FORMAT


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryState:
    """Which version does what; 0: none.

    Args:
        current: serves.
        canary: serves a share of the requests, on trial.
        pinned: the baseline that trials and alarms are judged against; never deleted.
        marks: version -> why it must not be served.
        events: what was decided, newest last: {"ts_ms", "what", "version", "why"}.
    """

    current: int = 0
    canary: int = 0
    pinned: int = 0
    marks: Mapping[int, str] = field(default_factory=dict)
    events: tuple[Mapping[str, Any], ...] = ()

    @property
    def undecided(self) -> set[int]:
        """Versions whose trial ended without a verdict: they are not served, but nothing speaks against them."""
        return {event["version"] for event in self.events if event["what"] == "undecided"}


class Registry:
    """Versions in a directory; any number of readers and writers on one machine.

    Args:
        root: the directory; made if it is not there.

    Raises:
        LoadError: it cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise LoadError(f"cannot make the registry {root}: {error}") from error

    def path(self, version: int) -> Path:
        """Where a version lies."""
        return self.root / f"v{version:06d}"

    def numbers(self) -> list[int]:
        """All versions, ascending."""
        names = (_NAME.fullmatch(path.name) for path in self.root.iterdir())
        return sorted(int(match.group(1)) for match in names if match)

    def publish(self, export: Callable[[Path], None], manifest: Manifest) -> Manifest:
        """Make a version of what ``export`` writes into an empty directory; it is not served yet.

        Args:
            export: writes a checkpoint.
            manifest: its number, checksums and time are filled in here.
        """
        draft = self.root / f"tmp.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            export(draft)
            sha256 = {file.name: _seal(file) for file in sorted(draft.iterdir())}
            draft.chmod(0o700)
            with self._locked():
                done = replace(
                    manifest, version=max(self.numbers(), default=0) + 1, sha256=sha256, ts_ms=int(time.time() * 1e3)
                )
                write_private(draft / _MANIFEST, json.dumps(asdict(done)).encode())
                fsync_folder(draft)
                draft.rename(self.path(done.version))
                fsync_folder(self.root)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return done

    def manifest(self, version: int) -> Manifest:
        """What a version says of itself.

        Raises:
            LoadError: there is no such version, or it cannot be read.
        """
        try:
            read = json.loads((self.path(version) / _MANIFEST).read_bytes())
            manifest = Manifest(**{**read, "window": tuple(read["window"]), "tenants": tuple(read["tenants"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise LoadError(f"cannot read version {version} of the registry {self.root}: {error}") from error
        if manifest.format != _FORMAT or manifest.version != version:
            raise LoadError(f"version {version} is of format {manifest.format} and calls itself {manifest.version}")
        return manifest

    def check(self, version: int) -> Manifest:
        """The manifest of a version whose files are as they were published.

        Raises:
            LoadError: a file is missing or differs from its checksum.
        """
        manifest = self.manifest(version)
        for name, digest in manifest.sha256.items():
            try:
                data = (self.path(version) / name).read_bytes()
            except OSError as error:
                raise LoadError(f"version {version} lacks {name}: {error}") from error
            if hashlib.sha256(data).hexdigest() != digest:
                raise LoadError(f"version {version}: {name} differs from its checksum")
        return manifest

    def state(self) -> RegistryState:
        """Which version does what.

        Raises:
            LoadError: the state cannot be read.
        """
        try:
            read = json.loads((self.root / _STATE).read_bytes())
            marks = {int(version): why for version, why in read["marks"].items()}
            return RegistryState(**{**read, "marks": marks, "events": tuple(read["events"])})
        except FileNotFoundError:
            return RegistryState()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise LoadError(f"cannot read the state of the registry {self.root}: {error}") from error

    def try_out(self, version: int, why: str) -> None:
        """Put a version on trial.

        Raises:
            ConfigError: it is marked as not to be served.
            LoadError: it is not whole.
        """
        self.check(version)
        self._decide("canary", version, why, canary=self._servable(version))

    def promote(self, version: int, why: str) -> None:
        """Make a version current; errors as ``try_out``."""
        self.check(version)
        state = self.state()
        changes: dict[str, int] = {"current": self._servable(version)}
        if state.canary == version:
            changes["canary"] = 0
        if not state.pinned:
            changes["pinned"] = version  # the first one is what later ones are judged against
        self._decide("promote", version, why, **changes)

    def end_trial(self, why: str, *, is_worse: bool = True) -> None:
        """Stop trying out the canary, and never serve it again; unless it is worse, nothing is held against it."""
        state = self.state()
        if state.canary:
            what = "reject" if is_worse else "undecided"
            self._decide(what, state.canary, why, mark=state.canary, canary=0)

    def rollback(self, why: str) -> int:
        """Serve the newest sound version before the current one, else the pinned one; its number.

        Raises:
            ConfigError: there is nothing to go back to.
        """
        state = self.state()
        older = [v for v in self.numbers() if v < state.current and v not in state.marks]
        promoted = {event["version"] for event in state.events if event["what"] == "promote"}
        wanted = [v for v in older if v in promoted] or ([state.pinned] if state.pinned != state.current else older)
        if not wanted or not wanted[-1]:
            raise ConfigError(f"there is no sound version before {state.current} to go back to")
        self.check(wanted[-1])
        self._decide("rollback", wanted[-1], why, mark=state.current, current=wanted[-1])
        return wanted[-1]

    def pin(self, version: int, why: str) -> None:
        """Make a version the baseline; errors as ``try_out``."""
        self.check(version)
        self._decide("pin", version, why, pinned=self._servable(version))

    def mark(self, version: int, why: str) -> None:
        """Never serve a version again; one that is current stays until it is rolled back."""
        self._decide("mark", version, why, mark=version)

    def mark_tenant(self, tenant: str, why: str) -> list[int]:
        """Mark every version that learned from a tenant (its keyed hash), or descends from one that did."""
        tainted: set[int] = set()
        for version in self.numbers():
            manifest = self.manifest(version)
            if manifest.parent in tainted or tenant in manifest.tenants:
                tainted.add(version)
                self.mark(version, why)
        return sorted(tainted)

    def prune(self, keep: int = 5) -> list[int]:
        """Delete all but the newest ``keep`` versions and those that state names; what was deleted."""
        with self._locked():
            state = self.state()
            named = {state.current, state.canary, state.pinned}
            gone = [version for version in self.numbers()[:-keep] if version not in named]
            trash = [self.root / f"tmp.gone.{secrets.token_hex(4)}" for _ in gone]
            for version, place in zip(gone, trash, strict=True):
                self.path(version).rename(place)
        for path in (*trash, *self.root.glob("tmp.*")):
            if path in trash or _age(path) > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
        return gone

    def _servable(self, version: int) -> int:
        why = self.state().marks.get(version)
        if why is not None:
            raise ConfigError(f"version {version} must not be served: {why}")
        return version

    def _decide(self, what: str, version: int, why: str, *, mark: int = 0, **changes: int) -> None:
        with self._locked():
            state = self.state()
            event = {"ts_ms": int(time.time() * 1e3), "what": what, "version": version, "why": why}
            marks = {**state.marks, mark: why} if mark else dict(state.marks)
            events = (*state.events, event)[-_MAX_EVENTS:]
            new = replace(state, marks=marks, events=events, **changes)
            draft = self.root / f".{_STATE}.{os.getpid()}"
            write_private(draft, json.dumps(asdict(new)).encode())
            draft.replace(self.root / _STATE)
            fsync_folder(self.root)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _seal(file: Path) -> str:
    """Make a file private and lasting; its checksum."""
    file.chmod(0o600)
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()
