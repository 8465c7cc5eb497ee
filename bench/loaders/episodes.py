"""From the records of each published format to episodes: messages stored once, and calls as ranges of them.

Each reader takes one JSON value and gives the episodes in it. What is missing raises KeyError, ValueError, TypeError or
AttributeError, which the caller counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from specdec.bench.loaders.messages import message, text_of, tool_calls_text, writes_xml
from specdec.bench.traces import Call, calls_of_line

__all__ = ["READERS", "Episode", "OpenTurn", "format_of"]


class OpenTurn(str):
    """The place of an answer that was not recorded: it reads as an empty answer until ``filled`` with a live one."""

    __slots__ = ()

    def filled(self, answer: str) -> str:
        """The same message with ``answer`` in it."""
        return f"{self.removesuffix(chr(10))}{answer}\n"


@dataclass(slots=True)
class Episode:
    """Messages in order, and which of them were answers.

    Args:
        trace: a name that is unique in the file.
        pool: the messages, each ``{"role", "content"}``.
        calls: (indices of the prompt's messages, index of the answer) per call.
        open_turns: indices of answers that were not recorded.
    """

    trace: str
    pool: list[dict[str, str]] = field(default_factory=list)
    calls: list[tuple[Sequence[int], int]] = field(default_factory=list)
    open_turns: set[int] = field(default_factory=set)

    def add(self, item: dict[str, str]) -> int:
        """Append a message; its index."""
        self.pool.append(item)
        return len(self.pool) - 1

    def answer(self, item: dict[str, str], prompt: Sequence[int] | None = None) -> None:
        """Append an answer, a call whose prompt is everything before it unless ``prompt`` says otherwise."""
        index = self.add(item)
        self.calls.append((range(index) if prompt is None else prompt, index))

    def open_answer(self) -> None:
        """Append the place of an answer that was not recorded."""
        self.open_turns.add(len(self.pool))
        self.answer({"role": "assistant", "content": ""})

    def as_calls(self) -> Iterator[Call]:
        """The calls, each with its whole prompt."""
        record = {
            "trace": self.trace,
            "pool": self.pool,
            "calls": [{"prompt": [(i, i + 1) for i in prompt], "response": answer} for prompt, answer in self.calls],
        }
        for call, (prompt, _) in zip(calls_of_line(record), self.calls, strict=True):
            if self.open_turns:
                parts = tuple(
                    OpenTurn(part) if i in self.open_turns and isinstance(part, str) else part
                    for i, part in zip(prompt, call.parts, strict=True)
                )
                call = replace(call, parts=parts)
            yield call


def _conversation(
    trace: str, messages: Sequence[Mapping[str, Any]], *, xml: bool, left_out: Sequence[str] = ()
) -> Episode:
    """Every assistant message is an answer to all messages before it."""
    episode = Episode(trace)
    for raw in messages:
        item = message(raw, xml_tools=xml)
        if item["role"] in left_out:
            continue
        if item["role"] == "assistant" and raw.get("weight", 1):
            episode.answer(item)
        else:
            episode.add(item)
    return episode


def _swe_agent(record: Mapping[str, Any], path: Path) -> Iterator[Episode]:
    trace = record.get("environment_id") or path.name.split(".traj")[0]
    xml = writes_xml(json.dumps(record.get("replay_config") or record.get("info", {}).get("model_stats") or ""))
    steps = [step for step in record.get("trajectory") or () if step.get("query")]
    history: list[Mapping[str, Any]] = record.get("history") or []
    if not steps:
        if not history:
            raise KeyError("history")
        # Demonstrations are part of what the model reads, but it did not write them.
        yield _conversation(trace, [{**m, "weight": not m.get("is_demo")} for m in history], xml=xml)
        return
    written = [m for m in history if m.get("role") == "assistant" and not m.get("is_demo")]
    episode, known = Episode(trace), dict[str, int]()
    for step in steps:  # the prompt as it was sent: history processors may have cut old observations
        prompt = [_index(episode, known, message(raw, xml_tools=xml)) for raw in step["query"]]
        answer = {"role": "assistant", "content": step["response"]}
        while written and text_of(written[0].get("content")) != answer["content"]:
            written.pop(0)
        if written:
            answer["tool_calls"] = written.pop(0).get("tool_calls") or ()
        episode.answer(message(answer, xml_tools=xml), prompt)
    yield episode


def _index(episode: Episode, known: dict[str, int], item: dict[str, str]) -> int:
    key = json.dumps(item)
    if key not in known:
        known[key] = episode.add(item)
    return known[key]


def _mini_swe_agent(record: Mapping[str, Any], path: Path) -> Iterator[Episode]:
    info = record.get("info") or {}
    model = (info.get("config") or {}).get("model") or ""
    trace = record.get("instance_id") or path.name.split(".traj")[0]
    # `exit` is how the run ended; no model was shown it.
    yield _conversation(trace, record["messages"], xml=writes_xml(model), left_out=("exit",))


def _completion_log(record: Mapping[str, Any], path: Path) -> Iterator[Episode]:
    """One request with its answer, as OpenHands and proxies log them; the folder is the episode."""
    request = record.get("request") or record.get("body") or record
    response = record["response"]
    response = response.get("body", response)
    xml = writes_xml(response.get("model") or request.get("model"))
    folder = path.parent.name if "messages" in record and path.suffix != ".jsonl" else ""
    trace = record.get("session_id") or record.get("trace") or folder or path.stem
    episode = Episode(str(trace))
    for raw in request["messages"]:
        episode.add(message(raw, xml_tools=xml))
    episode.answer(message({"role": "assistant", **response["choices"][0]["message"]}, xml_tools=xml))
    yield episode


_QUIET_OBSERVATIONS = {"agent_state_changed", "null", "recall", "condense"}
_QUIET_ACTIONS = {"change_agent_state", "recall", "null", "condensation"}


def _openhands_events(record: Mapping[str, Any] | Sequence[Any], path: Path) -> Iterator[Episode]:
    """A run's events; old files hold (action, observation) pairs."""
    run: Mapping[str, Any] = record if isinstance(record, Mapping) else {"history": record}
    episode, seen = Episode(str(run.get("instance_id") or path.stem)), set[str]()
    instruction = run.get("instruction")
    flat = [event for item in run["history"] for event in (item if isinstance(item, list) else [item])]
    if instruction and not any(e.get("source") == "user" and e.get("action") == "message" for e in flat):
        episode.add({"role": "user", "content": text_of(instruction)})
    for event in flat:
        if "observation" in event:
            if event["observation"] not in _QUIET_OBSERVATIONS:
                episode.add({"role": "tool", "content": text_of(event.get("content"))})
        elif event.get("action") not in _QUIET_ACTIONS:
            _openhands_action(episode, event, seen)
    yield episode


def _openhands_action(episode: Episode, event: Mapping[str, Any], seen: set[str]) -> None:
    args = event.get("args") or {}
    if event.get("source") != "agent" or event["action"] == "system":
        role = "system" if event["action"] == "system" else "user"
        episode.add({"role": role, "content": text_of(args.get("content") or event.get("message"))})
        return
    response = (event.get("tool_call_metadata") or {}).get("model_response")
    if response:
        if response.get("id") in seen:  # the second tool call of one answer
            return
        seen.add(response.get("id"))
        raw = {"role": "assistant", **response["choices"][0]["message"]}
        episode.answer(message(raw, xml_tools=writes_xml(response.get("model"))))
        return
    # No model output in the log: thought and arguments, as the agent had parsed them.
    thought = text_of(args.get("thought") or (args.get("content") if event["action"] == "message" else ""))
    rest = {k: v for k, v in args.items() if k in ("command", "code", "path", "content", "url") and v and v != thought}
    tools = tool_calls_text([{"name": event["action"], "arguments": rest}], xml=True) if rest else ""
    episode.answer({"role": "assistant", "content": "\n".join(filter(None, (thought, tools)))})


def _agentic_trace(record: Mapping[str, Any], path: Path) -> Iterator[Episode]:
    """SGLang's format: the new messages of each turn; the answers are left to the model under test."""
    (turns,) = record.values()
    episode = Episode("")
    for turn in turns:
        for raw in turn.get("messages") or ():
            episode.add(message(raw))
        episode.open_answer()
    yield episode


def _sharegpt(record: Mapping[str, Any], path: Path) -> Iterator[Episode]:
    yield _conversation(str(record.get("id", "")), record.get("conversations") or record["items"], xml=False)


def _questions(record: Mapping[str, Any], path: Path) -> Iterator[Episode]:
    """MT-bench and Spec-Bench questions: the user's turns only."""
    episode = Episode(f"{record.get('category', 'question')}/{record['question_id']}")
    for turn in record["turns"]:
        episode.add({"role": "user", "content": text_of(turn)})
        episode.open_answer()
    yield episode


def _openai_chat(record: Mapping[str, Any], path: Path) -> Iterator[Episode]:
    """Lines of ``messages``: fine-tuning data, or (in ``body``) batch requests without answers."""
    body = record.get("body") or record
    trace = str(record.get("custom_id") or record.get("id") or "")
    episode = _conversation(trace, body["messages"], xml=writes_xml(body.get("model")))
    if not episode.calls:
        episode.open_answer()
    yield episode


Reader = Callable[[Any, Path], Iterator[Episode]]
# Name -> reader, for the formats that are not in `specdec.bench.traces`.
READERS: Mapping[str, Reader] = {
    "swe-agent": _swe_agent,
    "mini-swe-agent": _mini_swe_agent,
    "openhands-completions": _completion_log,
    "openhands-events": _openhands_events,
    "agentic-trace": _agentic_trace,
    "sharegpt": _sharegpt,
    "questions": _questions,
    "openai-chat": _openai_chat,
}


def format_of(value: Any) -> str:
    """The format of one JSON value by its keys: a name of ``READERS``, ``event``, or ``plain`` for our own forms.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"a record must be an object, got {type(value).__name__}")
    keys = value.keys()
    for name, is_it in _SIGNS:
        if is_it(value, keys):
            return name
    raise ValueError(f"unknown trace format: a record with the keys {sorted(keys)}")


_SIGNS: Sequence[tuple[str, Callable[[Mapping[str, Any], Any], bool]]] = (
    ("plain", lambda v, keys: "pool" in keys),
    ("openhands-completions", lambda v, keys: isinstance(v.get("response"), Mapping)),
    ("swe-agent", lambda v, keys: "trajectory" in keys),
    ("mini-swe-agent", lambda v, keys: "messages" in keys and ("info" in keys or "trajectory_format" in keys)),
    ("openhands-events", lambda v, keys: "history" in keys),
    ("event", lambda v, keys: "source" in keys and bool({"action", "observation"} & keys)),
    ("agentic-trace", lambda v, keys: keys == {"conversations"} and _is_turn_list(v["conversations"])),
    ("sharegpt", lambda v, keys: bool({"conversations", "items"} & keys)),
    ("questions", lambda v, keys: "turns" in keys),
    ("plain", lambda v, keys: "response" in keys and bool({"messages", "prompt"} & keys)),
    ("openai-chat", lambda v, keys: "messages" in keys or "messages" in (v.get("body") or ())),
)


def _is_turn_list(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], Mapping) and "messages" in turns[0]
