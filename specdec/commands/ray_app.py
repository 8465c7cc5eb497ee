"""``serve run specdec.commands.ray_app:app model=PATH num_replicas=2``: the server as a Ray Serve application."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specdec.commands.loading import DTypeName, load_model
from specdec.errors import ConfigError

if TYPE_CHECKING:
    from specdec.server.service import Service

__all__ = ["RayArguments", "app"]


class RayArguments(BaseModel):
    """What the application takes, as ``name=value`` on Ray's command line or under ``args`` of its configuration file.

    Without ``key_file`` everybody who reaches Ray's proxy is served: by default that is this machine alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    num_replicas: int = Field(default=1, ge=1)
    num_gpus: float = Field(default=0.0, ge=0)
    drafters: str = "ngram"  # names with commas between them; the first is the default
    budget: int | None = Field(default=None, ge=0)
    max_batch_size: int = Field(default=16, ge=1)
    max_in_flight: int = Field(default=256, ge=1)
    max_length: int | None = Field(default=None, ge=2)
    kv_tokens: int | None = Field(default=None, ge=2)
    key_file: Path | None = None
    dtype: DTypeName = "auto"
    device: str = "auto"


def app(args: dict[str, Any]) -> Any:
    """The application for ``ray.serve``.

    Args:
        args: fields of ``RayArguments``.

    Raises:
        ConfigError: a field is unknown, missing or breaks its rule.
        UnsupportedError: the extra ``ray`` is not installed.
    """
    from specdec.server.ray_deployment import deployment

    try:
        wanted = RayArguments(**args)
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())
        raise ConfigError("; ".join(lines)) from None
    return deployment(
        partial(_service, wanted), num_replicas=wanted.num_replicas, max_ongoing_requests=wanted.max_in_flight,
        num_gpus=wanted.num_gpus,
    )  # fmt: skip


def _service(args: RayArguments) -> Service:
    from specdec.server.keys import Keyring
    from specdec.server.launch import ServerOptions, build_service

    loaded = load_model(args.model, dtype=args.dtype, device=args.device)
    engine = {
        "max_batch_size": args.max_batch_size, "max_length": args.max_length, "kv_tokens": args.kv_tokens,
        "prefix_cache": True,
    }  # fmt: skip
    options = ServerOptions(
        name=Path(args.model).name,
        drafters=tuple(args.drafters.split(",")),
        budget=args.budget,
        max_in_flight=args.max_in_flight,
        engine={name: value for name, value in engine.items() if value is not None},
    )
    assert loaded.tokenizer is not None  # load_model was asked for one
    keys = Keyring.load(args.key_file) if args.key_file is not None else None
    return build_service(loaded.model, loaded.tokenizer, loaded.eos_ids, options, keys)
