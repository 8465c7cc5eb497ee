"""What a result file holds: one schema for every mode, checked when written and when read.

Rows are what was measured, one per (arm, round, call); everything else is derived from them by
``specdec.bench.metrics`` or says under which circumstances they came about.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from specdec.errors import LoadError

__all__ = [
    "SCHEMA",
    "ArmInfo",
    "BenchResult",
    "Flag",
    "ModelInfo",
    "Percentiles",
    "Row",
    "SourceFile",
    "Speedup",
    "StepMark",
    "Summary",
    "Warmth",
    "WorkloadInfo",
    "at_load",
    "read_result",
    "write_result",
]

SCHEMA = "specdec.bench/1"
Warmth = Literal["cold", "self-warmed", "warmed"]


def at_load(name: str, load: str) -> str:
    """The full name of an arm under a load: its own name where it ran one call after the other."""
    return f"{name} {load}".rstrip()


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SourceFile(_Record):
    """A trace file: its name (never its place on the machine), size and sha256, or "built-in" ones without."""

    source: str
    name: str
    nbytes: int = 0
    sha256: str = ""


class WorkloadInfo(_Record):
    """What was asked: files, how many calls and tokens came of them, what was passed over."""

    files: list[SourceFile]
    num_calls: int
    prompt_tokens: int
    response_tokens: int
    skipped: dict[str, int] = Field(default_factory=dict)
    tokens_sha256: str = Field(description="over all token ids in order: the same digest is the same work")


class ModelInfo(_Record):
    """The target."""

    name: str
    dtype: str
    device: str
    num_parameters: int
    has_random_weights: bool


class ArmInfo(_Record):
    """One way of answering; ``failure`` says why it has no rows."""

    name: str
    kind: str
    warmth: Warmth = "cold"
    options: dict[str, Any] = Field(default_factory=dict)
    failure: str | None = None


class Row(_Record):
    """One arm's answer to one call in one round. Lists by depth begin with the first draft position."""

    arm: str
    round: int
    call: int
    source: str
    trace: str
    prompt_tokens: int
    output_tokens: int
    seconds: float
    first_token_s: float
    first_tokens: int = Field(default=1, description="tokens that came with the first one")
    num_steps: int
    num_accepted: int
    num_drafted: int | None = Field(default=None, description="None: the arm does not show it")
    accepted_histogram: list[int] = Field(description="steps with exactly j accepted draft tokens, j = 0 ...")
    reached: list[int] = Field(default_factory=list, description="drafting steps that were at least so deep, by depth")
    reached_after: list[int] = Field(
        default_factory=list, description="of these, steps with all earlier positions accepted, by depth"
    )
    num_drafting_steps: int = 0
    parts_ms: dict[str, float] = Field(default_factory=dict)
    output_sha256: str
    load: str = Field(default="", description="under which load: xN, N requests at a time; N/s; trace")
    start_s: float | None = Field(default=None, description="when it was sent, where requests overlap; from the start")
    error: str | None = Field(default=None, description="why a request failed; it then counts in no other figure")
    same_output: bool | None = Field(default=None, description="as recorded (replay) or as the baseline's (live)")
    distinct_ngrams: float = Field(description="distinct 4-grams of the output / its 4-grams; near 0: it loops")


class StepMark(_Record):
    """One step on the timeline of an episode."""

    arm: str
    call: int
    start_s: float
    end_s: float
    emitted: int


class Percentiles(_Record):
    """Of one quantity over calls and rounds."""

    p50: float
    p90: float
    p99: float


class Speedup(_Record):
    """Ratio of pooled tokens/s to a reference arm's at the same load, and its interval.

    One call after the other: the 95 % bootstrap interval over episodes. Overlapping requests have no times of their own
    to resample, so there the interval is the least and the greatest ratio of two rounds.
    """

    value: float
    low: float
    high: float


class Summary(_Record):
    """What the rows of one arm say about one source; "all" pools them."""

    arm: str
    source: str
    load: str = ""
    num_calls: int
    num_runs: int
    errors: dict[str, int] = Field(default_factory=dict, description="requests that failed, by reason")
    output_tokens: int
    tokens_per_s: float = Field(description="over the summed time of the calls; where they overlap, over the wall time")
    requests_per_s: float
    tokens_per_s_by_round: list[float]
    speedups: dict[str, Speedup] = Field(description="by reference arm")
    decode_tokens_per_s: float | None = Field(default=None, description="tokens behind the first / time behind it")
    decode_speedups: dict[str, Speedup] = Field(default_factory=dict, description="the same ratios without prompts")
    mean_of_ratios: float | None = Field(description="Spec-Bench's: mean tokens/s per call over the baseline's mean")
    acceptance_length: float | None = Field(description="pooled: emitted / steps, bonus included; None: not shown")
    acceptance_length_drafting: float | None = Field(description="pooled over steps that drafted: vLLM's")
    acceptance_length_per_request: float | None = Field(description="unweighted mean over requests: SpecForge's")
    acceptance_rate: float | None
    drafted_per_step: float | None = None
    accepted_at: list[float] = Field(description="accepted at position i / drafting steps")
    accepted_at_given: list[float] = Field(description="the same given all earlier positions accepted and i drafted")
    accepted_histogram: list[int]
    parts_ms_per_token: dict[str, float]
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    goodput_per_s: float | None = Field(default=None, description="requests per second within the SLO")
    same_output: float | None = Field(description="share of runs whose output is the expected one")


class Flag(_Record):
    """Something that makes a number doubtful: ``error`` ones make the run fail."""

    code: str
    severity: Literal["warning", "error"]
    message: str


class BenchResult(_Record):
    """One run of the benchmark."""

    schema_version: Literal["specdec.bench/1"] = "specdec.bench/1"
    mode: Literal["simulate", "replay", "live", "serve"]
    is_partial: bool = Field(default=False, description="interrupted: rows end early, rounds may be missing")
    environment: dict[str, Any]
    settings: dict[str, Any]
    workload: WorkloadInfo
    model: ModelInfo | None
    references: list[str] = Field(description="arms that speed-ups are against; the first one is the baseline")
    arms: list[ArmInfo]
    summaries: list[Summary] = Field(default_factory=list)
    flags: list[Flag] = Field(default_factory=list)
    memory: dict[str, int] = Field(default_factory=dict, description="bytes: peak of the process, of the device")
    energy_j: dict[str, float] = Field(default_factory=dict, description="joules per arm, where the GPU counts them")
    reliability: dict[str, list[tuple[float, float, int]]] = Field(
        default_factory=dict,
        description="by arm that calibrates: (predicted chance, observed share, nodes), one point per tenth",
    )
    cost_curve: list[tuple[int, float]] = Field(
        default_factory=list, description="(tokens in one target step, milliseconds), at a fixed context"
    )
    timeline: list[StepMark] = Field(default_factory=list)
    rows: list[Row] = Field(default_factory=list)

    @property
    def baseline(self) -> str:
        """The arm that plots and guards hold the others against."""
        return self.references[0] if self.references else ""

    def summary(self, arm: str, source: str = "all") -> Summary | None:
        """The summary of one arm and source."""
        return next((s for s in self.summaries if s.arm == arm and s.source == source), None)


def write_result(path: Path, result: BenchResult) -> None:
    """Write a result file: indented, but rows on one line each; readers never see half a file."""
    body = result.model_dump(mode="json")
    long = {key: body.pop(key) for key in ("cost_curve", "timeline", "rows")}
    text = json.dumps(body, indent=1)[:-2]
    for key, items in long.items():
        lines = ",\n  ".join(json.dumps(item, separators=(",", ":")) for item in items)
        text += f',\n "{key}": [' + (f"\n  {lines}\n ]" if items else "]")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(path.suffix + ".tmp")
    draft.write_text(text + "\n}\n", encoding="utf-8")
    draft.replace(path)


def read_result(path: Path) -> BenchResult:
    """A result file, checked.

    Raises:
        LoadError: no such file, or it is not a result of this schema.
    """
    try:
        return BenchResult.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoadError(f"there is no result file {path}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise LoadError(f"{path} is no result of schema {SCHEMA}: {place}: {first['msg']}") from None
