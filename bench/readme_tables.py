"""Writes the numbers of README and docs from the committed results: none is typed by hand.

    python -m specdec.bench.readme_tables

A region between ``<!-- table: NAME -->`` and ``<!-- end -->`` belongs to the function ``_NAME`` here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from specdec.bench.adaptive_tables import (
    adaptive_speed_table,
    load_floor_table,
    load_simulation_table,
    load_validation_table,
    overlap_speed_table,
    reliability_table,
)
from specdec.bench.drafter_tables import (
    calibration_table,
    diffusion_lengths_table,
    diffusion_speed_table,
    draft_profile_table,
    model_drafters_table,
)
from specdec.bench.result_tables import live_table, replay_table, simulation_table
from specdec.errors import ConfigError, LoadError

__all__ = ["PAGES", "render"]

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = Path("bench/results")
_FROM_DOCS = "../bench/results"
PAGES = (
    "README.md",
    "docs/adaptive.md",
    "docs/performance.md",
    "docs/benchmarks.md",
    "docs/serving.md",
    "docs/sidecar.md",
    "docs/drafters.md",
    "docs/training.md",
    "docs/online-training.md",
)
_REPLAYS = (
    "replay_agents_bfloat16",
    "replay_agents_float32",
    "replay_controls_bfloat16",
    "replay_controls_float32",
)
_REGION = re.compile(r"(<!-- table: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(readme: str, root: Path) -> str:
    """``readme``, the text of a page, with every region made anew from the results under ``root``.

    Raises:
        ConfigError: a region that no function here fills.
        LoadError: a result file is missing.
    """

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in _TABLES:
            raise ConfigError(f"README region must be one of {', '.join(_TABLES)}, got {name!r}")
        return match[1] + _TABLES[name](root) + match[3]

    return _REGION.sub(fill, readme)


def _load(root: Path, name: str) -> dict[str, Any]:
    path = root / _RESULTS / f"{name}.json"
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except FileNotFoundError:
        raise LoadError(f"{path} does not exist: run the benchmark that writes it") from None


def _source(name: str, result: Mapping[str, Any], *, link: str = str(_RESULTS)) -> str:
    where = result["environment"]
    packages = where["packages"]
    versions = f"torch {packages['torch']}, transformers {packages['transformers']}"
    return (
        f"{where['cores']} cores of {where['cpu']}, {versions}, {where['date'][:10]}; "
        f"[`{name}.json`]({link}/{name}.json), made by `{where['command']}`.\n"
    )


def _demo(root: Path) -> str:
    result = _load(root, "demo")
    rows = [
        "| edits | new tokens | plain | n-gram | speed-up | tokens per step | same tokens |",
        "|---|---|---|---|---|---|---|",
        f"| {result['num_edits']} | {result['num_new_tokens']} | {result['plain_tokens_per_s']:.0f}/s "
        f"| {result['drafted_tokens_per_s']:.0f}/s | **{result['speedup']:.1f}x** "
        f"| {result['acceptance_length']:.1f} | {'yes' if result['same_tokens'] else 'no'} |",
    ]
    return "\n".join(rows) + "\n\n" + _source("demo", result)


def _plain_speed(root: Path) -> str:
    result = _load(root, "plain_speed")
    rows = ["| model | requests | `generate` | engine, budget 0 | ratio (range) |", "|---|---|---|---|---|"]
    for model, cases in result["models"].items():
        for case, figures in cases.items():
            rows.append(
                f"| {model} | {case} | {figures['generate']['median_s']:.2f} s "
                f"| {figures['engine_budget_0']['median_s']:.2f} s | {figures['speedup_median']:.2f} "
                f"({figures['speedup_min']:.2f} to {figures['speedup_max']:.2f}) |"
            )
    return "\n".join(rows) + "\n\n" + _source("plain_speed", result)


def _retrieval(root: Path) -> str:
    rows = [
        "| tokenizer | drafts | drafted a step | arctic-inference accepts | `suffix` accepts | gain | held-out half |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ("retrieval", "retrieval_large_vocabulary"):
        result = _load(root, name)
        for setting, arms in result["quality"].items():
            found = arms["arctic-inference"]["all"]
            rows.append(
                f"| {result['vocabulary']} tokens | {setting} | {found['drafted_per_step']:.1f} "
                f"| {found['accepted_per_step']:.3f} | {found['ours_accepted_per_step']:.3f} "
                f"| {found['gain_percent']:+.1f} % "
                f"| {arms['arctic-inference']['held-out half']['gain_percent']:+.1f} % |"
            )
    sources = _source("retrieval", _load(root, "retrieval"))
    result = _load(root, "retrieval_speed")
    host, prompt, scaling = result["host"], result["prompt"], result["scaling"]
    rows += ["", "| cost on the host | arctic-inference | `suffix` | times less |", "|---|---|---|---|"]
    rows += [
        _cost(f"a step of one request, {width} at a time, us", host[width]["arctic"], host[width]["ours"])
        for width in ("1", "32", "128")
    ]
    rows.append(_cost("a prompt token, us", host["1"]["arctic prompt"], host["1"]["ours prompt"]))
    key = "stop_stall_ms"
    longest = {arm: max(prompt[arm][key], prompt[arm]["start_stall_ms"]) for arm in ("arctic", "ours")}
    rows.append(
        _cost(f"longest stall by a prompt of {prompt['tokens']} tokens, ms", longest["arctic"], longest["ours"])
    )
    last = {arm: scaling[arm][-1] for arm in ("arctic", "ours")}
    key = "insert_us_per_token"
    label = f"a token of a response, with {last['ours']['cached_tokens'] / 1e6:.2g} M tokens cached, us"
    rows.append(_cost(label, last["arctic"][key], last["ours"][key]))
    for label, key in (("memory of a cached token, bytes", "bytes_per_token"),
                       ("eviction of a response, us", "evict_ms_per_response")):  # fmt: skip
        scale = 1e3 if key.startswith("evict") else 1.0
        least = min(range(len(scaling["ours"])), key=lambda i: scaling["arctic"][i][key] / scaling["ours"][i][key])
        rows.append(_cost(label, scale * scaling["arctic"][least][key], scale * scaling["ours"][least][key]))
    return "\n".join(rows) + "\n\n" + sources + _source("retrieval_speed", result)


def _cost(what: str, peer: float, ours: float) -> str:
    return f"| {what} | {peer:.3g} | {ours:.3g} | {f'{peer / ours:.3g}' if ours else ''} |"


def _packed_speed(root: Path) -> str:
    rows = ["| dtype | arm | one token | packed is faster by (range) |", "|---|---|---|---|"]
    sources = []
    for dtype in ("bfloat16", "float32"):
        result = _load(root, f"packed_speed_{dtype}")
        for arm, times in result["step_ms"].items():
            ratio = result["speedup_of_packed_over"].get(arm)
            text = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
            rows.append(f"| {dtype} | {arm} | {times['median_ms']:.0f} ms | {text} |")
        sources.append(_source(f"packed_speed_{dtype}", result, link=_FROM_DOCS))
    return "\n".join(rows) + "\n\n" + "\n".join(sources)


def _step_sizes(root: Path) -> str:
    names = {"engine": "dense", "engine packed": "packed", "engine strict": "strict"}
    results = {dtype: _load(root, f"packed_speed_{dtype}") for dtype in ("bfloat16", "float32")}
    curves = {dtype: result["target_ms_by_tokens_in_the_step"] for dtype, result in results.items()}
    sizes = list(curves["float32"]["engine"])
    rows = [f"| target step, ms, by tokens in it | {' | '.join(sizes)} |", "|---|" + "---|" * len(sizes)]
    for dtype, arms in curves.items():
        for arm, times in arms.items():
            rows.append(f"| {dtype}, {names[arm]} | {' | '.join(f'{times[size]:.0f}' for size in sizes)} |")
    return "\n".join(rows) + "\n"


def _compile_speed(root: Path) -> str:
    result = _load(root, "compile_speed")
    rows = ["| dtype | weights | one token | compiled | compiled is faster by (range) |", "|---|---|---|---|---|"]
    for dtype, found in result["results"].items():
        for name in ("dense", "packed"):
            times, gain = found["step_ms"], found["compiled_is_faster_by"].get(name)
            usual = f"| {dtype} | {name} | {times[name]['median']:.1f} ms |"
            if gain is None:
                rows.append(f"{usual} cannot be | |")
            else:
                ms = times[f"{name}, compiled"]["median"]
                rows.append(f"{usual} {ms:.1f} ms | {gain['median']:.2f} ({gain['min']:.2f} to {gain['max']:.2f}) |")
    return "\n".join(rows) + "\n\n" + _source("compile_speed", result, link=_FROM_DOCS)


def _of_bench(make: Callable[..., str], *names: str, link: str = _FROM_DOCS, **options: Any) -> Any:
    return lambda root: make(root / _RESULTS, *names, link=link, **options)


def _of_drafters(name: str, make: Callable[[Mapping[str, Any]], str]) -> Callable[[Path], str]:
    def table(root: Path) -> str:
        result = _load(root, name)
        return make(result) + "\n" + _source(name, result, link=_FROM_DOCS)

    return table


def _serve_speed(root: Path) -> str:
    result = _load(root, "serve_speed")
    rows = ["| traffic | streams | plain | n-gram | suffix | same tokens |", "|---|---|---|---|---|---|"]
    for traffic, cases in result["traffic"].items():
        for streams, figures in cases.items():
            cells = [f"{figures['plain']['tokens_per_s']:.0f}/s"]
            for arm in ("ngram", "suffix"):
                own = figures[arm]
                low, high = own["speedup_range"]
                cells.append(f"{own['tokens_per_s']:.0f}/s, {own['speedup']:.2f}x ({low:.2f} to {high:.2f})")
            same = "yes" if figures["same_tokens"] else "no"
            rows.append(f"| {traffic} | {streams} | {' | '.join(cells)} | {same} |")
    http = result["http"]
    token_us, request_ms = http["per_token_us"], http["per_request_us"] / 1e3
    rows += ["", f"HTTP adds {token_us:.0f} us per streamed token and {request_ms:.1f} ms per request."]
    return "\n".join(rows) + "\n\n" + _source("serve_speed", result, link=_FROM_DOCS)


def _sidecar_overhead(root: Path) -> str:
    result = _load(root, "sidecar_overhead")
    rows = ["| added at the median | whole answer | first event | each event |", "|---|---|---|---|"]
    names = {"off": "`--mode off`", "observe": "`--mode observe`, with a tokenizer"}
    for arm, name in names.items():
        added = result["overhead"]["added"][arm]
        cells = [f"{added[f'{key}_ms_p50']:.2f} ms" for key in ("whole", "first", "event")]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n\n" + _source("sidecar_overhead", result, link=_FROM_DOCS)


def _sidecar_speed(root: Path) -> str:
    result = _load(root, "sidecar_speed")
    some = next(iter(result["speed"][0]["sources"].values()))
    names = {"race": "race", "grid": "grid of 4", "rounds": "rounds"}
    protos = [proto for proto in names if proto in some]
    head = [f"{names[proto]} | predicted" for proto in protos]
    rows = [
        f"| source | step | {' | '.join(head)} | drafting inside the server | same text |",
        "|---|---|" + "---|" * (2 * len(protos) + 2),
    ]
    for run in result["speed"]:
        for source, own in run["sources"].items():
            arms = [own[name] for name in (*protos, "inside")]
            cells = [f"{arm[part]:.2f}x" for arm in arms[:-1] for part in ("speedup", "predicted")]
            cells.append(f"{own['inside']['speedup']:.2f}x")
            same = "yes" if all(arm["same_text"] for arm in arms) else "no"
            rows.append(f"| {source} | {run['step_ms']:.0f} ms | {' | '.join(cells)} | {same} |")
    return "\n".join(rows) + "\n\n" + _source("sidecar_speed", result, link=_FROM_DOCS)


def _tiny_drafters(root: Path) -> str:
    result = _load(root, "tiny_drafters")
    columns = sorted(
        {(row["text"], row["temperature"]) for row in result["rows"]},
        key=lambda one: (("edits", "code", "both").index(one[0]), one[1]),
    )
    lengths = {(row["arm"], row["text"], row["temperature"]): row["acceptance_length"] for row in result["rows"]}
    rows = [
        f"| acceptance length | {' | '.join(f'{text}, T={temperature:g}' for text, temperature in columns)} |",
        "|---|" + "---|" * len(columns),
    ]
    for arm in dict.fromkeys(row["arm"] for row in result["rows"]):
        rows.append(f"| {arm} | {' | '.join(f'{lengths[arm, *column]:.2f}' for column in columns)} |")
    what = f"{result['prompts']} held-out texts of each kind, {result['new_tokens']} new tokens each; no times."
    return "\n".join(rows) + f"\n\n{what} " + _source("tiny_drafters", result, link=_FROM_DOCS)


_DAY_ZERO = {
    "day_zero": "a project of 32 functions",
    "day_zero_fresh": "functions that never repeat",
    "day_zero_pool": "16 prompts, again and again",
}


def _day_zero(root: Path) -> str:
    results = {name: _load(root, name) for name in _DAY_ZERO}
    lines = [
        f"| minutes | {' | '.join(_DAY_ZERO.values())} | trainer's CPU seconds, project |",
        "| ---: " * (len(results) + 2) + "|",
    ]
    for minute in range(0, 30, 3):
        cells = [_in_minutes(result["requests"], minute, minute + 3) for result in results.values()]
        spent = [row[7] for row in results["day_zero"]["requests"] if row[0] / 60 < minute + 3]
        lines.append(f"| {minute} to {minute + 3} | {' | '.join(cells)} | {max(spent):.0f} |")
    notes = [_source(name, result, link=_FROM_DOCS) for name, result in results.items()]
    return "\n".join([*lines, "", *notes])


def _shift(root: Path) -> str:
    results = {name: _load(root, name) for name in ("shift_online", "shift_static")}
    lines = ["| traffic | learning on | static |", "|---|---:|---:|"]
    for phase in ("A", "B", "A again"):
        for part in ("first_third", "last_third"):
            cells = " | ".join(f"{result['shift'][phase][part]:.2f}" for result in results.values())
            lines.append(f"| {phase}, {part.replace('_', ' ')} | {cells} |")
    found = [result["shift"]["regained_after"] for result in results.values()]
    cells = " | ".join("not in this phase" if one is None else str(one) for one in found)
    lines.append(f"| A again: requests until 95 % of what A ended with | {cells} |")
    notes = [_source(name, result, link=_FROM_DOCS) for name, result in results.items()]
    return "\n".join([*lines, "", *notes])


def _rejected_tokens(root: Path) -> str:
    result = _load(root, "rejected_tokens")
    lines = ["| term | acceptance length | against off, 95 % interval |", "|---|---:|---:|"]
    for arm, length in result["acceptance_length"].items():
        found = result["against_off"].get(arm)
        low, high = found["interval_95"] if found else (0, 0)
        cell = f"{found['mean']:+.3f} ({low:+.3f} to {high:+.3f})" if found else "–"
        lines.append(f"| {arm} | {length:.3f} | {cell} |")
    return "\n".join([*lines, "", _source("rejected_tokens", result, link=_FROM_DOCS)])


def _capture_overhead(root: Path) -> str:
    result = _load(root, "capture_overhead")
    lines = ["| cost of capture, token mode | percent | 95 % interval |", "|---|---:|---:|"]
    for key, name in (
        ("wall", "wall time"), ("cpu", "CPU time, all threads"), ("engine_thread_cpu", "CPU time, the engine's thread"),
        ("attributed", "CPU time inside `observe`"),
    ):  # fmt: skip
        low, high = result[key]["interval_95_percent"]
        lines.append(f"| {name} | {result[key]['percent']:.2f} | {low:.2f} to {high:.2f} |")
    rates = f"{result['tokens_per_second_without']:.0f} tokens per second without, "
    rates += f"{result['tokens_per_second_with']:.0f} with, {result['pairs']} pairs."
    return "\n".join([*lines, "", rates, "", _source("capture_overhead", result, link=_FROM_DOCS)])


def _in_minutes(requests: list[list[Any]], start: int, end: int) -> str:
    """Acceptance length of the requests that finished in a stretch of time."""
    some = [row for row in requests if start <= row[0] / 60 < end]
    return f"{sum(row[1] for row in some) / sum(row[2] for row in some):.2f}" if some else "–"


_ADAPTIVE = ("adaptive_agents", "adaptive_controls", "adaptive_paper", "adaptive_paper_flat")
_TABLES: Mapping[str, Callable[[Path], str]] = {
    "capture_overhead": _capture_overhead,
    **{name: _of_drafters(name, adaptive_speed_table) for name in _ADAPTIVE},
    **{name: _of_drafters(name, load_simulation_table) for name in ("load_ablation", "load_azure", "load_mooncake")},
    "adaptive_reliability": _of_drafters("adaptive_agents", reliability_table),
    "load_floor": _of_drafters("load_floor", load_floor_table),
    "load_validation": _of_drafters("load_validation", load_validation_table),
    "overlap_speed": _of_drafters("overlap_speed", overlap_speed_table),
    "day_zero": _day_zero,
    "shift": _shift,
    "rejected_tokens": _rejected_tokens,
    "demo": _demo,
    "plain_speed": _plain_speed,
    "retrieval": _retrieval,
    "packed_speed": _packed_speed,
    "compile_speed": _compile_speed,
    "step_sizes": _step_sizes,
    "replay": _of_bench(replay_table, *_REPLAYS, link=str(_RESULTS), by_source=False),
    "replay_by_source": _of_bench(replay_table, *_REPLAYS, by_source=True),
    "simulate": _of_bench(simulation_table, "simulate"),
    "live": _of_bench(live_table, "live"),
    "serve_speed": _serve_speed,
    "sidecar_overhead": _sidecar_overhead,
    "sidecar_speed": _sidecar_speed,
    "model_drafters": _of_drafters("model_drafters", model_drafters_table),
    "draft_profile": _of_drafters("draft_profile", draft_profile_table),
    "draft_profile_one_thread": _of_drafters("draft_profile_one_thread", draft_profile_table),
    "diffusion_lengths": _of_drafters("diffusion_drafting", diffusion_lengths_table),
    "diffusion_lengths_equal_time": _of_drafters("diffusion_equal_time", diffusion_lengths_table),
    "diffusion_calibration": _of_drafters("diffusion_drafting", calibration_table),
    "diffusion_speed": _of_drafters("diffusion_speed", diffusion_speed_table),
    "diffusion_speed_batch": _of_drafters("diffusion_speed_batch", diffusion_speed_table),
    "tiny_drafters": _tiny_drafters,
}


def main() -> None:
    """Rewrite the pages in place."""
    for name in PAGES:
        path = _ROOT / name
        before = path.read_text(encoding="utf-8")
        after = render(before, _ROOT)
        path.write_text(after, encoding="utf-8")
        sys.stderr.write(f"{name} {'rewritten' if after != before else 'is up to date'}\n")


if __name__ == "__main__":
    main()
