"""``specdec serve`` with a model that recites recorded answers at a chosen time per step.

    python -m specdec.bench.reciting_server traces.jsonl.gz --step-ms 20 --drafter none

Everything but the forward pass is the server's own. A prompt is recognised by its tokens, also when it goes on into the
answer, so continuations are answered as a model would. A step takes the same time for any batch, as on a GPU that waits
for its memory; that is the case in which a sidecar can help, and the one that is measured with this.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import torch
import transformers

from specdec.bench.loaders import load_calls
from specdec.bench.scripted import ScriptedTarget
from specdec.bench.traces import TokenCall, tokenize_calls
from specdec.build import build_drafter
from specdec.config import EngineConfig
from specdec.controller import BackoffController
from specdec.engine import Engine
from specdec.errors import UnsupportedError
from specdec.server.keys import Keyring
from specdec.server.launch import serve
from specdec.server.listening import listen
from specdec.server.metrics import ServerMetrics
from specdec.server.prompt_scores import Script
from specdec.server.prompts import Serving
from specdec.server.service import Service, ServiceOptions
from specdec.server.speculation import CappedController, Choices, RoutedDrafter
from specdec.server.watch import StepWatcher
from specdec.server.worker import EngineWorker, Update
from specdec.types import Chunk, DraftTree, IntArray, RequestState, TargetOutput
from specdec.verifier.match import MatchVerifier

__all__ = ["TINY", "recorded"]

TINY = Path(__file__).parent / "tiny"
_MAX_LENGTH = 1 << 16


def recorded(
    path: Path, tokenizer: Any, *, calls: int, skip: int = 0, most_prompt: int = 3000, new_tokens: int = 256
) -> list[TokenCall]:
    """The first calls of a trace file with an answer worth speeding up, cut to a bearable length."""
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    made = tokenize_calls(load_calls(path), encode, max_prompt=most_prompt)
    long = (call for call in made if len(call.response_ids) >= 64)
    return [
        TokenCall(call.trace, call.prompt_ids, call.response_ids[:new_tokens])
        for call in islice(long, skip, skip + calls)
    ]


class _SlowTarget(ScriptedTarget):
    """Takes its time for every forward."""

    max_length = _MAX_LENGTH

    def __init__(self, vocab_size: int, step_s: float, reciter: _Reciter) -> None:
        super().__init__(vocab_size)
        self._step_s, self._reciter = step_s, reciter

    def forward(self, chunks: Sequence[Chunk]) -> TargetOutput:
        sleep(self._step_s)
        output = super().forward(chunks)
        trees = [(chunk.state, chunk.tree) for chunk in chunks if chunk.tree is not None]
        if not any(state.request.sampling.logits_processors for state, _ in trees):
            return output  # nobody reads scores
        right = np.concatenate([self._reciter.recorded_ids(state, tree) for state, tree in trees])
        scores = torch.full((len(right), self.vocab_size), -20.0)
        scores[torch.arange(len(right)), torch.from_numpy(right).long()] = 0.0
        return replace(output, logits=scores)


class _Reciter:
    """Gives the recorded token after every node (`specdec.verifier.match.TargetSampler`)."""

    def __init__(self, calls: Sequence[TokenCall], vocab_size: int) -> None:
        self._texts = [(len(c.prompt_ids), np.concatenate((c.prompt_ids, c.response_ids))) for c in calls]
        self._vocab_size = vocab_size
        self._scripts: dict[str, IntArray] = {}

    def start(self, state: RequestState) -> None:
        prompt = state.token_ids
        for least, text in self._texts:
            if least <= len(prompt) <= len(text) and np.array_equal(text[: len(prompt)], prompt):
                self._scripts[state.request_id] = text[len(prompt) :].astype(np.int32)
                return
        # What was never recorded: a token for every position, so that a continuation of this goes on like it.
        places = np.arange(len(prompt), len(prompt) + 4096, dtype=np.int64)
        self._scripts[state.request_id] = (300 + places * 7919 % (self._vocab_size - 400)).astype(np.int32)

    def target_ids(self, states: Sequence[RequestState], trees: Sequence[DraftTree], output: TargetOutput) -> IntArray:
        return np.concatenate(
            [
                _after(state, tree, script.token_ids) if (script := _script(state)) else self.recorded_ids(state, tree)
                for state, tree in zip(states, trees, strict=True)
            ]
        )

    def recorded_ids(self, state: RequestState, tree: DraftTree) -> IntArray:
        """The recorded token after every node."""
        return _after(state, tree, self._scripts[state.request_id])

    def commit(self, state: RequestState, emitted_ids: Sequence[int]) -> None:
        """The place in the recording is the number of tokens that are out."""

    def stop(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._scripts.pop(request_id, None)


def _after(state: RequestState, tree: DraftTree, token_ids: Sequence[int] | IntArray) -> IntArray:
    places = np.minimum(state.num_output_tokens + tree.depths(), len(token_ids))
    return np.append(np.asarray(token_ids, np.int32), np.int32(0))[places]


def _script(state: RequestState) -> Script | None:
    """What a request must say whose prompt's scores are asked for."""
    found = [one for one in state.request.sampling.logits_processors if isinstance(one, Script)]
    return found[0] if found else None


def _service(calls: Sequence[TokenCall], tokenizer: Any, step_s: float, drafter: str) -> Service:
    choices, watcher = Choices((drafter,)), StepWatcher()
    vocab_size = len(tokenizer)
    reciter = _Reciter(calls, vocab_size)
    engine = Engine(
        _SlowTarget(vocab_size, step_s, reciter),
        MatchVerifier(reciter),
        RoutedDrafter({drafter: build_drafter(drafter)}, choices),
        CappedController(BackoffController(), choices),
        config=EngineConfig.of(max_prefill_tokens=_MAX_LENGTH, max_batch_size=64),
        observers=[watcher],
    )

    def grammars() -> Any:
        raise UnsupportedError("a recitation follows no grammar")

    def make_worker(deliver: Callable[[Sequence[Update]], None]) -> EngineWorker:
        return EngineWorker(engine, choices, watcher, deliver)

    def make_metrics(worker: EngineWorker) -> ServerMetrics:
        return ServerMetrics(worker, model="recited", drafter=drafter)

    serving = Serving("recited", tokenizer, (), _MAX_LENGTH, grammars=grammars)
    return Service(serving, choices, make_worker, Keyring(), make_metrics, ServiceOptions())


def main() -> None:
    """Serve until it is stopped."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("traces", type=Path, nargs="+")
    parser.add_argument("--tokenizer", default=str(TINY))
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--drafter", default="none")
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--skip", type=int, default=0)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    calls = [call for path in args.traces for call in recorded(path, tokenizer, calls=args.calls, skip=args.skip)]
    with listen("127.0.0.1", 0) as bound:
        print(f"serving recited on http://127.0.0.1:{bound.getsockname()[1]}/v1", flush=True)
        serve(_service(calls, tokenizer, args.step_ms / 1e3, args.drafter), bound)


if __name__ == "__main__":
    main()
