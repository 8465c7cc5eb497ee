"""One request while it is captured: references to what its steps left behind, and the record that comes of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from specdec.online_training.privacy import KeyedHash
from specdec.online_training.records import Features, Rounds, TraceRecord
from specdec.types import IntArray, RequestState, SamplingParams, StepEvent

__all__ = ["LiveTrace"]

_LAWS = (
    "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_ROUND_BYTES = 256  # of a round beside its tokens, about


@dataclass(frozen=True, slots=True, eq=False)
class _Round:
    """References to what a step left behind; nothing is copied on the engine's thread but features."""

    position: int
    version: int
    token_ids: IntArray  # [N], the root first
    parents: IntArray
    num_accepted: int
    draft_ms: float
    target_ms: float


def _new_id() -> str:
    return f"{int(time.time() * 1e3):012x}{secrets.token_hex(10)}"


@dataclass(slots=True, eq=False)
class LiveTrace:
    """A request that is being served, or waits to be written.

    Args:
        state: the engine's record; read only.
        drafter: name of the drafter.
        trace_id: of the record.
        inclusion: probability with which it was kept under pressure.
    """

    state: RequestState
    drafter: str = ""
    trace_id: str = field(default_factory=_new_id)
    inclusion: float = 1.0
    _rounds: list[_Round] = field(default_factory=list)
    _hidden: list[tuple[int, Tensor]] = field(default_factory=list)  # (position of the first row, rows)
    _rejected: list[tuple[int, Tensor, Tensor, Tensor]] = field(default_factory=list)  # (round, nodes, ids, log-probs)
    _layers: tuple[int, ...] = ()
    _feature_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """About how much memory it holds."""
        drafted = sum(_ROUND_BYTES + one.token_ids.nbytes + one.parents.nbytes for one in self._rounds)
        return self.state.token_ids.nbytes + drafted + self._feature_bytes

    @property
    def has_features(self) -> bool:
        """True if it holds tensors."""
        return self._feature_bytes > 0

    def drop_features(self) -> None:
        """Let go of its tensors."""
        self._hidden, self._rejected, self._feature_bytes = [], [], 0

    def note_round(self, event: StepEvent, version: int) -> None:
        """Keep what was drafted in a step."""
        tree, trace = event.tree, event.trace
        num_accepted = min(event.result.num_accepted, len(event.emitted_ids))
        self._rounds.append(
            _Round(trace.position, version, tree.token_ids, tree.parents, num_accepted, trace.draft_ms, trace.target_ms)
        )

    def note_features(self, event: StepEvent, top_k: int, *, has_rejected: bool) -> None:
        """Keep the target's states at the tokens that a step cached, on the device where they are.

        Args:
            event: of the step.
            top_k: entries of a law that are kept,
            has_rejected: of the laws at draft tokens that were not accepted.
        """
        state = event.state
        if state.hidden is not None:  # rows of the tokens that are cached since the drafter last read them
            rows = state.hidden.rows.to(torch.bfloat16)
            self._layers = state.hidden.layers
            self._hidden.append((state.num_cached - len(rows), rows))
            self._feature_bytes += rows.nbytes
        accepted = {int(node) for node in event.result.accepted_nodes}
        if has_rejected and len(event.tree) > len(accepted) + 1:
            first = int(event.output.cu_nodes[event.row])
            behind = [node for node in range(1, len(event.tree)) if node not in accepted]
            wrong = _top(event.output.logits[[first + node for node in behind]], top_k)
            self._rejected.append((len(self._rounds) - 1, torch.tensor(behind, dtype=torch.int32), *wrong))
            self._feature_bytes += sum(tensor.nbytes for tensor in wrong)

    def record(self, hashes: KeyedHash, target: str) -> TraceRecord:
        """The finished request as it is kept."""
        request = self.state.request
        return TraceRecord(
            trace_id=self.trace_id,
            ts_ms=int(time.time() * 1e3),
            tenant=hashes.text(request.tenant.partition("/")[0]),
            prompt_hash=hashes.ids(request.prompt_ids),
            target=target,
            drafter=self.drafter,
            sampling=_law(request.sampling),
            num_prompt_tokens=self.state.num_prompt_tokens,
            token_ids=self.state.token_ids.copy(),
            rounds=_columns(self._rounds),
            inclusion=self.inclusion,
            features=self._features(),
        )

    def _features(self) -> Features | None:
        """The tensors in host memory; rows that came twice, after a preemption, are taken once."""
        if not self._hidden:
            return None
        start = end = self._hidden[0][0]
        rows = []
        for first, states in self._hidden:
            if first <= end < first + len(states):
                rows.append(states[end - first :].cpu())
                end = first + len(states)
        tensors = {"aux_hidden": torch.cat(rows)}
        if self._rejected:
            pairs = [torch.stack((torch.full_like(some, index), some), dim=-1) for index, some, _, _ in self._rejected]
            tensors["rejected_nodes"] = torch.cat(pairs)
            tensors["rejected_top_ids"] = torch.cat([ids for _, _, ids, _ in self._rejected]).cpu()
            tensors["rejected_top_logprobs"] = torch.cat([values for _, _, _, values in self._rejected]).cpu()
        return Features(start, self._layers, tensors)


def _top(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Likeliest ids [n, k] int32 and their log-probabilities [n, k] float16."""
    best = logits.float().log_softmax(dim=-1).topk(min(count, logits.shape[-1]), dim=-1)
    return best.indices.to(torch.int32), best.values.to(torch.float16)


def _law(sampling: SamplingParams) -> Mapping[str, float]:
    return {name: float(getattr(sampling, name)) for name in _LAWS}


def _columns(rounds: Sequence[_Round]) -> Rounds:
    def ints(values: Sequence[float]) -> IntArray:
        return np.array(values, dtype=np.int32)

    empty = np.empty(0, dtype=np.int32)
    return Rounds(
        positions=ints([one.position for one in rounds]),
        versions=ints([one.version for one in rounds]),
        num_drafted=ints([len(one.token_ids) - 1 for one in rounds]),
        num_accepted=ints([one.num_accepted for one in rounds]),
        draft_ids=np.concatenate([empty, *(one.token_ids[1:] for one in rounds)], dtype=np.int32),
        draft_parents=np.concatenate([empty, *(one.parents[1:] for one in rounds)], dtype=np.int32),
        draft_us=ints([1e3 * one.draft_ms for one in rounds]),
        target_us=ints([1e3 * one.target_ms for one in rounds]),
    )
