"""The service as a Ray Serve deployment: several replicas of one engine each behind Ray's HTTP proxy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from specdec.errors import UnsupportedError
from specdec.server.app import create_app
from specdec.server.service import Service

__all__ = ["deployment"]


def deployment(
    make_service: Callable[[], Service], *, num_replicas: int, max_ongoing_requests: int, num_gpus: float = 0.0
) -> Any:
    """A Ray Serve application whose replicas each load a model and serve the OpenAI API.

    Args:
        make_service: called once in each replica's process; must be picklable.
        num_replicas: engines.
        max_ongoing_requests: that one replica holds; Ray queues what is beyond.
        num_gpus: of each replica.

    Returns:
        What ``ray.serve.run`` takes.

    Raises:
        UnsupportedError: the extra ``ray`` is not installed.
    """
    try:
        serve: Any = importlib.import_module("ray.serve")  # untyped, and installed by few
    except ImportError as error:
        raise UnsupportedError(f"this needs the extra `ray` (pip install 'specdec-toolkit[ray]'): {error}") from error

    def make_app() -> FastAPI:
        return create_app(make_service())

    @serve.deployment(
        name="specdec",
        num_replicas=num_replicas,
        max_ongoing_requests=max_ongoing_requests,
        ray_actor_options={"num_gpus": num_gpus},
    )
    @serve.ingress(make_app)
    class Replica:
        pass

    bound: Any = Replica
    return bound.bind()
