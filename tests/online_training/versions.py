"""A drafter whose one weight is how far it can see, versions of it, and an engine that serves with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.controller import FixedController
from specdec.engine import Engine
from specdec.online_training.registry import Manifest, Registry
from specdec.online_training.swap import VersionedDrafter
from specdec.online_training.version_weights import read_weights
from specdec.protocols import DrafterNeeds
from specdec.sampling import Sampler
from specdec.toy import ToyTarget
from specdec.types import DraftTree, Request, RequestState, SamplingParams
from specdec.verifier.match import MatchVerifier

VOCAB_SIZE = 11
TARGET = ToyTarget(vocab_size=VOCAB_SIZE, seed=3, order=2)
GREEDY = [0]
MOOD = {"luck": 0}  # what the traffic allows every drafter to see at most; 0: everything


class DepthDrafter:
    """Drafts four tokens, of which as many are right as its weight says."""

    def __init__(self) -> None:
        self.needs = DrafterNeeds()
        self._depth = torch.zeros(1)

    @property
    def named_weights(self) -> Mapping[str, Tensor]:
        return {"depth": self._depth}

    def start(self, states: Sequence[RequestState]) -> None:
        pass

    def propose(self, states: Sequence[RequestState], budgets: Sequence[int]) -> list[DraftTree]:
        trees = []
        for state, budget in zip(states, budgets, strict=True):
            depth = int(self._depth)
            right = TARGET.greedy(state.token_ids.tolist(), min(4, budget))
            seen = min(depth, MOOD["luck"]) if MOOD["luck"] else depth
            # Requests differ by one, so that figures have a spread.
            seen = max(0, seen - (int(state.token_ids[0]) + int(state.token_ids[1])) % 2)
            ids = [token if i < seen else (token + 1) % VOCAB_SIZE for i, token in enumerate(right)]
            trees.append(DraftTree.chain(int(state.token_ids[-1]), ids))
        return trees

    def observe(self, events: Any) -> None:
        pass

    def stop(self, request_ids: Sequence[str]) -> None:
        pass


def publish(registry: Registry, depth: float, **more: Any) -> int:
    def export(folder: Path) -> None:
        folder.mkdir()
        save_file({"depth": torch.tensor([float(depth)])}, folder / "model.safetensors")

    return registry.publish(export, Manifest(version=0, parent=0, kind="lm", target="f" * 32, **more)).version


def versioned(registry: Registry, version: int, **options: Any) -> VersionedDrafter:
    weights = read_weights("lm", registry.path(version))

    def make() -> DepthDrafter:
        drafter = DepthDrafter()
        drafter.named_weights["depth"].copy_(weights["depth"])
        return drafter

    return VersionedDrafter(make, version, weights, **options)


class Service:
    """Serves requests one after the other, greedy, and counts them."""

    def __init__(self, drafter: Any) -> None:
        self.engine = Engine(TARGET, MatchVerifier(Sampler(VOCAB_SIZE)), drafter, FixedController(4))
        self.count = 0

    def serve(self, count: int, num_new: int = 12) -> list[RequestState]:
        requests = []
        for _ in range(count):
            self.count += 1
            prompt = np.array([self.count % 7, self.count % VOCAB_SIZE, self.count % 5], dtype=np.int32)
            requests.append(Request(f"r{self.count}", prompt, SamplingParams(max_new_tokens=num_new)))
        return finish(self.engine.generate(requests), requests)


def finish(outputs: Iterable[Any], requests: Sequence[Request]) -> list[RequestState]:
    last = {output.request_id: output.state for output in outputs}
    return [last[request.request_id] for request in requests]


def acceptance_length(states: Sequence[RequestState]) -> float:
    return sum(state.num_output_tokens for state in states) / sum(state.num_steps for state in states)
