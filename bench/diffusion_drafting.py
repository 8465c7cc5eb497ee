"""Block-diffusion heads on a model: length rules against fixed lengths and an EAGLE head, and calibration.

    python -m specdec.bench.diffusion_drafting --head PATH --eagle PATH --json bench/results/diffusion_drafting.json

Greedy continuations of held-out code, one request at a time, all arms interleaved in one process. Calibration is fitted
on the first half of the prompts and judged on the second half.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from specdec.bench.edit_tasks import heldout_files
from specdec.bench.measure import interleave, write_json
from specdec.bench.tiny_eval import load_model
from specdec.build import build_engine
from specdec.drafters.calibration import CalibrationLog, Temperatures, reliability
from specdec.drafters.diffusion_loading import load_diffusion
from specdec.types import IntArray, Request, SamplingParams

__all__ = ["arms_of", "calibrate", "main", "measure"]

_TINY = Path(__file__).parent / "tiny"
_RULES = {
    "threshold .4": "rule=threshold&at=0.4",
    "threshold .6": "rule=threshold&at=0.6",
    "throughput": "rule=throughput",
    "chunk of 2": "rule=chunk&size=2",
    "ema": "rule=ema",
}


def arms_of(head: Path, eagle: Path | None, num_guesses: int) -> dict[str, str]:
    """Name of an arm -> its drafter."""
    arms = {"plain": "none"}
    if eagle is not None:
        arms["eagle, chain"] = f"eagle:{eagle}?top_k=1&depth={num_guesses}"
    arms |= {f"fixed {n}": f"diffusion:{head}?length={n}" for n in range(1, num_guesses + 1)}
    return arms | {name: f"diffusion:{head}?{options}" for name, options in _RULES.items()}


def measure(
    model: Any, tokenizer: Any, arms: Mapping[str, str], prompts: Sequence[IntArray], *, num_new: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Acceptance length and tokens per second of every arm, and its speed over plain decoding, round by round."""
    sampling = SamplingParams(max_new_tokens=num_new)
    engines = {
        name: build_engine(model, drafter, tokenizer=tokenizer, budget=16, max_batch_size=1)
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

    seconds = interleave({name: partial(run, name) for name in arms}, repeats=repeats)
    for engine in engines.values():
        engine.close()
    rows = {}
    for name, (tokens, steps, drafted) in counts.items():
        ratios = [plain / own for plain, own in zip(seconds["plain"], seconds[name], strict=True)]
        rows[name] = {
            "acceptance_length": tokens / steps,
            "drafted_per_step": drafted / steps,
            "tokens_per_second": tokens / float(np.median(seconds[name])),
            "speed_over_plain": statistics.median(ratios),
            "least_speed": min(ratios),
            "greatest_speed": max(ratios),
        }
    return rows


def calibrate(
    model: Any, head: Path, fit_on: Sequence[IntArray], judge_on: Sequence[IntArray], *, num_new: int
) -> dict[str, Any]:
    """Temperatures fitted on some prompts; error and reliability of each prefix on others, before and after."""
    logs = []
    for prompts in (fit_on, judge_on):
        drafter: Any = load_diffusion(head, model, None, None)
        drafter.log = CalibrationLog()
        requests = [Request(str(i), prompt, SamplingParams(max_new_tokens=num_new)) for i, prompt in enumerate(prompts)]
        with build_engine(model, drafter, budget=16, max_batch_size=1) as engine:
            list(engine.generate(requests))
        logs.append(drafter.log)
    fitted = logs[0].fit()
    judged: dict[str, Any] = {"temperatures": list(fitted.values), "rounds": [len(log.drafted) for log in logs]}
    for name, temperatures in (("before", Temperatures()), ("after", fitted)):
        judged[name] = {
            "errors": logs[1].errors(temperatures),
            "curves": [reliability(*prefix) for prefix in logs[1].prefixes(temperatures)],
        }
    return judged


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--head", type=Path, required=True, help="a block-diffusion head for the bundled model")
    parser.add_argument("--eagle", type=Path, help="an EAGLE head for the bundled model")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    model, tokenizer = load_model(_TINY)
    texts = [tokenizer(file.text[:600])["input_ids"][-200:] for file in heldout_files()[: args.prompts]]
    prompts = [np.array(ids, dtype=np.int32) for ids in texts]
    half = max(len(prompts) // 2, 1)
    calibration = calibrate(model, args.head, prompts[:half], prompts[half:] or prompts, num_new=args.new_tokens)
    num_guesses = load_diffusion(args.head, model, None, None).head.config.num_guesses  # type: ignore[attr-defined]
    rows = measure(
        model, tokenizer, arms_of(args.head, args.eagle, num_guesses), prompts[half:] or prompts,
        num_new=args.new_tokens, repeats=args.repeats,
    )  # fmt: skip
    what = "block-diffusion head on the bundled model, greedy, held-out code, one request at a time"
    write_json(args.json, {"what": what, "arms": rows, "calibration": calibration})


if __name__ == "__main__":
    main()
