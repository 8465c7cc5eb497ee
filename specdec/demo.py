"""The main job on real input: the bundled model edits real Python source, plainly and with a drafter.

The source is the running interpreter's own standard library: functions and classes from files that the model was not
trained on. Plain decoding is the same engine with budget 0, so the comparison changes one thing only.
"""

from __future__ import annotations

import difflib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from specdec.bench.edit_tasks import EditTask
from specdec.build import build_engine, model_max_length
from specdec.routes import Route, choose_route
from specdec.types import IntArray, Request, RequestState, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DemoResult", "EditResult", "run_demo"]


@dataclass(frozen=True, slots=True)
class EditResult:
    """One edit, decoded both ways.

    Args:
        kind: of the edit.
        path: of the source file, within the standard library.
        instruction: what was asked for.
        diff: of the source against the model's answer, unified.
        is_right: the answer is exactly the reference.
        same_tokens: both ways emitted the same tokens.
        num_prompt_tokens: length of the prompt.
        num_new_tokens: length of the output.
        acceptance_length: mean tokens per target forward with the drafter.
        plain_s: median seconds of plain decoding, prefill included.
        drafted_s: median seconds with the drafter, prefill included.
    """

    kind: str
    path: str
    instruction: str
    diff: str
    is_right: bool
    same_tokens: bool
    num_prompt_tokens: int
    num_new_tokens: int
    acceptance_length: float
    plain_s: float
    drafted_s: float

    @property
    def speedup(self) -> float:
        """Plain time over drafted time."""
        return self.plain_s / self.drafted_s


@dataclass(frozen=True, slots=True)
class DemoResult:
    """All edits of a run, and their totals."""

    drafter: str
    edits: tuple[EditResult, ...]

    @property
    def same_tokens(self) -> bool:
        """Every edit had the same tokens both ways."""
        return all(edit.same_tokens for edit in self.edits)

    @property
    def speedup(self) -> float:
        """Total plain time over total drafted time."""
        return sum(edit.plain_s for edit in self.edits) / sum(edit.drafted_s for edit in self.edits)

    @property
    def tokens_per_s(self) -> tuple[float, float]:
        """(plain, drafted): output tokens per second over all edits."""
        total = sum(edit.num_new_tokens for edit in self.edits)
        plain, drafted = (sum(times) for times in zip(*((e.plain_s, e.drafted_s) for e in self.edits), strict=True))
        return total / plain, total / drafted


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[EditTask],
    *,
    drafter: str = "ngram",
    budget: int | None = None,
    repeats: int = 3,
    on_progress: Callable[[], None] = lambda: None,
) -> DemoResult:
    """Carry out every task plainly and with ``drafter``, alternating, ``repeats`` times each after a warm-up.

    Args:
        model: the target.
        tokenizer: with a chat template.
        tasks: what to edit.
        drafter: name of the drafter.
        budget: most draft tokens per step; None: the default.
        repeats: timed runs of each way; the median counts.
        on_progress: called after every finished edit.
    """
    route = choose_route(model, max_length=model_max_length(model))
    edits = []
    for task in tasks:
        edits.append(_run_edit(model, tokenizer, task, drafter, budget, repeats, route))
        on_progress()
    return DemoResult(drafter, tuple(edits))


def _run_edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: EditTask,
    drafter: str,
    budget: int | None,
    repeats: int,
    route: Route,
) -> EditResult:
    message = [{"role": "user", "content": task.user}]
    encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
    prompt = np.asarray(encoded["input_ids"], dtype=np.int32)
    room = int(model.config.get_text_config().max_position_embeddings) - len(prompt)
    limit = min(room, len(tokenizer.encode(task.answer)) * 5 // 4 + 16)  # an answer that runs on is cut
    sampling = SamplingParams(max_new_tokens=limit, stop_token_ids=_eos_ids(model))
    plain: list[tuple[float, RequestState]] = []
    drafted: list[tuple[float, RequestState]] = []
    for _ in range(repeats + 1):
        plain.append(_decode(model, "none", 0, prompt, sampling, route))
        drafted.append(_decode(model, drafter, budget, prompt, sampling, route))
    state = drafted[-1][1]
    answer = tokenizer.decode(state.output_ids, skip_special_tokens=True)
    return EditResult(
        kind=task.kind,
        path=task.path,
        instruction=task.instruction,
        diff=_diff(task.source, answer, task.path),
        is_right=answer.strip() == task.answer.strip(),
        same_tokens=plain[-1][1].output_ids.tolist() == state.output_ids.tolist(),
        num_prompt_tokens=len(prompt),
        num_new_tokens=state.num_output_tokens,
        acceptance_length=state.num_output_tokens / state.num_steps,
        plain_s=statistics.median(seconds for seconds, _ in plain[1:]),
        drafted_s=statistics.median(seconds for seconds, _ in drafted[1:]),
    )


def _decode(
    model: PreTrainedModel, drafter: str, budget: int | None, prompt: IntArray, sampling: SamplingParams, route: Route
) -> tuple[float, RequestState]:
    kv_tokens = len(prompt) + sampling.max_new_tokens + 512
    engine = build_engine(
        model, drafter, budget=budget, route=route, kv_tokens=kv_tokens, max_batch_size=1, max_prefill_tokens=4096
    )
    start = perf_counter()
    state = engine.submit(Request("edit", prompt, sampling))
    while engine.has_work:
        engine.step()
    return perf_counter() - start, state


def _eos_ids(model: PreTrainedModel) -> tuple[int, ...]:
    eos = model.generation_config.eos_token_id
    return () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (int(eos),)


def _diff(source: str, answer: str, path: str) -> str:
    body = answer.strip().removeprefix("```python\n").removesuffix("```")
    lines = difflib.unified_diff(source.splitlines(), body.splitlines(), f"a/{path}", f"b/{path}", n=1, lineterm="")
    return "\n".join(lines)
