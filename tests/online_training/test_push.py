"""Pushing weights to vLLM and SGLang: the requests in their order, and what happens on a refusal."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from specdec.errors import ConfigError, LoadError
from specdec.online_training.push import PushError, SglangPush, VllmPush, push_version
from specdec.online_training.registry import Registry
from tests.online_training.versions import publish

WEIGHTS = {"a": torch.ones(4), "b": torch.zeros(6), "c": torch.ones(2)}


class Server:
    """Answers 200 and remembers; ``refuse`` names a path that fails."""

    def __init__(self, refuse: str = "", *, success: bool | None = None) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.refuse, self.success = refuse, success
        self.client = httpx.Client(transport=httpx.MockTransport(self._answer))
        self.authorization: set[str | None] = set()

    def _answer(self, request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode()
        self.seen.append((path, json.loads(request.content)))
        self.authorization.add(request.headers.get("authorization"))
        if self.refuse and path.startswith(self.refuse):
            if self.success is False:
                return httpx.Response(200, json={"success": False, "message": "no such draft"})
            return httpx.Response(500, text="boom")
        return httpx.Response(200, json={"success": True, "message": "ok"})

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]


class Ipc:
    def init_info(self) -> Mapping[str, Any]:
        return {"rank_offset": 1}

    def send(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        return {"names": list(weights), "shapes": [list(w.shape) for w in weights.values()]}


def serialize(named: Sequence[tuple[str, Tensor]]) -> bytes:
    return json.dumps({name: tensor.tolist() for name, tensor in named}).encode()


def test_vllm_is_paused_updated_in_pieces_and_resumed() -> None:
    server = Server()
    push = VllmPush("http://engine:8000/", Ipc(), client=server.client, key="k", piece_bytes=40)
    push.push(WEIGHTS, 17)
    push.push({"a": WEIGHTS["a"]}, 18)
    assert server.seen == [
        ("/init_weight_transfer_engine", {"init_info": {"rank_offset": 1}}),
        ("/pause?mode=keep", {}),
        ("/start_draft_weight_update", {}),
        ("/update_weights", {"update_info": {"names": ["a", "b"], "shapes": [[4], [6]]}}),
        ("/update_weights", {"update_info": {"names": ["c"], "shapes": [[2]]}}),
        ("/finish_weight_update", {"weight_version": "specdec-17"}),
        ("/resume", {}),
        ("/pause?mode=keep", {}),
        ("/start_draft_weight_update", {}),
        ("/update_weights", {"update_info": {"names": ["a"], "shapes": [[4]]}}),
        ("/finish_weight_update", {"weight_version": "specdec-18"}),
        ("/resume", {}),
    ]
    assert server.authorization == {"Bearer k"}


def test_sglang_gets_draft_tensors_only() -> None:
    server = Server()
    SglangPush("http://engine:30000", serialize, num_ranks=2, client=server.client).push({"a": WEIGHTS["a"]}, 3)
    data = base64.b64encode(serialize([("a", WEIGHTS["a"])])).decode()
    assert server.seen == [
        ("/begin_weight_update", {"selector": "draft"}),
        (
            "/update_weights_from_tensor",
            {"serialized_named_tensors": [data, data], "selector": "draft", "flush_cache": False},
        ),
        ("/end_weight_update", {"selector": "draft"}),
    ]


@pytest.mark.parametrize("at", ["/start_draft", "/update_weights", "/finish"])
def test_vllm_serves_on_after_a_refusal(at: str) -> None:
    server = Server(at)
    with pytest.raises(PushError, match=f"{at}.*status 500: boom"):
        VllmPush("http://engine", Ipc(), client=server.client).push(WEIGHTS, 1)
    assert server.paths[-1] == "/resume"


def test_sglang_ends_the_update_after_a_refusal_with_status_200() -> None:
    server = Server("/update_weights_from_tensor", success=False)
    with pytest.raises(PushError, match="no such draft"):
        SglangPush("http://engine", serialize, client=server.client).push(WEIGHTS, 1)
    assert server.paths[-1] == "/end_weight_update"


def test_nobody_there_is_said() -> None:
    def gone(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    push = SglangPush("http://engine", serialize, client=httpx.Client(transport=httpx.MockTransport(gone)))
    with pytest.raises(PushError, match="/begin_weight_update: ConnectError"):
        push.push(WEIGHTS, 1)


def test_only_sound_versions_are_pushed(tmp_path: Path) -> None:
    registry, server = Registry(tmp_path), Server()
    for depth in (1, 2, float("nan")):
        publish(registry, depth)
    engine = SglangPush("http://engine", serialize, client=server.client)
    push_version(registry, 1, engine)
    assert len(server.seen) == 3
    registry.mark(2, "slow")
    with pytest.raises(ConfigError, match="version 2 must not be served: slow"):
        push_version(registry, 2, engine)
    with pytest.raises(LoadError, match="not finite"):
        push_version(registry, 3, engine)
    assert len(server.seen) == 3


def test_wrong_options_are_named() -> None:
    with pytest.raises(ConfigError, match="must begin with http"):
        SglangPush("engine:30000", serialize)
    with pytest.raises(ConfigError, match="num_ranks must be >= 1"):
        SglangPush("http://engine", serialize, num_ranks=0)
