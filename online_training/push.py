"""Pushes a version's weights into another running engine: vLLM or SGLang, over their own endpoints.

Neither changes the target's weights, so outputs stay what they were; a rollback is a push of an older version. Both ask
for endpoints that their makers leave unauthenticated (vLLM's development mode) or behind an admin key: keep them on a
private network.

vLLM 0.33 takes weights over a device transfer that it was started with (``--weight-transfer-config``): how tensors are
handed over depends on that backend, so a ``Transfer`` provides it, and this module drives the sequence around it:
``/init_weight_transfer_engine`` once, then ``/pause``, ``/start_draft_weight_update``, ``/update_weights`` in pieces,
``/finish_weight_update``, ``/resume``. SGLang 0.5.23 takes serialised tensors in the request itself:
``/begin_weight_update``, ``/update_weights_from_tensor``, ``/end_weight_update``, each with ``selector: draft``.
``/update_weights_from_disk`` of either also writes into the target and is never used.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import httpx
from torch import Tensor

from specdec.errors import ConfigError, SpecdecError
from specdec.online_training.registry import Registry
from specdec.online_training.version_weights import read_weights

__all__ = ["EnginePush", "PushError", "SglangPush", "Transfer", "VllmPush", "push_version"]

_PIECE_BYTES = 64 * 2**20


class PushError(SpecdecError):
    """The other engine refused, or could not be reached; the message says at which step."""


class Transfer(Protocol):
    """How tensors reach vLLM's workers: one of its weight-transfer backends (``nccl``, ``ipc``)."""

    def init_info(self) -> Mapping[str, Any]:
        """``init_info`` of ``/init_weight_transfer_engine``: the rendezvous."""

    def send(self, weights: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Offer tensors to the workers; the ``update_info`` with which they fetch them."""


class EnginePush(Protocol):
    """Another engine that takes draft weights."""

    def push(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Replace the draft weights.

        Raises:
            PushError: the engine refused; it has been told to go on serving.
        """


class _Http:
    """Requests that say which step failed."""

    def __init__(self, url: str, key: str | None, client: httpx.Client | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"an engine's URL must begin with http:// or https://, got {url!r}")
        self._url = url.rstrip("/")
        self._client = client or httpx.Client(timeout=120)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            answer = self._client.post(self._url + path, json=dict(body or {}), headers=self._headers)
        except httpx.HTTPError as error:
            raise PushError(f"{path}: {type(error).__name__}: {error}") from error
        if answer.status_code != 200:
            raise PushError(f"{path}: status {answer.status_code}: {answer.text[:200]}")
        try:
            said = answer.json()
        except ValueError:
            return None
        if isinstance(said, dict) and said.get("success") is False:  # SGLang refuses with status 200 too
            raise PushError(f"{path}: {str(said.get('message'))[:200]}")
        return said


def _pieces(weights: Mapping[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in their order, about ``most`` bytes at a time."""
    piece: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights.items():
        if piece and size + weight.nbytes > most:
            yield piece
            piece, size = {}, 0
        piece[name] = weight
        size += weight.nbytes
    if piece:
        yield piece


class VllmPush:
    """vLLM with ``VLLM_SERVER_DEV_MODE=1`` and a weight-transfer engine that supports drafts (`EnginePush`).

    Args:
        url: of the server.
        transfer: hands the tensors over.
        key: sent as a bearer token; the endpoints do not ask for one themselves, a proxy before them may.
        client: for tests.
        piece_bytes: most bytes of one update.
    """

    def __init__(
        self,
        url: str,
        transfer: Transfer,
        *,
        key: str | None = None,
        client: httpx.Client | None = None,
        piece_bytes: int = _PIECE_BYTES,
    ) -> None:
        self._http, self._transfer, self._piece_bytes = _Http(url, key, client), transfer, piece_bytes
        self._is_ready = False

    def push(self, weights: Mapping[str, Tensor], version: int) -> None:
        if not self._is_ready:
            self._http.post("/init_weight_transfer_engine", {"init_info": dict(self._transfer.init_info())})
            self._is_ready = True
        self._http.post("/pause?mode=keep")  # running requests keep their KV and go on afterwards
        try:
            self._http.post("/start_draft_weight_update")
            for piece in _pieces(weights, self._piece_bytes):
                self._http.post("/update_weights", {"update_info": dict(self._transfer.send(piece))})
            self._http.post("/finish_weight_update", {"weight_version": f"specdec-{version}"})
        except PushError:
            with suppress(PushError):  # what went wrong first is what is told
                self._http.post("/resume")
            raise
        self._http.post("/resume")


class SglangPush:
    """SGLang; weights travel in the request, serialised as its workers expect (`EnginePush`).

    Args:
        url: of the server.
        serialize: (names and tensors) -> bytes, as ``MultiprocessingSerializer`` of the installed SGLang makes them.
            That format is a pickle of SGLang's own, which this project does not write itself.
        num_ranks: tensor-parallel workers; each gets the same bytes.
        key: of the server's admin endpoints.
        client: for tests.
        piece_bytes: most bytes of one update.
    """

    def __init__(
        self,
        url: str,
        serialize: Callable[[Sequence[tuple[str, Tensor]]], bytes],
        *,
        num_ranks: int = 1,
        key: str | None = None,
        client: httpx.Client | None = None,
        piece_bytes: int = _PIECE_BYTES,
    ) -> None:
        if num_ranks < 1:
            raise ConfigError(f"num_ranks must be >= 1, got {num_ranks}")
        self._http, self._serialize = _Http(url, key, client), serialize
        self._num_ranks, self._piece_bytes = num_ranks, piece_bytes

    def push(self, weights: Mapping[str, Tensor], version: int) -> None:
        self._http.post("/begin_weight_update", {"selector": "draft"})
        try:
            for piece in _pieces(weights, self._piece_bytes):
                data = base64.b64encode(self._serialize(list(piece.items()))).decode()
                self._http.post(
                    "/update_weights_from_tensor",
                    {"serialized_named_tensors": [data] * self._num_ranks, "selector": "draft", "flush_cache": False},
                )
        except PushError:
            with suppress(PushError):
                self._http.post("/end_weight_update", {"selector": "draft"})
            raise
        self._http.post("/end_weight_update", {"selector": "draft"})


def push_version(registry: Registry, version: int, engine: EnginePush) -> None:
    """Push a version whose files are as they were published.

    Raises:
        LoadError: it is not whole, or holds a value that is not finite; nothing was sent.
        ConfigError: it must not be served.
        PushError: the engine refused.
    """
    why = registry.state().marks.get(version)
    if why is not None:
        raise ConfigError(f"version {version} must not be served: {why}")
    manifest = registry.check(version)
    weights = read_weights(manifest.kind, registry.path(version))
    engine.push({name: weight for name, weight in weights.items() if weight.is_floating_point()}, version)
