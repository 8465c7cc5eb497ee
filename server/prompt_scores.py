"""Log-probabilities of a prompt's own tokens, as vLLM's field ``prompt_logprobs`` asks for them.

The tokens behind the start are put out by a request that may say nothing else, with all of them drafted: their scores
are those of the very forward that verifies drafts, many tokens at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from specdec.errors import RequestError
from specdec.server.exchange import conversation
from specdec.server.generation import EngineError
from specdec.server.service import Service
from specdec.server.watch import TokenLogprob
from specdec.server.worker import Job
from specdec.types import IntArray, Request, SamplingParams

__all__ = ["Script", "prompt_scores"]

_LEAST = -9999.0  # JSON knows no infinity


async def prompt_scores(service: Service, job: Job, *, num_top: int, start: int) -> list[dict[str, Any] | None]:
    """A row for each token of a job's prompt.

    Args:
        service: whose worker runs it.
        job: the request whose prompt is scored.
        num_top: alternatives per token.
        start: index of the last token that is not scored; the first token of a prompt never is.

    Returns:
        None, or token id -> ``logprob``, ``rank`` and ``decoded_token``: the prompt's token and the likeliest ones.

    Raises:
        RequestError: the start lies behind the prompt.
        EngineError: the engine failed.
    """
    prompt = job.request.prompt_ids
    if start >= len(prompt):
        raise RequestError(f"prompt_logprob_start must be below the prompt's {len(prompt)} tokens, got {start}")
    rows: list[dict[str, Any] | None] = [None] * len(prompt)
    rest = prompt[start + 1 :]
    if not len(rest):
        return rows
    forced = Script(rest, start + 1)
    request = Request(
        f"{job.request.request_id}-scores",
        prompt[: start + 1],
        SamplingParams(temperature=0.0, max_new_tokens=len(rest), logits_processors=(forced,)),
        job.request.tenant,
    )
    choice = replace(job.choice, hint_ids=None, trim=None, is_private=True, script_ids=np.asarray(rest, np.int32))
    scores = await _run(service, Job(request, choice, num_logprobs=num_top))
    rows[start + 1 :] = [_row(score, service.serving.tokenizer) for score in scores]
    return rows


async def _run(service: Service, job: Job) -> list[TokenLogprob]:
    scores: list[TokenLogprob] = []
    talk = conversation(service.worker, service.mailboxes, [job], deadline_s=service.options.deadline_s)
    async with talk as updates:
        async for _, update in updates:
            if update.error is not None:
                raise RequestError(update.error) if update.is_refused else EngineError(update.error)
            scores += update.notes.logprobs if update.notes is not None else []
    return scores


class Script:
    """Lets one token pass at each position (a logits processor of one request).

    Args:
        token_ids: [S] int32: of the output, in order.
        num_prompt_tokens: they come after so many.
    """

    def __init__(self, token_ids: IntArray, num_prompt_tokens: int) -> None:
        self.token_ids, self._num_prompt_tokens = token_ids, num_prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[1, V] scores with minus infinity everywhere else; behind the script's end they are left alone."""
        at = input_ids.shape[-1] - self._num_prompt_tokens
        if at >= len(self.token_ids):
            return scores
        only = torch.full_like(scores, -torch.inf)
        only[..., int(self.token_ids[at])] = 0.0
        return only


def _row(score: TokenLogprob, tokenizer: Any) -> dict[str, Any]:
    listed: Mapping[int, tuple[float, int]] = {
        score.token_id: (score.logprob, score.rank),
        **{
            token_id: (value, rank) for rank, (token_id, value) in enumerate(score.top, 1) if token_id != score.token_id
        },
    }
    return {
        str(token_id): {
            "logprob": max(value, _LEAST),
            "rank": rank,
            "decoded_token": tokenizer.decode([token_id]),
        }
        for token_id, (value, rank) in listed.items()
    }
