"""Recorded calls replayed on the large model of the GPU benchmark: tokens per second over plain decoding, by source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from specdec.bench.run import BenchOptions, make_workload, run_bench
from specdec.bench.targets import Target

__all__ = ["replay"]

_WORDS = Path(__file__).parent / "tiny"  # the bundled model's: random weights read any tokenizer's ids


def replay(
    target: Target, *, traces: Sequence[Path], calls: int, max_prompt: int, max_response: int
) -> list[dict[str, Any]]:
    """Plain decoding and suffix drafts over the same calls; answers are the recorded ones, whatever the weights say.

    Args:
        target: the model.
        traces: files and folders; none: edits of this machine's standard library.
        calls: of each source.
        max_prompt: tokens of a prompt, its last ones.
        max_response: tokens of an answer, its first ones.

    Returns:
        For each source and arm: calls, tokens per second, tokens accepted per step with the bonus, and the speed over
        plain decoding with its 95 % interval.
    """
    words: Any = AutoTokenizer.from_pretrained(_WORDS)
    vocab_size = target.model.config.get_text_config().vocab_size
    options = BenchOptions(
        arms=("plain", "suffix"), rounds=1, calls=calls, max_prompt=max_prompt, max_response=max_response
    )
    work = make_workload(
        traces, lambda text: [one % vocab_size for one in words.encode(text, add_special_tokens=False)], options
    )
    result = run_bench(target, work, options)
    return [
        {
            "source": summary.source, "arm": summary.arm, "calls": summary.num_calls,
            "tokens_per_s": summary.tokens_per_s, "acceptance_length": summary.acceptance_length,
            "over_plain": {name: speedup.model_dump() for name, speedup in summary.speedups.items()},
        }
        for summary in result.summaries
    ]  # fmt: skip
