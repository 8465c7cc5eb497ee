"""The answers of the OpenAI API, whole and in pieces, made from updates.

``metrics.speculative_decoding`` has the fields of vLLM's response block (``--per-request-spec-decode-metrics``).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from specdec.server.pieces import ChoiceText
from specdec.server.tools import ToolCall, ToolText
from specdec.server.watch import StepNotes, TokenLogprob, TreeNote
from specdec.server.worker import Job, RequestStats, Update

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "Choice", "Kind"]

Kind = Literal["chat", "text"]
_OBJECTS = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("text", False): "text_completion",
    ("text", True): "text_completion",
}


@dataclass(slots=True)
class Choice:
    """One choice as it grows."""

    index: int
    job: Job
    words: ChoiceText
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)
    trees: list[TreeNote] = field(default_factory=list)
    tools: ToolText | None = None
    has_shown: bool = False  # a chunk of a stream
    num_characters: int = 0  # of the tokens whose log-probabilities were shown
    finish_reason: str | None = None
    stats: RequestStats | None = None


class Answer:
    """Everything that one request's answer consists of.

    Args:
        kind: chat or plain completion.
        answer_id: of the answer.
        model: name of the served model.
        jobs: one per choice.
        tokenizer: the model's.
        n: choices per prompt; their jobs stand together.
        has_ids: token ids are part of the answer.
        has_tools: calls of tools are looked for in the text.
    """

    def __init__(
        self,
        kind: Kind,
        answer_id: str,
        model: str,
        jobs: Sequence[Job],
        tokenizer: PreTrainedTokenizerBase,
        *,
        n: int,
        has_ids: bool,
        has_tools: bool = False,
    ) -> None:
        self.kind = kind
        self.created = int(time.time())
        self._id, self._model, self._tokenizer = answer_id, model, tokenizer
        self._n, self._has_ids, self._has_tools = n, has_ids, has_tools
        self.choices = [
            Choice(
                index,
                job,
                ChoiceText(tokenizer, job.request.sampling.stop_strings, job.request.sampling.stop_token_ids),
                tools=ToolText() if has_tools else None,
            )
            for index, job in enumerate(jobs)
        ]

    def take(self, index: int, update: Update) -> dict[str, Any] | None:
        """Add an update to its choice; the choice of a stream's chunk, or None while there is nothing to show."""
        choice = self.choices[index]
        is_last = update.finish_reason is not None
        piece, calls = self._read(choice, update, is_last=is_last)
        notes = update.notes or StepNotes()
        choice.logprobs += notes.logprobs
        choice.steps += notes.steps
        choice.trees += notes.trees
        if not (piece or calls or is_last or notes.logprobs or notes.trees or (self._has_ids and update.new_ids)):
            return None
        shown: dict[str, Any] = {"index": index, "finish_reason": choice.finish_reason}
        shown |= {"delta": _delta(choice, piece, calls)} if self.kind == "chat" else {"text": piece}
        shown["logprobs"] = self._logprobs(choice, notes.logprobs)
        if self._has_ids:
            shown["token_ids"] = list(update.new_ids)
            if not choice.has_shown:
                shown["prompt_token_ids"] = choice.job.request.prompt_ids.tolist()
        choice.has_shown = True
        if notes.trees:
            shown["speculative"] = [self._tree(tree) for tree in notes.trees]
        return shown

    def _read(self, choice: Choice, update: Update, *, is_last: bool) -> tuple[str, list[ToolCall]]:
        """Add tokens to a choice; the text to show and the calls that are complete now."""
        piece, calls = choice.words.feed(update.new_ids, is_last=is_last), list[ToolCall]()
        if choice.tools is not None:
            piece, calls = choice.tools.feed(piece, is_last=is_last)
        choice.text += piece
        choice.token_ids += update.new_ids
        choice.stats = update.stats or choice.stats
        if is_last:
            ended = "tool_calls" if choice.tools is not None and choice.tools.calls else "stop"
            choice.finish_reason = "length" if update.finish_reason == "length" else ended
        return piece, calls

    def first_chunk(self, index: int) -> dict[str, Any]:
        """The chunk that opens a chat choice."""
        delta = {"role": "assistant", "content": ""}
        return self.chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def chunk(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A chunk of a stream."""
        return self._head(is_chunk=True) | {"choices": list(choices)} | more

    def whole(self, *, has_metrics: bool) -> dict[str, Any]:
        """The whole answer."""
        body = self._head(is_chunk=False)
        body["choices"] = [self._whole_choice(choice) for choice in self.choices]
        body["usage"] = self.usage()
        if has_metrics:
            body["metrics"] = self.metrics()
        return body

    def usage(self) -> dict[str, Any]:
        """Token counts; a prompt that several choices share counts once.

        Of a prediction, tokens that stand in the answer in the same order count as accepted, all others as rejected.
        """
        num_prompt = sum(len(choice.job.request.prompt_ids) for choice in self.choices[:: self._n])
        num_new = sum(len(choice.token_ids) for choice in self.choices)
        num_cached = sum(c.stats.num_cached_prompt_tokens for c in self.choices[:: self._n] if c.stats is not None)
        usage: dict[str, Any] = {
            "prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }  # fmt: skip
        hint_ids = self.choices[0].job.choice.hint_ids
        if hint_ids is None:
            return usage
        repeated = sum(_num_repeated(hint_ids.tolist(), choice.token_ids) for choice in self.choices)
        rejected = len(hint_ids) * len(self.choices) - repeated
        details = {"accepted_prediction_tokens": repeated, "rejected_prediction_tokens": rejected}
        return usage | {"completion_tokens_details": details}

    def metrics(self) -> dict[str, Any]:
        """What speculation did, as vLLM reports it; null where several choices would be mixed."""
        if len(self.choices) != 1:
            return {"speculative_decoding": None}
        steps = [(drafted, accepted) for drafted, accepted in self.choices[0].steps if drafted]
        drafted, accepted = sum(step[0] for step in steps), sum(step[1] for step in steps)
        longest = max((step[0] for step in steps), default=0)
        by_length: dict[str, list[int]] = {}
        for num_drafted, num_accepted in steps:
            row = by_length.setdefault(str(num_drafted), [0] * (num_drafted + 1))
            row[num_accepted] += 1
        histogram = Counter(step[1] for step in steps)
        most = max(histogram, default=0)
        block = {
            "mean_acceptance_length": 1 + accepted / len(steps) if steps else 1.0,
            "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
            "acceptance_histogram": [histogram[count] for count in range(most + 1)],
            "acceptance_histogram_by_draft_length": by_length,
            "num_spec_steps": len(steps),
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": drafted,
            "num_spec_tokens": longest,
        }
        return {"speculative_decoding": block}

    def _head(self, *, is_chunk: bool) -> dict[str, Any]:
        name = _OBJECTS[self.kind, is_chunk]
        return {"id": self._id, "object": name, "created": self.created, "model": self._model}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        body: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
        if self.kind == "chat":
            calls = choice.tools.calls if choice.tools is not None else []
            body["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            if calls:
                text = choice.text.strip()
                body["message"] |= {"content": text or None, "tool_calls": [call.as_json() for call in calls]}
        else:
            body["text"] = choice.text
        body["logprobs"] = self._logprobs(choice, choice.logprobs)
        if self._has_ids:
            body["token_ids"] = choice.token_ids
            body["prompt_token_ids"] = choice.job.request.prompt_ids.tolist()
        if choice.trees:
            body["speculative"] = [self._tree(tree) for tree in choice.trees]
        return body

    def _logprobs(self, choice: Choice, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if choice.job.num_logprobs is None:
            return None
        if self.kind == "chat":
            content = [
                self._named(one.token_id, one.logprob) | {"top_logprobs": [self._named(*pair) for pair in one.top]}
                for one in logprobs
            ]
            return {"content": content, "refusal": None}
        tokens = [self._piece(one.token_id) for one in logprobs]
        start = 0 if logprobs is choice.logprobs else choice.num_characters
        offsets = list(accumulate(map(len, tokens), initial=start))
        choice.num_characters = offsets[-1]
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [{self._piece(token_id): value for token_id, value in one.top} for one in logprobs],
            "text_offset": offsets[:-1],
        }

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        piece = self._piece(token_id)
        return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}

    def _piece(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _tree(self, tree: TreeNote) -> dict[str, Any]:
        return {
            "tokens": [self._piece(token_id) for token_id in tree.token_ids],
            "parents": tree.parents,
            "accepted": tree.accepted_nodes,
            "bonus": None if tree.bonus_id is None else self._piece(tree.bonus_id),
        }


def _delta(choice: Choice, piece: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
    """What a chunk adds to a message; calls come whole."""
    delta: dict[str, Any] = {"content": piece} if piece or not calls else {}
    if calls and choice.tools is not None:
        first = len(choice.tools.calls) - len(calls)
        delta["tool_calls"] = [{"index": first + row} | call.as_json() for row, call in enumerate(calls)]
    return delta


def _num_repeated(expected: Sequence[int], token_ids: Sequence[int]) -> int:
    matcher = SequenceMatcher(None, expected, token_ids, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks())
