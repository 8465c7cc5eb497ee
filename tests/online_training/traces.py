"""Trace records and sinks for tests, and an engine over the toy target that a capture observes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from specdec.controller import FixedController
from specdec.engine import Engine
from specdec.online_training.privacy import KeyedHash
from specdec.online_training.records import Features, Rounds, TraceRecord
from specdec.online_training.transport import Lease, TransportStats
from specdec.sampling import Sampler
from specdec.toy import RandomTreeDrafter, ToyTarget
from specdec.types import Request, RequestState, SamplingParams
from specdec.verifier.match import MatchVerifier

VOCAB_SIZE = 11
HASHES = KeyedHash(bytes(range(32)))


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def record(name: str = "0" * 32, *, tenant: str = "t", has_features: bool = False) -> TraceRecord:
    features = None
    if has_features:
        hidden = torch.arange(6, dtype=torch.bfloat16).reshape(3, 2)
        features = Features(1, (0, 2), {"aux_hidden": hidden})
    return TraceRecord(
        trace_id=name, ts_ms=7, tenant=HASHES.text(tenant), prompt_hash=HASHES.ids(ints(1, 2)), target="f" * 32,
        drafter="eagle", sampling={"temperature": 0.5, "seed": 3.0}, num_prompt_tokens=2,
        token_ids=ints(1, 2, 3, 4, 5), features=features,
        rounds=Rounds(
            positions=ints(2, 4), versions=ints(1, 2), num_drafted=ints(2, 1), num_accepted=ints(1, 1),
            draft_ids=ints(3, 9, 5), draft_parents=ints(0, 1, 0), draft_us=ints(10, 11), target_us=ints(20, 21),
        ),
    )  # fmt: skip


class ListSink:
    """Keeps records in memory; ``gate`` holds it up, ``error`` makes it fail."""

    def __init__(self) -> None:
        self.records: list[TraceRecord] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.num_calls = 0

    def put(self, records: Sequence[TraceRecord]) -> str:
        self.num_calls += 1
        self.gate.wait(60)
        if self.error is not None:
            raise self.error
        self.records += records
        return "shard"

    def lease(self, worker: str) -> Lease | None:
        raise NotImplementedError

    ack = release = held = forget = keep_alive = kept = lease  # type: ignore[assignment]

    def stats(self) -> TransportStats:
        raise NotImplementedError


def serve(requests: Sequence[Request], observers: Sequence[Any], *, before: Any = None) -> list[RequestState]:
    """Decode requests on the toy target with a random drafter; the finished states."""
    target = ToyTarget(vocab_size=VOCAB_SIZE, seed=3, order=2)
    drafter = RandomTreeDrafter(VOCAB_SIZE, seed=1)
    engine = Engine(target, MatchVerifier(Sampler(VOCAB_SIZE)), drafter, FixedController(4), observers=list(observers))
    last: dict[str, RequestState] = {}
    for output in engine.generate(requests):
        last[output.request_id] = output.state
    return [last[request.request_id] for request in requests]


def requests(count: int, *, tenant: str = "t", num_new: int = 12) -> list[Request]:
    return [
        Request(f"{tenant}{i}", ints(1, 2, i % VOCAB_SIZE), SamplingParams(max_new_tokens=num_new), tenant)
        for i in range(count)
    ]
