"""The simulation from trace files to a result, and the result as tables."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specdec.bench import simulate, simulate_scaling, simulate_speed
from specdec.bench.peers import arctic_cache
from specdec.bench.prior import take_tokens
from specdec.bench.traces import Encode, TokenCall, read_calls, tokenize_calls
from specdec.errors import LoadError

__all__ = ["PARTS", "as_text", "load_encoder", "load_sources", "run_simulation"]

PARTS = ("quality", "reference", "host", "prompt", "scaling")
_HOST_CALLS = 6  # calls per source in the timings
_HOST_PROMPT = 8_000


def load_encoder(name: str) -> tuple[Encode, int]:
    """Text to token ids with a ``tokenizer.json``, or a tokenizer directory or hub name; and the vocabulary's size.

    Raises:
        LoadError: there is no such tokenizer.
    """
    path = Path(name)
    if path.is_dir() and (path / "tokenizer.json").exists():
        path = path / "tokenizer.json"
    try:
        if path.is_file():
            from tokenizers import Tokenizer

            fast = Tokenizer.from_file(str(path))
            return lambda text: fast.encode(text, add_special_tokens=False).ids, fast.get_vocab_size()
        from transformers import AutoTokenizer

        slow = AutoTokenizer.from_pretrained(name)
    except Exception as error:
        raise LoadError(f"cannot load the tokenizer {name!r}: {error}") from error
    return lambda text: slow.encode(text, add_special_tokens=False), len(slow)


def load_sources(
    paths: Sequence[Path], encode: Encode, *, max_response_tokens: int, max_prompt_tokens: int
) -> dict[str, list[TokenCall]]:
    """Calls by source, a source being a file."""
    sources: dict[str, list[TokenCall]] = {}
    for path in paths:
        calls = tokenize_calls(read_calls(path), encode, max_prompt=max_prompt_tokens)
        sources[path.name.split(".")[0]] = take_tokens(calls, max_response_tokens)
    return sources


def _peer_error(wanted: bool) -> str | None:
    if not wanted:
        return "not asked for"
    try:
        arctic_cache()
    except ImportError as error:
        return str(error)
    return None


def run_simulation(
    paths: Sequence[Path],
    tokenizer: str,
    *,
    parts: Sequence[str],
    max_response_tokens: int,
    max_prompt_tokens: int,
    passes: int,
    jobs: int,
    kept: Path | None,
    with_peer: bool,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Everything asked for, as one result that JSON can hold."""
    encode, vocabulary = load_encoder(tokenizer)
    paths = [file for path in paths for file in (sorted(path.glob("*.jsonl*")) if path.is_dir() else [path])]
    on_progress("reading traces")
    sources = load_sources(paths, encode, max_response_tokens=max_response_tokens, max_prompt_tokens=max_prompt_tokens)
    missing = _peer_error(with_peer)
    result: dict[str, Any] = {
        "mode": "simulate",
        "tokenizer": Path(tokenizer).name,
        "vocabulary": vocabulary,
        "max_response_tokens": max_response_tokens,
        "max_prompt_tokens": max_prompt_tokens,
        "peer": "arctic-inference" if missing is None else f"left out: {missing}",
        "sources": {
            name: {
                "calls": len(calls),
                "prompt_tokens": sum(len(call.prompt_ids) for call in calls),
                "response_tokens": sum(len(call.response_ids) for call in calls),
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path, (name, calls) in zip(paths, sources.items(), strict=True)
        },
    }
    if "quality" in parts or "reference" in parts:
        result["quality"], result["at_equal_drafts"] = _quality(
            sources, parts, missing is None, jobs, kept, on_progress
        )
    calls = [call for source in sources.values() for call in _shortened(source[:_HOST_CALLS])]
    if "host" in parts:
        on_progress("host time per request-step")
        wide = [call for source in sources.values() for call in _shortened(source[: 2 * _HOST_CALLS])]
        result["host"] = {
            **simulate_speed.host_time(calls, [1], passes=passes, with_peer=missing is None),
            **simulate_speed.host_time(wide, [32, 128], passes=passes, with_peer=missing is None),
        }
    text = np.concatenate([call.response_ids for source in sources.values() for call in source])
    if "prompt" in parts:
        on_progress("a prompt of 128 thousand tokens")
        long = np.resize(text, 128_000).astype(np.int32)
        result["prompt"] = simulate_speed.long_prompt(long, passes=passes, with_peer=missing is None)
    if "scaling" in parts:
        on_progress("caches from 0.25 to 4 million tokens")
        # The last prompt of an episode holds the earlier ones: each text once, as a cache of responses would see it.
        last = {call.trace: call.prompt_ids for source in sources.values() for call in source}
        varied = np.concatenate([text, *last.values()])
        sizes = [size for size in (250_000, 1_000_000, 4_000_000) if size <= len(varied)]
        result["scaling"] = simulate_scaling.cache_scaling(varied, sizes, passes=passes, with_peer=missing is None)
    return result


def _shortened(calls: Sequence[TokenCall]) -> list[TokenCall]:
    return [
        TokenCall(call.trace, np.ascontiguousarray(call.prompt_ids[-_HOST_PROMPT:]), call.response_ids)
        for call in calls
    ]


def _quality(
    sources: Mapping[str, Sequence[TokenCall]],
    parts: Sequence[str],
    has_peer: bool,
    jobs: int,
    kept: Path | None,
    on_progress: Callable[[str], None],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    arms = ["ours"]
    if has_peer and "quality" in parts:
        arms.append("peer")
    if "reference" in parts or not has_peer:
        arms.append("reference")
    runs = simulate.run_sources(
        sources, parts=arms, jobs=jobs, kept=kept, on_done=lambda name: on_progress(f"quality: {name} is done")
    )
    found: dict[str, Any] = {}
    for setting in simulate.SETTINGS:
        ours = [runs["ours", f"{setting.as_tree} {value}"] for value in simulate.thresholds(setting.as_tree)]
        for (arm, name), base in runs.items():
            if name == setting.name:
                found.setdefault(setting.name, {})[arm] = simulate.compare(sources, base, ours)
    curves = []
    for arm in {arm: None for arm, _ in runs if arm != "ours"}:
        for shape, drafted in simulate.BUDGETS:
            base_runs = [counts for (other, name), counts in runs.items() if other == arm and name.startswith(shape)]
            ours = [runs["ours", f"{shape == 'tree'} {value}"] for value in simulate.thresholds(shape == "tree")]
            curves.append({"arm": arm, "shape": shape, **simulate.compare_at(sources, base_runs, ours, drafted)})
    return found, curves


def as_text(result: Mapping[str, Any]) -> str:
    """The result as Markdown tables."""
    lines: list[str] = []
    for setting, bases in result.get("quality", {}).items():
        for base, found in bases.items():
            lines += [
                f"### {setting}: against {base}", "",
                "| calls | drafted/step | accepted/step | ours, at as many drafted | gain |", "|---|---|---|---|---|",
            ]  # fmt: skip
            rows = {**{key: found[key] for key in ("all", "tuned half", "held-out half")}, **found["sources"]}
            lines += [_quality_row(name, row) for name, row in rows.items()]
            lines.append("")
    if result.get("at_equal_drafts"):
        lines += _curve_lines(result["at_equal_drafts"])
    for part in ("host", "prompt", "scaling"):
        if part in result:
            lines += _PRINTERS[part](result[part])
    return "\n".join(lines)


def _curve_lines(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["### Both on their curves", ""]
    lines += ["| against | drafts | drafted/step | accepted/step | ours | gain | held-out half |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in curves:
        every, held_out = row["all"], row["held-out half"]
        mark = " (beyond a curve)" if "out_of_range" in every else ""
        lines.append(
            f"| {row['arm']} | {row['shape']} | {row['drafted_per_step']} | {every['accepted_per_step']:.3f} "
            f"| {every['ours_accepted_per_step']:.3f}{mark} | {every['gain_percent']:+.1f} % "
            f"| {held_out['gain_percent']:+.1f} % |"
        )
    return [*lines, ""]


def _quality_row(name: str, row: Mapping[str, Any]) -> str:
    mark = " (ours drafts less)" if "out_of_range" in row else ""
    return (
        f"| {name} | {row['drafted_per_step']:.2f} | {row['accepted_per_step']:.3f} "
        f"| {row['ours_accepted_per_step']:.3f}{mark} | {row['gain_percent']:+.1f} % |"
    )


def _ratio(row: Mapping[str, float], key: str = "") -> str:
    ours, peer = row.get(f"ours{key}"), row.get(f"arctic{key}")
    return f"{peer / ours:.1f}" if ours and peer else ""


def _host_lines(host: Mapping[str, Any]) -> list[str]:
    lines = ["### Host time per request-step: extend, speculate, finish", ""]
    lines += ["| concurrent requests | arctic-inference us | ours us | times less |", "|---|---|---|---|"]
    for width in ("1", "32", "128"):
        row = host[width]
        lines.append(f"| {width} | {row.get('arctic', float('nan')):.1f} | {row['ours']:.2f} | {_ratio(row)} |")
    row = host["1"]
    lines += ["", f"Prompt: {row.get('arctic prompt', float('nan')):.3f} us a token against {row['ours prompt']:.4f}, "
              f"{_ratio(row, ' prompt')} times less.", ""]  # fmt: skip
    return lines


def _prompt_lines(prompt: Mapping[str, Any]) -> list[str]:
    lines = [f"### A prompt of {prompt['tokens']} tokens", ""]
    lines += ["| | start ms | longest stall ms | stop ms | longest stall ms |", "|---|---|---|---|---|"]
    for name in ("arctic", "ours"):
        if name in prompt:
            lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in prompt[name].values()) + " |")
    return [*lines, ""]


def _scaling_lines(scaling: Mapping[str, Any]) -> list[str]:
    lines = ["### Cache size", ""]
    lines += [
        "| | cached tokens | insert us/token | while growing | speculate us | evict ms | bytes/token |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("arctic", "ours"):
        lines += [
            f"| {name} | {row['cached_tokens']} | {row['insert_us_per_token']:.4f} | {row['grow_us_per_token']:.4f} "
            f"| {row['speculate_us_p50']:.2f} | {row['evict_ms_per_response']:.4f} | {row['bytes_per_token']:.1f} |"
            for row in scaling[name]
        ]
    spans = ", ".join(f"{key} {value:.2f}" for key, value in scaling["times_as_much"].items())
    return [*lines, "", f"The largest cache against the smallest, ours, times as much: {spans}.", ""]


_PRINTERS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "host": _host_lines, "prompt": _prompt_lines, "scaling": _scaling_lines,
}  # fmt: skip
