"""The requests of the OpenAI API that this server takes, as pydantic models: every field with its rule.

A field that changes the text is honoured or refused, never dropped. ``ACCEPTED`` names the fields of the official
clients that have no effect on the text and are therefore let through unread.

Source: the OpenAI API reference (chat completions, completions); ``top_k``, ``min_p``, ``repetition_penalty``,
``min_tokens``, ``stop_token_ids``, ``ignore_eos``, ``return_token_ids``, ``prompt_logprobs``, ``prompt_logprob_start``
and ``chat_template_kwargs`` as in vLLM.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "GenerationRequest",
    "Prediction",
    "ResponseFormat",
    "SpeculativeOptions",
    "StreamOptions",
]

ACCEPTED = frozenset(
    {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
_MAX_CHOICES = 128
_MAX_LOGPROBS = 20
_MAX_STOPS = 16


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpeculativeOptions(_Strict):
    """How one request is speculated on. The text does not depend on it."""

    enabled: bool = Field(default=True, description="False: plain decoding")
    max_tokens: int | None = Field(default=None, ge=0, description="most draft tokens per step")
    drafter: str | None = Field(default=None, description="one of the drafters that the server was started with")
    trace: bool = Field(default=False, description="also return every step's draft tree")


class StreamOptions(_Strict):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False

    @model_validator(mode="after")
    def _no_obfuscation(self) -> StreamOptions:
        if self.include_obfuscation:
            raise ValueError("include_obfuscation is not supported")
        return self


class GenerationRequest(_Strict):
    """What both kinds of request share."""

    model: str | None = None
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, le=2**31 - 1, description="0 or -1 = off")
    min_p: float = Field(default=0.0, ge=0, le=1)
    n: int = Field(default=1, ge=1, le=_MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = Field(default_factory=list, max_length=64)
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0, le=2**31 - 1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    logit_bias: dict[int, float] = Field(default_factory=dict, max_length=1024)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=256)
    speculative: SpeculativeOptions = SpeculativeOptions()
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_has_no_effect(cls, data: Any) -> Any:
        """Drop fields that clients send and that do nothing, and those that are given as null."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if name not in ACCEPTED and value is not None}

    @model_validator(mode="after")
    def _rules_between_fields(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream = true")
        if len(self.stop_strings) > _MAX_STOPS or not all(self.stop_strings):
            raise ValueError(f"stop must be at most {_MAX_STOPS} non-empty strings")
        if any(not -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise ValueError("logit_bias values must be in [-100, 100]")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage_chunk(self) -> bool:
        """A stream ends with a chunk that holds the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(default=16, ge=1, le=2**31 - 1)
    logprobs: int | None = Field(default=None, ge=0, le=_MAX_LOGPROBS)
    echo: Literal[False] = False
    best_of: int | None = None
    suffix: None = None
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=_MAX_LOGPROBS, description="list so many alternatives to each token of the prompt"
    )
    prompt_logprob_start: int = Field(default=0, ge=0, description="tokens up to this index are not scored")

    @model_validator(mode="after")
    def _prompt_scores_come_whole(self) -> CompletionRequest:
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs needs stream = false")
        return self

    @model_validator(mode="after")
    def _best_of_is_n(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of must equal n: choices are not ranked")
        return self

    @property
    def limit(self) -> int | None:
        """Most new tokens; None: what the context leaves."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives are listed per token; None: no log-probabilities at all."""
        return self.logprobs


class ChatMessage(BaseModel):
    """One message; the chat template decides which roles and further keys it knows."""

    model_config = ConfigDict(extra="allow", frozen=True)

    role: str = Field(min_length=1, max_length=64)
    content: str | list[dict[str, Any]] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates read it: content as one string.

        Raises:
            ValueError: a part of the content is no text.
        """
        message = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            wrong = [part.get("type") for part in self.content if part.get("type") != "text"]
            if wrong or not all(isinstance(part.get("text"), str) for part in self.content):
                raise ValueError(f"message content must be text, got parts of type {wrong}")
            message["content"] = "".join(part["text"] for part in self.content)
        message.setdefault("content", "")
        return message


class ResponseFormat(BaseModel):
    """The form that the answer must have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        has_schema = self.json_schema is not None and isinstance(self.json_schema.get("schema"), dict)
        if (self.type == "json_schema") != has_schema:
            raise ValueError("response_format of type json_schema needs json_schema.schema, other types have none")
        return self


class Prediction(_Strict):
    """Text that the answer is expected to repeat; drafts come from it first."""

    type: Literal["content"]
    content: str | list[dict[str, Any]]

    @property
    def text(self) -> str:
        """The expected text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(str(part.get("text", "")) for part in self.content)


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=10_000)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=_MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=128)
    tool_choice: str | dict[str, Any] | None = None
    prediction: Prediction | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        return self

    @property
    def limit(self) -> int | None:
        """Most new tokens; None: what the context leaves."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives are listed per token; None: no log-probabilities at all."""
        return self.top_logprobs if self.logprobs else None
