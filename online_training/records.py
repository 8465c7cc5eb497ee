"""What is kept of a served request: its text, its rounds, and, where wanted, the target's states.

One record per request, schema version 1. A round is one step that drafted: the draft tree, how much of it was accepted,
and the version of the drafter that grew it, which can change within a request. Token columns travel as Arrow IPC,
tensors as safetensors; nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import safetensors.torch
from torch import Tensor

from specdec.errors import LoadError
from specdec.types import IntArray

__all__ = [
    "SCHEMA_VERSION",
    "Features",
    "Rounds",
    "TraceRecord",
    "read_meta",
    "read_tensors",
    "write_meta",
    "write_tensors",
]

SCHEMA_VERSION = 1
_NAMES = ("aux_hidden", "rejected_nodes", "rejected_top_ids", "rejected_top_logprobs")


@dataclass(frozen=True, slots=True, eq=False)
class Rounds:
    """The rounds of a request, columns of R rounds and of all their K draft tokens.

    Args:
        positions: [R] int32: index of the first token that the round could emit.
        versions: [R] int32: of the drafter; 0: not from a registry.
        num_drafted: [R] int32: draft tokens; their sum is K.
        num_accepted: [R] int32.
        draft_ids: [K] int32.
        draft_parents: [K] int32: within the round's tree, where 0 is the root.
        draft_us: [R] int32: microseconds of drafting, of the whole batch.
        target_us: [R] int32: microseconds of the target's forward, likewise.
    """

    positions: IntArray
    versions: IntArray
    num_drafted: IntArray
    num_accepted: IntArray
    draft_ids: IntArray
    draft_parents: IntArray
    draft_us: IntArray
    target_us: IntArray

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def first_rejected(self) -> IntArray:
        """Positions whose token the drafter had a guess for and missed: the token there is the bonus token."""
        missed = self.num_accepted < self.num_drafted
        return (self.positions + self.num_accepted)[missed].astype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The target's states, and its laws at rejected draft tokens: as invertible to text as the text itself.

    Args:
        start: position of the first row of ``aux_hidden``.
        layers: whose states these are, as in ``specdec.readings.HiddenStates``.
        tensors: ``aux_hidden`` [n, layers * E] bfloat16: states at the tokens from ``start`` on; where ``layers`` holds
            the last one, the law is the target's ``lm_head`` on it. ``rejected_nodes`` [D, 2] int32: (round, node) of
            draft tokens that were not accepted; ``rejected_top_ids`` [D, k] int32 and ``rejected_top_logprobs`` [D, k]
            float16: the target's likeliest tokens after each of them.
    """

    start: int
    layers: tuple[int, ...]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TraceRecord:
    """One finished request.

    Args:
        trace_id: 32 hexadecimal digits, ordered by time.
        ts_ms: when it ended, milliseconds of Unix time.
        tenant: keyed hash, never the name.
        prompt_hash: keyed hash of the prompt's ids.
        target: fingerprint of model and tokenizer; a trainer refuses another.
        drafter: name of the drafter.
        sampling: what is needed to rebuild the law: temperature, top_p, top_k, min_p, seed and penalties.
        num_prompt_tokens: P.
        token_ids: [P + C] int32.
        rounds: what was drafted.
        inclusion: probability with which the request was kept under pressure; 1: there was none.
        features: states, or None.
    """

    trace_id: str
    ts_ms: int
    tenant: str
    prompt_hash: str
    target: str
    drafter: str
    sampling: Mapping[str, float]
    num_prompt_tokens: int
    token_ids: IntArray
    rounds: Rounds
    inclusion: float = 1.0
    features: Features | None = None

    @property
    def num_output_tokens(self) -> int:
        """C: tokens after the prompt."""
        return len(self.token_ids) - self.num_prompt_tokens


_ROUND_COLUMNS = tuple(Rounds.__dataclass_fields__)
_SCHEMA = pa.schema(
    [
        ("schema_version", pa.int32()),
        ("trace_id", pa.string()),
        ("ts_ms", pa.int64()),
        ("tenant", pa.string()),
        ("prompt_hash", pa.string()),
        ("target", pa.string()),
        ("drafter", pa.string()),
        ("sampling", pa.map_(pa.string(), pa.float64())),
        ("num_prompt_tokens", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("inclusion", pa.float64()),
        ("features_start", pa.int32()),
        ("features_layers", pa.list_(pa.int32())),
        *((name, pa.list_(pa.int32())) for name in _ROUND_COLUMNS),
    ]
)


def write_meta(records: Sequence[TraceRecord]) -> bytes:
    """All of the records but their tensors, as an Arrow IPC file."""
    rows = [
        {
            "schema_version": SCHEMA_VERSION,
            **{name: getattr(record, name) for name in _PLAIN},
            "sampling": list(record.sampling.items()),
            "token_ids": record.token_ids,
            "features_start": record.features.start if record.features else None,
            "features_layers": record.features.layers if record.features else None,
            **{name: getattr(record.rounds, name) for name in _ROUND_COLUMNS},
        }
        for record in records
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA))
    data: bytes = sink.getvalue().to_pybytes()
    return data


_PLAIN = (
    "trace_id", "ts_ms", "tenant", "prompt_hash", "target", "drafter", "num_prompt_tokens", "inclusion",
)  # fmt: skip


def read_meta(data: bytes, tensors: Mapping[str, Tensor] | None = None) -> list[TraceRecord]:
    """Records from ``write_meta``, with the tensors that belong to them.

    Raises:
        LoadError: the bytes are no such file, or of another schema version.
    """
    try:
        rows = pa.ipc.open_file(pa.py_buffer(data)).read_all().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise LoadError(f"cannot read trace records: {error}") from error
    return [_record(row, tensors or {}) for row in rows]


def _record(row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TraceRecord:
    if row.get("schema_version") != SCHEMA_VERSION:
        raise LoadError(f"trace records must have schema version {SCHEMA_VERSION}, got {row.get('schema_version')!r}")
    prefix = row["trace_id"] + "."
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    start = row["features_start"]
    return TraceRecord(
        **{name: row[name] for name in _PLAIN},
        sampling=dict(row["sampling"]),
        token_ids=_ints(row["token_ids"]),
        rounds=Rounds(**{name: _ints(row[name]) for name in _ROUND_COLUMNS}),
        features=Features(start, tuple(row["features_layers"]), own) if start is not None and own else None,
    )


def _ints(values: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def write_tensors(records: Sequence[TraceRecord]) -> bytes | None:
    """The tensors of all records as one safetensors file, named ``TRACE_ID.NAME``; None if there are none."""
    named = {
        f"{record.trace_id}.{name}": tensor.contiguous()
        for record in records
        if record.features is not None
        for name, tensor in record.features.tensors.items()
    }
    return safetensors.torch.save(named) if named else None


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of ``write_tensors``.

    Raises:
        LoadError: the bytes are no safetensors file.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise LoadError(f"cannot read the tensors of trace records: {error}") from error
    unknown = {name.partition(".")[2] for name in tensors} - set(_NAMES)
    if unknown:
        raise LoadError(f"tensors of trace records must be among {', '.join(_NAMES)}, got {', '.join(sorted(unknown))}")
    return tensors
