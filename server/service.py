"""What a running service is made of, and what its operator can tell it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specdec.server.exchange import Mailboxes
from specdec.server.keys import Keyring
from specdec.server.metrics import ServerMetrics
from specdec.server.online import Online
from specdec.server.prompts import Serving
from specdec.server.speculation import Choices
from specdec.server.tracing import NoTracer, RequestTracer
from specdec.server.worker import EngineWorker, Update

__all__ = ["Service", "ServiceOptions"]


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """How a service behaves towards its clients.

    Args:
        deadline_s: seconds that one request may take; None: no limit.
        max_body_bytes: of a request.
        has_metrics: answers carry what speculation did; off where tenants must not see each other's traces.
        drain_s: seconds that live requests get at shutdown.
    """

    deadline_s: float | None = 600.0
    max_body_bytes: int = 8 * 2**20
    has_metrics: bool = True
    drain_s: float = 30.0


@dataclass(slots=True)
class Service:
    """Everything a request needs; made by ``specdec.server.launch``.

    Args:
        serving: the model and its limits.
        choices: the drafters that requests may choose.
        make_worker: builds the worker around a function that takes its updates.
        keys: who is let in.
        make_metrics: builds the metrics of a worker.
        options: see ``ServiceOptions``.
        tracer: makes the spans of requests.
        online: captures traffic and follows a registry.
        admin_keys: who may use ``/admin``; None: nobody.
    """

    serving: Serving
    choices: Choices
    make_worker: Callable[[Callable[[Sequence[Update]], None]], EngineWorker]
    keys: Keyring
    make_metrics: Callable[[EngineWorker], ServerMetrics]
    options: ServiceOptions = field(default_factory=ServiceOptions)
    tracer: RequestTracer = field(default_factory=NoTracer)
    online: Online = field(default_factory=Online)
    admin_keys: Keyring | None = None
    worker: EngineWorker = field(init=False)
    mailboxes: Mailboxes = field(init=False)
    metrics: ServerMetrics = field(init=False)

    def start(self) -> None:
        """Start the engine's thread; on the event loop that will serve."""
        self.mailboxes = Mailboxes(asyncio.get_running_loop())
        self.worker = self.make_worker(self.mailboxes.deliver)
        self.metrics = self.make_metrics(self.worker)
        self.worker.start()
        self.online.start()
