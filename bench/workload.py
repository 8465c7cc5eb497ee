"""The work that all arms share: calls of some sources in tokens, with a digest that says it was the same work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from specdec.bench.loaders import OpenTurn, Skips, load_calls, trace_files
from specdec.bench.results_schema import SourceFile, WorkloadInfo
from specdec.bench.traces import Call, Encode, episode_half, messages_of
from specdec.errors import ConfigError
from specdec.types import IntArray

__all__ = [
    "Limits",
    "Parts",
    "Render",
    "WorkItem",
    "Workload",
    "built_in_calls",
    "fingerprint",
    "source_name",
    "template_of",
]

Parts: TypeAlias = Sequence[str | tuple[int, ...]]
Render: TypeAlias = Callable[[Parts], Sequence[int]]

_CHUNK = 1 << 20
_NO_IDS = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of each source is taken: whole episodes until so many calls, and how long a call may be, in tokens.

    Prompts keep their end, answers their beginning; 0 takes everything. ``half`` takes only the episodes of that half
    (``episode_half``): shipped tables were chosen on half 0, so half 1 is what a drafter has never seen.
    ``per_episode`` takes only so many calls of an episode, evenly spaced: more episodes, and their middles, at the same
    cost.
    """

    calls: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    half: int | None = None
    per_episode: int = 0


@dataclass(slots=True, eq=False)
class WorkItem:
    """One call: [P] int32 prompt and [G] int32 answer (empty if none was recorded).

    ``parts`` is kept where the prompt has places for answers that only a live run gives.
    """

    source: str
    trace: str
    prompt_ids: IntArray
    response_ids: IntArray
    parts: tuple[str | tuple[int, ...], ...] | None = None


@dataclass(slots=True)
class Workload:
    """What is asked, and where it came from."""

    items: list[WorkItem]
    files: list[SourceFile]
    skips: Skips = field(default_factory=Skips)

    @classmethod
    def of(
        cls,
        sources: Sequence[tuple[str, Callable[[], Iterator[Call]]]],
        encode: Encode,
        limits: Limits,
        *,
        files: Sequence[SourceFile] = (),
        skips: Skips | None = None,
        render: Render | None = None,
    ) -> Workload:
        """Calls of several sources, tokenized.

        Args:
            sources: (name, function that opens the source).
            encode: text to token ids, without special tokens.
            limits: how much is taken of each.
            files: for the record.
            skips: that the sources count into.
            render: whole prompts to token ids, in place of their parts one by one.

        Raises:
            ConfigError: no call is left.
        """
        items: list[WorkItem] = []
        for name, calls in sources:
            items += _taken(name, calls(), encode, limits, render)
        if not items:
            why = f"; passed over: {skips}" if skips is not None and skips.counts else ""
            raise ConfigError(f"the traces hold no call that can be used{why}")
        return cls(items, list(files), skips or Skips())

    @classmethod
    def from_paths(
        cls, paths: Sequence[Path], encode: Encode, limits: Limits, *, is_strict: bool = False,
        needs_response: bool = True, format: str = "auto", render: Render | None = None,
    ) -> Workload:  # fmt: skip
        """The calls of trace files and folders; each path is a source, of a folder of JSON Lines each file is one."""
        skips = Skips(is_strict=is_strict)
        sources, files = [], []
        for path in paths:
            found = trace_files(path)
            # A folder of .jsonl files is a collection of sources; of .traj or .json files, one run after the other.
            units = found if all(".jsonl" in file.suffixes for file in found) else [path]
            for unit in units:
                name = source_name(unit)
                sources.append((name, _opener(unit, skips, format, needs_response)))
                files += [fingerprint(name, file) for file in trace_files(unit)]
        return cls.of(sources, encode, limits, files=files, skips=skips, render=render)

    def info(self) -> WorkloadInfo:
        """What the result file says about it."""
        digest = hashlib.sha256()
        for item in self.items:
            for ids in (item.prompt_ids, item.response_ids):
                digest.update(len(ids).to_bytes(8, "little"))
                digest.update(ids.tobytes())
        return WorkloadInfo(
            files=self.files,
            num_calls=len(self.items),
            prompt_tokens=sum(len(item.prompt_ids) for item in self.items),
            response_tokens=sum(len(item.response_ids) for item in self.items),
            skipped=dict(self.skips.counts),
            tokens_sha256=digest.hexdigest(),
        )


def template_of(tokenizer: Any) -> Render:
    """Prompts in a tokenizer's own chat template, ready for the answer.

    Raises:
        ConfigError: it has none; when a prompt is rendered: the template refuses it.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template")

    def render(parts: Parts) -> Sequence[int]:
        messages = messages_of(parts)
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template raises
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise ConfigError(f"the chat template refuses messages of {roles}: {error}") from error
        ids: Sequence[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    return render


def source_name(path: Path) -> str:
    """The name of a source without its suffixes."""
    name = path.name
    for suffix in (".gz", ".zst", ".jsonl", ".json", ".traj"):
        name = name.removesuffix(suffix)
    return name


def built_in_calls(count: int, *, seed: int = 0) -> Iterator[Call]:
    """Edits of real source from this machine's own standard library; prompt = instruction and file, answer = the file.

    Raises:
        ConfigError: this installation has no library source.
    """
    from specdec.bench.edit_tasks import heldout_tasks

    for number, task in enumerate(heldout_tasks(count, seed=seed)):
        # One part per message, in the frame of recorded calls.
        yield Call(f"stdlib-edit/{number}", (f"<|user|>\n{task.user}\n",), task.answer)


def _opener(path: Path, skips: Skips, format: str, needs_response: bool) -> Callable[[], Iterator[Call]]:
    return lambda: load_calls(path, skips=skips, format=format, needs_response=needs_response)


def fingerprint(source: str, file: Path) -> SourceFile:
    """What a result says about a trace file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return SourceFile(source=source, name=file.name, nbytes=file.stat().st_size, sha256=digest.hexdigest())


def _taken(
    name: str, calls: Iterator[Call], encode: Encode, limits: Limits, render: Render | None
) -> Iterator[WorkItem]:
    """Episodes until there are enough calls; the last episode may be cut short."""
    cache: dict[str, IntArray] = {}
    trace: str | None = None
    chosen = (call for call in calls if limits.half is None or episode_half(call.trace) == limits.half)
    if limits.per_episode:
        chosen = (call for _, episode in groupby(chosen, lambda c: c.trace) for call in _spaced(list(episode), limits))
    for number, call in enumerate(chosen):
        if limits.calls and number >= limits.calls:
            return
        if call.trace != trace:
            cache.clear()  # a message is tokenized once per episode, however often it is sent
            trace = call.trace
        yield _item(name, call, encode, limits, render, cache)


def _spaced(episode: list[Call], limits: Limits) -> list[Call]:
    """So many calls from the middles of equal parts of an episode."""
    count = min(limits.per_episode, len(episode))
    return [episode[(2 * part + 1) * len(episode) // (2 * count)] for part in range(count)]


def _item(
    name: str, call: Call, encode: Encode, limits: Limits, render: Render | None, cache: dict[str, IntArray]
) -> WorkItem:
    def ids_of(part: str | tuple[int, ...]) -> IntArray:
        if not isinstance(part, str):
            return np.array(part, dtype=np.int32)
        if part not in cache:
            cache[part] = np.array(encode(part), dtype=np.int32)
        return cache[part]

    has_gaps = any(isinstance(part, OpenTurn) for part in call.parts)
    if render is not None:
        prompt = np.array(render(call.parts), dtype=np.int32)
    else:
        prompt = np.concatenate([_NO_IDS, *(ids_of(part) for part in call.parts)])
    response = ids_of(call.response)
    if limits.prompt_tokens:
        prompt = prompt[-limits.prompt_tokens :]
    if limits.response_tokens:
        response = response[: limits.response_tokens]
    return WorkItem(name, call.trace, np.ascontiguousarray(prompt), response, call.parts if has_gaps else None)
