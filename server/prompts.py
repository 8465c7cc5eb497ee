"""From a request's body to what the engine runs: token ids, sampling parameters, one job per choice."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.errors import RequestError, UnsupportedError
from specdec.online_training.privacy import Consent
from specdec.server.speculation import Choices
from specdec.server.tools import forced_schemas
from specdec.server.wire import ChatRequest, CompletionRequest, GenerationRequest
from specdec.server.worker import Job
from specdec.types import IntArray, Request, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from specdec.server.grammar import GrammarCompiler

__all__ = ["Serving", "chat_grammar", "chat_prompt", "completion_prompts", "jobs_of", "marked_private"]

_SEED_STRIDE = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the choices of a request get well-separated seeds


@dataclass(frozen=True, slots=True, eq=False)
class Serving:
    """What is served.

    Args:
        name: model name of the API.
        tokenizer: the model's.
        eos_ids: tokens that end an output.
        max_length: most tokens of prompt and output together.
        max_prompts: most prompts of one request.
        aliases: further names that the model answers to.
        grammars: the compiler of grammars, made when it is first asked for.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    eos_ids: tuple[int, ...]
    max_length: int
    max_prompts: int = 64
    aliases: tuple[str, ...] = ()
    grammars: Callable[[], GrammarCompiler] = field(kw_only=True)


def chat_prompt(serving: Serving, body: ChatRequest) -> list[int]:
    """The token ids of a conversation in the model's chat template.

    Raises:
        RequestError: the template refuses the conversation.
        UnsupportedError: the tokenizer has no chat template.
    """
    tokenizer: Any = serving.tokenizer
    if not tokenizer.chat_template:
        raise UnsupportedError(f"the tokenizer of {serving.name} has no chat template: use /v1/completions")
    try:
        messages = [message.for_template() for message in body.messages]
        text = tokenizer.apply_chat_template(
            messages, tools=body.tools, add_generation_prompt=True, tokenize=False, **body.chat_template_kwargs
        )
    except Exception as error:  # a template is a program of the model's authors: it raises what it likes
        raise RequestError(f"messages do not fit the model's chat template: {error}") from error
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def chat_grammar(serving: Serving, body: ChatRequest) -> str | None:
    """The grammar that a chat answer must follow, or None.

    Raises:
        RequestError: the wanted form is malformed, or two forms are wanted at once.
        UnsupportedError: the tokenizer cannot be constrained.
    """
    schemas = forced_schemas(body)
    wanted = body.response_format.type if body.response_format is not None else "text"
    if schemas is not None and wanted != "text":
        raise RequestError("response_format and a tool_choice that forces a call exclude each other")
    if schemas is not None:
        return serving.grammars().tool_calls(schemas)
    if wanted == "text" or body.response_format is None:
        return None
    stated = body.response_format.json_schema
    return serving.grammars().json_schema(stated["schema"] if stated is not None else None)


def completion_prompts(serving: Serving, body: CompletionRequest) -> list[list[int]]:
    """The prompts of a completion request as token ids.

    Raises:
        RequestError: there is none, one is empty, or there are too many.
    """
    given = body.prompt
    several: list[Any] = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
    if not 1 <= len(several) <= serving.max_prompts:
        raise RequestError(f"prompt must hold 1 to {serving.max_prompts} prompts, got {len(several)}")
    tokenizer: Any = serving.tokenizer
    prompts = [tokenizer(one)["input_ids"] if isinstance(one, str) else list(one) for one in several]
    if not all(prompts):
        raise RequestError("prompt must not be empty")
    return prompts


def jobs_of(
    serving: Serving,
    choices: Choices,
    body: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    *,
    request_id: str,
    tenant: str,
    limit: int | None,
    num_logprobs: int | None,
    has_steps: bool,
    hint: str | None = None,
    grammar: str | None = None,
) -> list[Job]:
    """One job per prompt and choice, in the order of the choices that the client gets.

    Args:
        serving: what is served.
        choices: the drafters that may be chosen.
        body: the request.
        prompts: token ids, one list per prompt.
        request_id: of the whole request; jobs get it with their index.
        tenant: whose text this is.
        limit: most new tokens; None: what the context leaves.
        num_logprobs: alternatives per token, None: no log-probabilities.
        has_steps: the answer will tell of its steps.
        hint: text that the answer is expected to repeat.
        grammar: that the answer must follow, see ``Serving.grammars``.

    Raises:
        RequestError: a value breaks its rule; the message names it.
    """
    wishes = body.speculative
    hint_ids = _hint_ids(serving, hint)
    choice = choices.choice(wishes.drafter, wishes.max_tokens if wishes.enabled else 0, hint_ids=hint_ids)
    seed = secrets.randbits(64) if body.seed is None else body.seed % 2**64
    jobs: list[Job] = []
    for prompt in prompts:
        sampling = _sampling(serving, body, prompt, limit)
        for _ in range(body.n):
            index, own = len(jobs), choice
            law = replace(sampling, seed=(seed + index * _SEED_STRIDE) % 2**64)
            if grammar is not None:
                processor = serving.grammars().processor(grammar, len(prompt))
                law, own = replace(law, logits_processors=(processor,)), replace(choice, trim=processor.trim)
            request = Request(f"{request_id}-{index}", np.asarray(prompt), law, tenant)
            jobs.append(Job(request, own, num_logprobs, has_steps, wishes.trace))
    return jobs


def _hint_ids(serving: Serving, hint: str | None) -> IntArray | None:
    if not hint:
        return None
    tokenizer: Any = serving.tokenizer
    ids = tokenizer(hint, add_special_tokens=False)["input_ids"][: serving.max_length]
    return np.asarray(ids, dtype=np.int32) if ids else None


def _sampling(serving: Serving, body: GenerationRequest, prompt: Sequence[int], limit: int | None) -> SamplingParams:
    room = serving.max_length - len(prompt)
    if room < 1:
        raise RequestError(
            f"the prompt must be shorter than the context of {serving.max_length} tokens, got {len(prompt)}"
        )
    if limit is not None and limit > room:
        raise RequestError(
            f"max_tokens must fit the context of {serving.max_length} tokens: {len(prompt)} are the prompt, {limit} "
            f"were asked for"
        )
    if body.min_tokens > (limit or room):
        raise RequestError(f"min_tokens must be at most max_tokens = {limit or room}, got {body.min_tokens}")
    return SamplingParams(
        temperature=body.temperature,
        top_k=max(body.top_k, 0),
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        min_new_tokens=body.min_tokens,
        max_new_tokens=limit or room,
        logit_bias=dict(body.logit_bias),
        stop_token_ids=(*(() if body.ignore_eos else serving.eos_ids), *body.stop_token_ids),
        stop_strings=body.stop_strings,
    )


def marked_private(jobs: Sequence[Job], headers: Mapping[str, str]) -> list[Job]:
    """The jobs; they are never captured if the request's headers forbid it."""
    if not Consent.opts_out(headers):
        return list(jobs)
    return [replace(job, choice=replace(job.choice, is_private=True)) for job in jobs]
