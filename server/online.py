"""What a server does for drafters that learn: capture its traffic, follow a registry. Nothing here serves a request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specdec.errors import ConfigError, UnsupportedError
from specdec.protocols import Drafter
from specdec.server.speculation import Choices

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from specdec.online_training.capture import TraceCapture
    from specdec.online_training.guardian import Guardian
    from specdec.online_training.swap import VersionedDrafter

__all__ = ["Online", "OnlineOptions", "build_online"]


@dataclass(frozen=True, slots=True)
class OnlineOptions:
    """What ``specdec serve`` can be told about online training.

    Args:
        capture: place of the traces, see ``specdec.online_training.transports``; None: nothing is kept.
        tenants: who opted in; ``anonymous`` where no keys are asked for.
        mode: see ``CaptureOptions``.
        hash_key: file of the key that makes names of tenants; None: ``key`` in the spool.
        redact: drop text with addresses, numbers, keys, or a match of these patterns; None: look for nothing.
        max_bytes: of all traces.
        ttl_s: seconds after which a trace is deleted.
        is_automatic: new versions are tried without being asked for.
    """

    capture: str | None = None
    tenants: tuple[str, ...] = ()
    mode: str = "tokens"
    hash_key: Path | None = None
    redact: tuple[str, ...] | None = None
    max_bytes: int = 2**30
    ttl_s: float = 86_400.0
    is_automatic: bool = True

    def __post_init__(self) -> None:
        if self.capture is not None and not self.tenants:
            raise ConfigError("capturing needs tenants who opted in: name each with --capture-tenant (anonymous: all)")
        if self.capture is None and self.tenants:
            raise ConfigError("tenants can opt in to a capture only: give --capture")


@dataclass(slots=True)
class Online:
    """The running parts; each may be absent."""

    capture: TraceCapture | None = None
    versioned: VersionedDrafter | None = None
    guardian: Guardian | None = None
    forget: Callable[[str], tuple[int, int]] | None = None  # tenant -> (shards deleted, versions marked)
    observers: list[Any] = field(default_factory=list)

    def start(self) -> None:
        """Begin to follow the registry."""
        if self.guardian is not None:
            self.guardian.start()

    def close(self) -> None:
        """Write what was captured and end the threads."""
        if self.guardian is not None:
            self.guardian.stop()
        if self.capture is not None:
            self.capture.close()


def build_online(
    options: OnlineOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    choices: Choices,
    drafters: Sequence[Drafter],
) -> Online:
    """The parts that the options ask for, before the engine is built around the model.

    Raises:
        ConfigError: two drafters come from registries, or states are wanted that no drafter reads.
        UnsupportedError: what online training needs is not installed.
        LoadError: a directory cannot be made or read.
    """
    online = Online()
    registries = [one for one in drafters if hasattr(one, "version_in")]
    if len(registries) > 1:
        raise ConfigError("at most one drafter of a server can come from a registry")
    if not registries and options.capture is None:
        return online
    try:
        _add_registry(online, options, registries)
        _add_capture(online, options, model, tokenizer, choices, drafters)
    except ImportError as error:
        raise UnsupportedError(
            f"capturing needs the extra `train` (pip install 'specdec-toolkit[train]'): {error}"
        ) from error
    return online


def _add_registry(online: Online, options: OnlineOptions, registries: Sequence[Any]) -> None:
    from specdec.online_training.guardian import Guardian

    for versioned in registries:
        online.versioned = versioned
        registry = versioned.registry
        kind = registry.manifest(versioned.version_in("current")).kind
        online.guardian = Guardian(registry, versioned, kind=kind, is_automatic=options.is_automatic)


def _add_capture(
    online: Online,
    options: OnlineOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    choices: Choices,
    drafters: Sequence[Drafter],
) -> None:
    if options.capture is None:
        return
    from specdec.online_training.capture import CaptureOptions, TraceCapture
    from specdec.online_training.fingerprint import fingerprint
    from specdec.online_training.privacy import Consent, KeyedHash, Redactor
    from specdec.online_training.spool import SpoolLimits
    from specdec.online_training.transports import open_transport

    if options.mode != "tokens" and not any(one.needs.hidden_layers for one in drafters):
        raise ConfigError(f"capture mode {options.mode} keeps states that a drafter reads, and no drafter reads any")
    is_local = "://" not in options.capture
    if not is_local and options.hash_key is None:
        raise ConfigError("traces that leave this machine need a hash key that all servers share: give --hash-key")
    sink = open_transport(options.capture, SpoolLimits(options.max_bytes, options.ttl_s))
    hashes = KeyedHash.of_file(options.hash_key or Path(options.capture).expanduser() / "key")
    versioned = online.versioned

    def drafter_of(request_id: str) -> tuple[str, int]:
        return choices.of(request_id).drafter, versioned.version_of(request_id) if versioned is not None else 0

    online.capture = TraceCapture(
        sink, consent=Consent(frozenset(options.tenants)), hashes=hashes, target=fingerprint(model),
        options=CaptureOptions(mode=options.mode),  # type: ignore[arg-type]  # checked there
        redactor=None if options.redact is None else Redactor(options.redact),
        decode=lambda ids: str(tokenizer.decode(list(ids))), drafter_of=drafter_of,
        opts_out=lambda request_id: choices.of(request_id).is_private,
    )  # fmt: skip
    online.observers.append(online.capture)

    def forget(tenant: str) -> tuple[int, int]:
        hashed = hashes.text(tenant)
        registry = versioned.registry if versioned is not None else None
        marked = registry.mark_tenant(hashed, "it learned from a forgotten tenant") if registry is not None else []
        return len(sink.forget(hashed)), len(marked)

    online.forget = forget
