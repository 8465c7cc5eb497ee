"""``/admin``: drafter versions, their promotion and rollback, and the traces. Behind a key of its own.

Without an admin key file these routes answer 403: an API key never opens them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field

from specdec.errors import ConfigError, LoadError
from specdec.server.keys import Keyring, bearer_tenant

if TYPE_CHECKING:
    from specdec.online_training.registry import Registry
    from specdec.server.online import Online

__all__ = ["add_admin", "versions_of"]

_MAX_EVENTS = 50


class _Forget(BaseModel):
    model_config = ConfigDict(extra="forbid")

    tenant: str = Field(min_length=1, max_length=256)


def versions_of(online: Online) -> dict[str, Any]:
    """Every version with what it is, what it did here, and why it is not served; newest first.

    Raises:
        HTTPException: 404, no drafter comes from a registry.
    """
    registry, versioned = _registry(online), online.versioned
    assert versioned is not None
    state = registry.state()
    rows = []
    for number in reversed(registry.numbers()):
        manifest, counts = registry.manifest(number), versioned.counts.get(number)
        rounds = counts.num_rounds if counts else 0
        rows.append(
            {
                "version": number,
                "parent": manifest.parent,
                "step": manifest.step,
                "published_ms": manifest.ts_ms,
                "heldout_acceptance_length": manifest.acceptance_length,
                "num_rounds": rounds,
                "acceptance_length": (counts.num_accepted / rounds + 1) if counts and rounds else None,
                "not_served": state.marks.get(number),
            }
        )
    roles = {"current": state.current, "canary": state.canary, "pinned": state.pinned}
    serving = {"serving": versioned.version_in("current")}
    return {**roles, **serving, "versions": rows, "events": list(state.events[-_MAX_EVENTS:])}


def add_admin(app: FastAPI, online: Online, keys: Keyring | None) -> None:
    """Add the routes.

    Args:
        app: of the server.
        online: what there is to look after.
        keys: who may; None: nobody.
    """

    async def admin(request: Request) -> None:
        if keys is None:
            raise HTTPException(403, "there is no admin key: start the server with --admin-key-file")
        if bearer_tenant(keys, request.headers) is None:
            raise HTTPException(401, "the admin key is missing or unknown: send Authorization: Bearer KEY")

    may = [Depends(admin)]

    async def decide(what: str, *args: Any) -> dict[str, Any]:
        registry = _registry(online)
        try:
            await run_in_threadpool(partial(getattr(registry, what), *args, "by an administrator"))
        except (ConfigError, LoadError) as error:
            raise HTTPException(409, str(error)) from error
        return await run_in_threadpool(versions_of, online)

    @app.get("/admin/drafters", dependencies=may)
    async def drafters() -> dict[str, Any]:
        return await run_in_threadpool(versions_of, online)

    @app.post("/admin/drafters/rollback", dependencies=may)
    async def rollback() -> dict[str, Any]:
        return await decide("rollback")

    @app.post("/admin/drafters/{version}/promote", dependencies=may)
    async def promote(version: int) -> dict[str, Any]:
        return await decide("promote", version)

    @app.post("/admin/drafters/{version}/pin", dependencies=may)
    async def pin(version: int) -> dict[str, Any]:
        return await decide("pin", version)

    @app.get("/admin/capture", dependencies=may)
    async def capture() -> dict[str, Any]:
        if online.capture is None:
            raise HTTPException(404, "this server captures nothing: see --capture")
        return {"mode": online.capture.options.mode, "requests": dict(online.capture.counts)}

    @app.post("/admin/capture/forget", dependencies=may)
    async def forget(body: _Forget) -> dict[str, int]:
        if online.forget is None:
            raise HTTPException(404, "this server captures nothing: see --capture")
        shards, versions = await run_in_threadpool(online.forget, body.tenant)
        return {"shards_deleted": shards, "versions_marked": versions}


def _registry(online: Online) -> Registry:
    if online.versioned is None or online.versioned.registry is None:
        raise HTTPException(404, "no drafter of this server comes from a registry: see --registry")
    return online.versioned.registry
