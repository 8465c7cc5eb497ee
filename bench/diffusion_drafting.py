"""Block-diffusion heads on the bundled model: acceptance against an EAGLE head, length rules, calibration.

    python -m specdec.bench.diffusion_drafting lengths --json bench/results/diffusion_drafting.json
    python -m specdec.bench.diffusion_drafting speed --json bench/results/diffusion_speed.json

Greedy continuations of held-out code, and held-out edits. ``lengths`` counts steps and reads no clock: acceptance
lengths, the difference between the two heads prompt by prompt, and the calibration of the confidences, fitted on some
prompts and judged on others; ``--save-calibration`` puts the temperatures beside the head. ``speed`` decodes
``--batch`` requests at a time, all arms interleaved in one process; a fixed arm sends as many tokens for all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer

from specdec.bench.edit_tasks import heldout_files, heldout_tasks
from specdec.bench.measure import interleave, write_json
from specdec.bench.tiny_eval import edit_prompt, load_model
from specdec.build import build_engine
from specdec.drafters.calibration import CalibrationLog, Temperatures, reliability
from specdec.drafters.diffusion_loading import CALIBRATION_FILE, load_diffusion
from specdec.types import IntArray, Request, SamplingParams

__all__ = ["against_best_fixed", "app", "arms_of", "calibrate", "compare", "count", "measure"]

_TINY = Path(__file__).parent / "tiny"
_TRAINED = Path(__file__).parent / "tiny_drafters"
_RULES = {
    "threshold .4": "rule=threshold&at=0.4",
    "throughput": "rule=throughput",
    "throughput, resting": "rule=throughput&rest=1",
    "ema": "rule=ema&low=1",
}
_RESAMPLES = 10_000
app = typer.Typer(help="Block-diffusion heads on the bundled model.")

HeadOption = Annotated[Path, typer.Option("--head", help="A block-diffusion head for the bundled model.")]
EagleOption = Annotated[Path, typer.Option("--eagle", help="An EAGLE head for the bundled model.")]
JsonFile = Annotated[Path, typer.Option("--json", help="Where the figures go.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", help="Decoded after each prompt.", min=8)]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads.", min=1)]


def arms_of(head: Path, eagle: Path | None, num_guesses: int) -> dict[str, str]:
    """Name of an arm of ``speed`` -> its drafter."""
    arms = {"plain": "none"}
    if eagle is not None:
        arms["eagle, chain"] = f"eagle:{eagle}?top_k=1&depth={num_guesses}&min_gain=0"
    arms |= {f"fixed {n}": f"diffusion:{head}?length={n}" for n in range(1, num_guesses + 1)}
    return arms | {name: f"diffusion:{head}?{options}" for name, options in _RULES.items()}


def measure(
    model: Any,
    tokenizer: Any,
    arms: Mapping[str, str],
    prompts: Sequence[IntArray],
    *,
    num_new: int,
    repeats: int,
    batch: int = 1,
    clock: Callable[[], float] = perf_counter,
) -> dict[str, dict[str, Any]]:
    """Acceptance length and tokens per second of every arm, and its speed over plain decoding, round by round."""
    sampling = SamplingParams(max_new_tokens=num_new)
    engines = {
        name: build_engine(model, drafter, tokenizer=tokenizer, budget=16, max_batch_size=batch, overlap="off")
        for name, drafter in arms.items()
    }
    counts: dict[str, tuple[int, int, int]] = {}

    def run(name: str) -> None:
        requests = [Request(f"{name} {place}", prompt, sampling) for place, prompt in enumerate(prompts)]
        last = {output.request_id: output.state for output in engines[name].generate(requests)}.values()
        counts[name] = (
            sum(state.num_output_tokens for state in last),
            sum(state.num_steps for state in last),
            sum(state.num_drafted for state in last),
        )

    seconds = interleave({name: partial(run, name) for name in arms}, repeats=repeats, clock=clock)
    for engine in engines.values():
        engine.close()
    rows: dict[str, dict[str, Any]] = {}
    for name, (tokens, steps, drafted) in counts.items():
        ratios = [plain / own for plain, own in zip(seconds["plain"], seconds[name], strict=True)]
        rows[name] = {
            "acceptance_length": tokens / steps,
            "drafted_per_step": drafted / steps,
            "tokens_per_second": tokens / float(np.median(seconds[name])),
            "seconds": seconds[name],
            "speed_over_plain": statistics.median(ratios),
            "least_speed": min(ratios),
            "greatest_speed": max(ratios),
        }
    return rows


def against_best_fixed(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every adaptive rule against the fixed length with the most tokens per second, round by round."""
    fixed = max((name for name in rows if name.startswith("fixed")), key=lambda name: rows[name]["tokens_per_second"])
    found: dict[str, Any] = {"best_fixed": fixed}
    for name in _RULES.keys() & rows.keys():
        ratios = [best / own for best, own in zip(rows[fixed]["seconds"], rows[name]["seconds"], strict=True)]
        found[name] = {"median": statistics.median(ratios), "least": min(ratios), "greatest": max(ratios)}
    return found


def count(model: Any, tokenizer: Any, drafter: str, prompts: Sequence[IntArray], *, num_new: int) -> list[list[int]]:
    """[tokens, steps] of every prompt, greedy."""
    sampling = SamplingParams(max_new_tokens=num_new)
    requests = [Request(str(place), prompt, sampling) for place, prompt in enumerate(prompts)]
    with build_engine(model, drafter, tokenizer=tokenizer, budget=16, max_batch_size=8) as engine:
        last = {output.request_id: output.state for output in engine.generate(requests)}
    return [[last[one.request_id].num_output_tokens, last[one.request_id].num_steps] for one in requests]


def compare(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], *, seed: int = 0) -> dict[str, Any]:
    """Acceptance lengths of two drafters on the same prompts, and the difference's interval over prompts.

    Args:
        first: [tokens, steps] of every prompt.
        second: the same of the other drafter.
        seed: of the bootstrap: prompts are drawn with replacement, the same ones for both.
    """
    one, other = np.array(first, dtype=np.float64), np.array(second, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(one), (_RESAMPLES, len(one)))

    def lengths(table: np.ndarray[Any, Any], rows: Any) -> Any:
        picked = table[rows].sum(axis=-2)
        return picked[..., 0] / picked[..., 1]

    everything = np.arange(len(one))
    differences = lengths(one, drawn) - lengths(other, drawn)
    low, high = np.quantile(differences, [0.025, 0.975])
    return {
        "first": float(lengths(one, everything)),
        "second": float(lengths(other, everything)),
        "difference": float(lengths(one, everything) - lengths(other, everything)),
        "interval_95": [float(low), float(high)],
    }


def calibrate(
    model: Any, head: Path, fit_on: Sequence[IntArray], judge_on: Sequence[IntArray], *, num_new: int
) -> tuple[Temperatures, dict[str, Any]]:
    """Temperatures fitted on some prompts; error and reliability of each prefix on others, before and after."""
    logs = []
    for prompts in (fit_on, judge_on):
        drafter: Any = load_diffusion(head, model, None, None)
        drafter.log = CalibrationLog()
        requests = [Request(str(i), prompt, SamplingParams(max_new_tokens=num_new)) for i, prompt in enumerate(prompts)]
        with build_engine(model, drafter, budget=16, max_batch_size=8) as engine:
            list(engine.generate(requests))
        logs.append(drafter.log)
    fitted = logs[0].fit()
    judged: dict[str, Any] = {"temperatures": list(fitted.values), "rounds": [len(log.drafted) for log in logs]}
    for name, temperatures in (("before", Temperatures()), ("after", fitted)):
        judged[name] = {
            "errors": logs[1].errors(temperatures),
            "curves": [reliability(*prefix) for prefix in logs[1].prefixes(temperatures)],
        }
    return fitted, judged


@app.command()
def lengths(
    json_file: JsonFile,
    head: HeadOption = _TRAINED / "dspark",
    eagle: EagleOption = _TRAINED / "eagle3",
    num_prompts: Annotated[int, typer.Option("--prompts", help="Judged texts of each kind.", min=1)] = 24,
    new_tokens: NewTokens = 96,
    threads: Threads = 1,
    save_calibration: Annotated[bool, typer.Option("--save-calibration", help="Beside the head.")] = False,
) -> None:
    """Acceptance lengths against the EAGLE head, and calibration; no times."""
    model, tokenizer = _loaded(threads)
    texts = {"code": _code(tokenizer, 0, num_prompts), "edits": _edits(tokenizer, 0, num_prompts)}
    others = [*_code(tokenizer, num_prompts, num_prompts), *_edits(tokenizer, num_prompts, num_prompts)]
    fitted, judged = calibrate(model, head, others, [*texts["code"], *texts["edits"]], num_new=new_tokens)
    if save_calibration:
        fitted.save(head / CALIBRATION_FILE)
    depth = load_diffusion(head, model, None, None).head.config.num_guesses  # type: ignore[attr-defined]
    shapes = {
        f"chain of {depth}": ("", f"top_k=1&depth={depth}&min_gain=0"),
        "tree of 16": ("?top_k=4", f"top_k=4&depth={depth}&min_gain=0"),
    }
    rows = []
    for text, prompts in texts.items():
        for shape, (own, other) in shapes.items():
            first = count(model, tokenizer, f"diffusion:{head}{own}", prompts, num_new=new_tokens)
            second = count(model, tokenizer, f"eagle:{eagle}?{other}", prompts, num_new=new_tokens)
            rows.append({"text": text, "shape": shape, **compare(first, second)})
            typer.echo(rows[-1])
    typer.echo(f"calibration error, before: {judged['before']['errors']}, after: {judged['after']['errors']}")
    what = (
        "acceptance length of a block-diffusion head (first) and an EAGLE head (second), bundled model, greedy, float32"
    )
    write_json(
        json_file,
        {
            "what": what, "prompts": num_prompts, "new_tokens": new_tokens,
            "parameters": {"first": _parameters(head), "second": _parameters(eagle)},
            "rows": rows, "calibration": judged,
        },
    )  # fmt: skip


@app.command()
def speed(
    json_file: JsonFile,
    head: HeadOption = _TRAINED / "dspark",
    eagle: EagleOption = _TRAINED / "eagle3",
    num_prompts: Annotated[int, typer.Option("--prompts", help="Texts of each kind.", min=1)] = 2,
    new_tokens: NewTokens = 64,
    repeats: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 5,
    threads: Threads = 2,
    batch: Annotated[int, typer.Option(help="Requests side by side.", min=1)] = 1,
    processor_time: Annotated[
        bool, typer.Option("--processor-time", help="On a busy machine, with one thread.")
    ] = False,
) -> None:
    """Tokens per second of every length rule and every fixed length."""
    if processor_time and threads > 1:
        raise typer.BadParameter(f"--processor-time needs --threads 1, got {threads}")
    model, tokenizer = _loaded(threads)
    depth = load_diffusion(head, model, None, None).head.config.num_guesses  # type: ignore[attr-defined]
    code, edits = _code(tokenizer, 0, num_prompts), _edits(tokenizer, 0, num_prompts)
    kinds = {"code": code, "both": [prompt for pair in zip(code, edits, strict=True) for prompt in pair]}
    found = {}
    for name, prompts in kinds.items():
        rows = measure(
            model,
            tokenizer,
            arms_of(head, eagle, depth),
            prompts,
            num_new=new_tokens,
            repeats=repeats,
            batch=batch,
            clock=process_time if processor_time else perf_counter,
        )
        found[name] = {"arms": rows, "against_best_fixed": against_best_fixed(rows)}
        for arm, row in rows.items():
            typer.echo(f"{name}, {arm}: {row['acceptance_length']:.2f}, {row['tokens_per_second']:.0f} tokens/s")
        typer.echo(f"{name}: {found[name]['against_best_fixed']}")
    what = "length rules of a block-diffusion head, bundled model, greedy, float32"
    clock = "processor" if processor_time else "wall"
    write_json(
        json_file,
        {
            "what": what, "clock": clock, "prompts": num_prompts, "new_tokens": new_tokens, "batch": batch,
            "texts": found,
        },
    )  # fmt: skip


def _loaded(threads: int) -> tuple[Any, Any]:
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    return load_model(_TINY)


def _code(tokenizer: Any, start: int, count: int) -> list[IntArray]:
    """The beginnings of held-out files, whole: without its first token the model writes what it never wrote."""
    files = heldout_files()[start : start + count]
    return [np.array(tokenizer(file.text[:600])["input_ids"], dtype=np.int32) for file in files]


def _edits(tokenizer: Any, start: int, count: int) -> list[IntArray]:
    tasks = heldout_tasks(start + count)[start:]
    return [np.array(edit_prompt(tokenizer, task.user), dtype=np.int32) for task in tasks]


def _parameters(folder: Path) -> int:
    """Numbers that were trained: every floating tensor of the checkpoint."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118  # no mapping
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


if __name__ == "__main__":
    app()
