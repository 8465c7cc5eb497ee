"""From a loaded model and options to a service, and from a service to a running server."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import uvicorn

from specdec.adaptive import controller_for
from specdec.build import build_engine, compile_ahead, load_drafter
from specdec.drafters.checkpoint import short_name
from specdec.server.app import create_app
from specdec.server.keys import Keyring
from specdec.server.listening import listen
from specdec.server.metrics import ServerMetrics
from specdec.server.online import OnlineOptions, build_online
from specdec.server.prompts import Serving
from specdec.server.service import Service, ServiceOptions
from specdec.server.speculation import CappedController, Choices, RoutedDrafter
from specdec.server.tracing import NoTracer, otlp_tracer
from specdec.server.watch import StepWatcher
from specdec.server.worker import EngineWorker, Update, longest_request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from specdec.server.grammar import GrammarCompiler

__all__ = ["ServerOptions", "build_service", "listen", "serve"]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What ``specdec serve`` can be told.

    Args:
        name: model name of the API.
        drafters: names; the first is the default. Clients see and use them without folders of checkpoints.
        budget: most draft tokens per step; None: follows what is accepted.
        max_in_flight: most requests that are submitted and not finished.
        metrics_prefix: of all metric names.
        service: towards clients.
        otlp_endpoint: base URL of an OpenTelemetry collector; None: no spans.
        online: capture and versions of drafters that learn.
        engine: fields of ``EngineConfig``.
    """

    name: str
    drafters: tuple[str, ...] = ("ngram",)
    budget: int | None = None
    max_in_flight: int = 256
    metrics_prefix: str = "specdec:"
    service: ServiceOptions = field(default_factory=ServiceOptions)
    otlp_endpoint: str | None = None
    online: OnlineOptions = field(default_factory=OnlineOptions)
    engine: dict[str, Any] = field(default_factory=dict)


def build_service(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    options: ServerOptions,
    keys: Keyring | None = None,
    admin_keys: Keyring | None = None,
) -> Service:
    """A service around a model.

    Args:
        model: the target, in evaluation mode.
        tokenizer: the model's.
        eos_ids: tokens that end an output.
        options: see ``ServerOptions``.
        keys: who is let in; None: everybody.
        admin_keys: who may use ``/admin``; None: nobody.

    Raises:
        ConfigError: an option breaks its rule.
        UnsupportedError: the model cannot be served.
    """
    tracer = otlp_tracer(options.otlp_endpoint) if options.otlp_endpoint is not None else NoTracer()
    choices = Choices([short_name(name) for name in options.drafters])
    loaded = [load_drafter(name, model, tokenizer) for name in options.drafters]
    drafter = RoutedDrafter(dict(zip(choices.drafters, loaded, strict=True)), choices)
    planner = controller_for(loaded, options.budget)
    watcher = StepWatcher()
    online = build_online(options.online, model, tokenizer, choices, loaded)
    engine = build_engine(
        model, drafter, controller=CappedController(planner, choices), tokenizer=tokenizer,
        observers=[watcher, *online.observers], **options.engine,
    )  # fmt: skip
    compile_ahead(*loaded, engine.verifier)
    max_length = min(engine.target.max_length, longest_request(engine))

    @cache
    def grammars() -> GrammarCompiler:
        from specdec.server.grammar import GrammarCompiler  # its library is loaded by who wants a grammar

        return GrammarCompiler(tokenizer, eos_ids)

    serving = Serving(options.name, tokenizer, tuple(eos_ids), max_length, grammars=grammars)

    def make_worker(deliver: Callable[[Sequence[Update]], None]) -> EngineWorker:
        return EngineWorker(engine, choices, watcher, deliver, max_in_flight=options.max_in_flight)

    def make_metrics(worker: EngineWorker) -> ServerMetrics:
        return ServerMetrics(
            worker, model=options.name, drafter=choices.drafters[0], prefix=options.metrics_prefix, online=online
        )

    return Service(
        serving, choices, make_worker, keys or Keyring(), make_metrics, options.service, tracer, online, admin_keys
    )


def serve(service: Service, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; then take no more requests, finish those in flight, and return."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    config = uvicorn.Config(
        create_app(service), log_level="warning", access_log=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(service.options.drain_s)),
    )  # fmt: skip
    # uvicorn raises the signal that ended it once more when it is done; a server that stopped as it was told exits 0.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(config).run(sockets=[bound])
