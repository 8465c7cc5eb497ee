"""Options of an engine: each with its unit, its rule and the reason for its default."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specdec.errors import ConfigError

__all__ = ["EngineConfig"]


class EngineConfig(BaseModel):
    """How much an engine takes on at a time.

    Raises:
        ConfigError: through ``EngineConfig.of``: one line per field that breaks its rule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_batch_size: int = Field(default=16, ge=1, description="most requests decoded in one step")
    max_prefill_tokens: int = Field(
        default=512, ge=1, description="most prompt tokens per step: a longer prompt is cut, so that others go on"
    )
    max_length: int | None = Field(default=None, ge=2, description="most tokens of one request; None: the model's own")
    kv_tokens: int | None = Field(
        default=None, ge=2, description="tokens that the KV pool holds over all requests; None: from free memory"
    )

    prefix_cache: bool = Field(
        default=False,
        description="keep the KV of finished requests, while its room is not needed, for requests of the same tenant"
        " that begin alike; without effect on models off the tree path and with drafters that read hidden states",
    )

    packed: Literal["auto", True, False] = Field(
        default="auto",
        description="keep linear weights in the layout that the CPU multiplies fastest; auto: where that is possible",
    )

    numerics: Literal["default", "strict"] = Field(
        default="default",
        description="strict: a token's logits have the same bits however it is decoded, at some cost",
    )

    kernels: Literal["auto", "triton", "torch"] = Field(
        default="auto",
        description="who attends and draws: Triton kernels on a GPU (prompt chunks by flash attention where that is "
        "the faster one), torch elsewhere, or one of them by name",
    )

    graphs: Literal["auto", True, False] = Field(
        default="auto",
        description="capture the target's steps of up to 256 tokens as CUDA graphs at the start; auto: where that is "
        "possible",
    )

    costs: Literal["learn", "measure"] = Field(
        default="learn",
        description="where an adaptive controller has its times from: learn: from the steps themselves; measure: from "
        "a few seconds at the start, kept in the user's cache for the next one",
    )

    overlap: Literal["auto", "off", "halves", "chunks"] = Field(
        default="auto",
        description="draft for half of the batch while the other half is verified, or verify drafts in chunks of "
        "levels; auto: where the measured costs promise a gain and a trial has found it",
    )
    overlap_sms: int = Field(
        default=0, ge=0, description="multiprocessors of a green context for drafting beside verification; 0: none"
    )

    @classmethod
    def of(cls, **options: Any) -> EngineConfig:
        """Validate ``options``; every broken rule becomes one line of one ``ConfigError``."""
        try:
            return cls(**options)
        except ValidationError as error:
            lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())
            raise ConfigError("; ".join(lines)) from None
