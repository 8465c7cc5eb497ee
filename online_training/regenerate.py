"""Lets a target answer prompts, so that its drafter learns from its own words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.engine import Engine
from specdec.errors import LoadError
from specdec.online_training.data import Example
from specdec.types import IntArray, Request, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["read_prompts", "regenerate"]

_WAVE = 256  # requests handed to the engine at a time: an interrupted run loses no more than those in flight


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> list[IntArray]:
    """The prompts of a file of JSON lines: ``prompt_ids``, ``prompt``, or ``messages`` (a last answer is left out).

    Raises:
        LoadError: the file cannot be read, or a line is none of these; the message names the line.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"cannot read {path}: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(np.array(_prompt_ids(json.loads(line), tokenizer), dtype=np.int32))
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise LoadError(f"{path}, prompt {number}: {error}") from error
    return prompts


def _prompt_ids(row: Any, tokenizer: Any) -> Sequence[int]:
    if "prompt_ids" in row:
        return list(row["prompt_ids"])
    if tokenizer is None:
        raise ValueError("text needs the target's tokenizer, which has none")
    if "prompt" in row:
        return list(tokenizer(row["prompt"])["input_ids"])
    messages = row["messages"]
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def regenerate(engine: Engine, prompts: Sequence[IntArray], sampling: Sequence[SamplingParams]) -> Iterator[Example]:
    """The target's answer to each prompt, in the order in which they are done.

    Args:
        engine: of the target; any lossless drafter gives the same answers.
        prompts: [P] int32 each.
        sampling: how each is answered.
    """
    for start in range(0, len(prompts), _WAVE):
        some = range(start, min(start + _WAVE, len(prompts)))
        for output in engine.generate(Request(str(i), prompts[i], sampling[i]) for i in some):
            if output.finish_reason is not None:
                yield Example(output.state.token_ids.astype(np.int32), output.state.num_prompt_tokens)
