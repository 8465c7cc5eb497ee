"""What the upstream can do: asked at the start, shown at ``/health``, and never assumed.

Reading routes tell what kind of server it is. What acceleration rests on is tried out: that token ids can be had and
leave no trace, that a prompt of token ids is continued as the same text would be, and whether a seed is a function of
the position.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import aiohttp
from multidict import CIMultiDict

from specdec.server.sidecar.events import EventSplitter, IdShape, Piece, read_event
from specdec.server.sidecar.upstream import Question, Unreachable, Upstream
from specdec.server.sidecar.verify import Verdict, VerifyWay, ask_verdict
from specdec.server.sidecar.whole import Misfit, Parts, WholeShape

__all__ = ["Capabilities", "probe"]

_TEXT = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n"
_NUM_TOKENS = 8
_PLAIN = {"max_tokens": _NUM_TOKENS, "temperature": 0, "ignore_eos": True}
_PROBE_S = 30.0
_WAYS: Mapping[str, tuple[VerifyWay, ...]] = {
    "vllm": ("generate", "completions"), "specdec": ("completions",), "sglang": ("sglang",)
}  # fmt: skip
_METRICS = {"vllm": "vllm:num_requests_waiting", "specdec": "specdec:num_requests_waiting",
            "sglang": "sglang:num_queue_reqs"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What is known of an upstream; false is what was not shown.

    Args:
        kind: vllm, sglang, llamacpp, specdec or openai.
        model: the first that it lists.
        version: as it says.
        has_ids: streams tell token ids, of the prompt too, and look as before once these are cut out.
        shapes: field -> how it looks when it was not asked for.
        drops_empty: events without text are left out when token ids are not asked for.
        continues: a prompt of token ids is continued as the same output was.
        is_keyed: with a seed, also at temperature 1.
        verifies: how a draft's scores can be had: a right draft was accepted, a wrong one rejected where it is wrong.
        wholes: route -> how it writes answers that are not streamed, where these were put together from a stream.
        has_prediction: chat takes ``prediction``.
        waiting_metric: name of the gauge of its queue, at ``/metrics``.
        notes: why something was not shown.
    """

    kind: str = "openai"
    model: str | None = None
    version: str | None = None
    has_ids: bool = False
    shapes: Mapping[str, IdShape] = field(default_factory=dict)
    drops_empty: bool = False
    continues: bool = False
    is_keyed: bool = False
    verifies: VerifyWay | None = None
    wholes: Mapping[str, WholeShape] = field(default_factory=dict)
    has_prediction: bool = False
    waiting_metric: str | None = None
    notes: tuple[str, ...] = ()

    def table(self) -> dict[str, Any]:
        """For ``/health``."""
        return asdict(replace(self, wholes={})) | {"wholes": sorted(self.wholes)}


class _Prober:
    def __init__(self, upstream: Upstream, headers: CIMultiDict[str]) -> None:
        self._upstream = upstream
        self._headers = headers

    async def get(self, path: str) -> bytes | None:
        async with self._upstream.ask(Question("GET", path, self._headers), is_extra=True) as answer:
            return await answer.read() if answer.status == 200 else None

    async def json(self, path: str) -> dict[str, Any]:
        try:
            value = json.loads(await self.get(path) or b"{}")
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    async def verdict(
        self, way: VerifyWay, model: str, prompt: tuple[int, ...], draft: list[int], *, has_start: bool
    ) -> Verdict | None:
        headers = self._headers.copy()
        headers["Content-Type"] = "application/json"
        question = Question("POST", "/v1/completions", headers)
        salt = secrets.token_hex(8) if way == "generate" else None  # what was just generated would be cached, scoreless
        return await ask_verdict(self._upstream, question, way, model, prompt, draft, salt=salt, has_start=has_start)

    async def stream(self, **body: Any) -> list[Piece]:
        """The events of a completion; empty if it was refused."""
        raw = await self.post("/v1/completions", {"stream": True, **_PLAIN, **body})
        return [read_event(event) for event in EventSplitter().feed(raw)]

    async def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """The answer to a request; empty if it was refused."""
        headers = self._headers.copy()
        headers["Content-Type"] = "application/json"
        question = Question("POST", path, headers, json.dumps(body).encode())
        async with self._upstream.ask(question, is_extra=True) as answer:
            return await answer.read() if answer.status == 200 else b""


async def probe(upstream: Upstream, *, key: str | None, is_full: bool, kind: str | None = None) -> Capabilities:
    """Look at the upstream.

    Args:
        upstream: started.
        key: bearer token for the probe's own requests.
        is_full: also generate a few dozen tokens; without it nothing that acceleration rests on is shown.
        kind: what kind of server it is, if that is known.
    """
    headers: CIMultiDict[str] = CIMultiDict({"Authorization": f"Bearer {key}"} if key else {})
    prober = _Prober(upstream, headers)
    try:
        async with asyncio.timeout(_PROBE_S):
            models = await prober.json("/v1/models")
            found = await _identify(prober, models, kind)
            if is_full and found["kind"] != "openai" and found["model"]:
                found |= await _try_out(prober, found["model"], found["kind"])
    except (Unreachable, TimeoutError, aiohttp.ClientError) as error:
        return Capabilities(kind=kind or "openai", notes=(f"the probe failed: {type(error).__name__}: {error}",))
    return Capabilities(**found)


async def _identify(prober: _Prober, models: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    listed = models.get("data")
    first = listed[0] if isinstance(listed, list) and listed and isinstance(listed[0], dict) else {}
    owner = str(first.get("owned_by", "")).lower()
    if kind is None:
        kind = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp", "specdec": "specdec"}.get(owner, "openai")
    version = None
    if kind in ("vllm", "specdec"):
        version = (await prober.json("/version")).get("version")
    elif kind == "sglang":
        version = (await prober.json("/server_info")).get("version")
    elif kind == "llamacpp":
        version = (await prober.json("/props")).get("build_info")
    metric = _METRICS.get(kind)
    if metric is not None and metric.encode() not in (await prober.get("/metrics") or b""):
        metric = None
    return {
        "kind": kind, "model": first.get("id"), "version": version, "waiting_metric": metric,
        "has_prediction": kind == "specdec", "drops_empty": kind == "specdec",
    }  # fmt: skip


async def _try_out(prober: _Prober, model: str, kind: str) -> dict[str, Any]:
    """Generate a little, with token ids and without, whole and continued."""
    told = await prober.stream(model=model, prompt=_TEXT, return_token_ids=True)
    plain = await prober.stream(model=model, prompt=_TEXT)
    prompt = next((piece.prompt_ids for piece in told if piece.prompt_ids), None)
    output = [token for piece in told for token in piece.token_ids]
    if prompt is None or len(output) != _NUM_TOKENS:
        return {"notes": ("streams do not tell the token ids of prompt and output",)}
    shapes = _shapes(told, plain)
    if shapes is None:
        return {"notes": ("answers look different when token ids are asked for",)}
    half = _NUM_TOKENS // 2
    rest = await _continued(prober, model, prompt, output[:half])
    found: dict[str, Any] = {"has_ids": True, "shapes": shapes, "continues": rest == output[half:]}
    if not found["continues"]:
        return {**found, "notes": ("a prompt of token ids is not continued as its text was",)}
    found["wholes"] = await _wholes(prober, model)
    found["verifies"] = await _way(prober, model, kind, prompt, output)
    if kind != "specdec":
        return found  # a seed that is a function of the position is no accident, and no other server states it
    drawn = {"temperature": 2.0, "seed": 12345}
    seeded = await prober.stream(model=model, prompt=list(prompt), return_token_ids=True, **drawn)
    ids = [token for piece in seeded for token in piece.token_ids]
    found["is_keyed"] = len(ids) == _NUM_TOKENS and ids[half:] == await _continued(
        prober, model, prompt, ids[:half], **drawn
    )
    return found


async def _way(prober: _Prober, model: str, kind: str, prompt: tuple[int, ...], output: list[int]) -> VerifyWay | None:
    """The first way of having drafts scored that judges a right one and a wrong one as it must."""
    half, last = _NUM_TOKENS // 2, _NUM_TOKENS - 1
    other = next(token for token in prompt if token != output[half])
    wrong = [*output[:half], other, *output[half + 1 : last]]
    for way in _WAYS.get(kind, ()):
        try:
            verdicts = [
                await prober.verdict(way, model, prompt, draft, has_start=kind == "specdec")
                for draft in (output[:last], wrong, output[:last])
            ]
        except (Unreachable, aiohttp.ClientError):
            continue
        right, rejected = Verdict(tuple(output), last), Verdict(tuple(output[: half + 1]), half)
        if verdicts == [right, rejected, right]:
            return way
    return None


async def _wholes(prober: _Prober, model: str) -> dict[str, WholeShape]:
    """The shapes of whole answers, of those routes where one put together from a stream has the same bytes."""
    shapes: dict[str, WholeShape] = {}
    chat = {"messages": [{"role": "user", "content": _TEXT}], **_PLAIN, "model": model}
    text = {"prompt": _TEXT, **_PLAIN, "model": model}
    routes: tuple[tuple[Literal["chat", "text"], str, dict[str, Any]], ...] = (
        ("chat", "/v1/chat/completions", chat), ("text", "/v1/completions", text)
    )  # fmt: skip
    for kind, path, body in routes:
        try:
            shape = WholeShape.learned(kind, await prober.post(path, body))
            parts, more = Parts(), {"max_tokens": _NUM_TOKENS - 1}
            asked = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
            raw = await prober.post(path, {**body, **more, **asked})
            for event in EventSplitter().feed(raw):
                parts.take(read_event(event))
            plain = await prober.post(path, {**body, **more})
            if shape.is_same(plain, parts):
                shapes[kind] = shape
        except (Misfit, Unreachable, aiohttp.ClientError):
            continue
    return shapes


async def _continued(prober: _Prober, model: str, prompt: tuple[int, ...], output: list[int], **more: Any) -> list[int]:
    body = {"prompt": [*prompt, *output], "max_tokens": _NUM_TOKENS - len(output), **more}
    pieces = await prober.stream(model=model, return_token_ids=True, **body)
    return [token for piece in pieces for token in piece.token_ids]


def _shapes(told: list[Piece], plain: list[Piece]) -> dict[str, IdShape] | None:
    """How the fields of token ids look when nobody asked; None if cutting them out leaves other differences."""
    shapes: dict[str, IdShape] = {}
    with_text = [_choice(piece) for piece in told if piece.text], [_choice(piece) for piece in plain if piece.text]
    if not all(with_text):
        return None
    for name in ("token_ids", "prompt_token_ids"):
        shapes[name] = "null" if any(name in choice and choice[name] is None for choice in with_text[1]) else "absent"
    present = {name for name, shape in shapes.items() if shape == "null"}
    kept = [set(choice) - ({"token_ids", "prompt_token_ids"} - present) for choice in with_text[0]]
    return shapes if kept[-1] == set(with_text[1][-1]) else None


def _choice(piece: Piece) -> dict[str, Any]:
    return dict((piece.event or {})["choices"][0])
