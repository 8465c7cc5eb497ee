"""What the engine costs without a drafter: budget 0 against ``model.generate``, one request and a ragged batch.

    python -m specdec.bench.plain_speed --json bench/results/plain_speed.json

Both sides decode greedily, the same weights, the same prompts, the same number of new tokens; outputs are compared. The
ragged batch is padded on the left for ``generate``, as its users do. The engine is built once, before the clock runs,
and packs its model's weights; ``generate`` runs on a model that nobody changed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

from specdec.bench.measure import interleave, median_and_spread, write_json
from specdec.build import build_engine
from specdec.engine import Engine
from specdec.types import IntArray, Request, SamplingParams

__all__ = ["by_engine", "by_generate", "compare", "main", "random_llama"]

_TINY = Path(__file__).parent / "tiny"
_RAGGED_LENGTHS = (24, 61, 97, 150, 204, 290, 351, 480)


def random_llama(layers: int, hidden: int, vocab: int) -> PreTrainedModel:
    """A randomly initialised Llama-shaped model: costs what a trained one of its shape costs."""
    heads = hidden // 64
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def by_generate(model: PreTrainedModel, prompts: list[IntArray], num_new: int) -> list[list[int]]:
    """The new tokens of transformers' own greedy loop over a left-padded batch."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=num_new, eos_token_id=None, pad_token_id=0
    )
    return out[:, width:].tolist()  # type: ignore[no-any-return]


def by_engine(engine: Engine, prompts: list[IntArray], num_new: int) -> list[list[int]]:
    """The same through an engine with budget 0."""
    outputs: dict[str, list[int]] = {}
    sampling = SamplingParams(max_new_tokens=num_new)
    for output in engine.generate([Request(str(i), p, sampling) for i, p in enumerate(prompts)]):
        outputs.setdefault(output.request_id, []).extend(output.new_ids)
    return [outputs[str(i)] for i in range(len(prompts))]


def compare(model: PreTrainedModel, prompts: list[IntArray], num_new: int, repeats: int) -> dict[str, Any]:
    """Seconds of both sides, their ratio, and whether the texts agree."""
    options: dict[str, Any] = {
        "kv_tokens": sum(map(len, prompts)) + len(prompts) * num_new,
        "max_batch_size": len(prompts),
    }
    with build_engine(copy.deepcopy(model), "none", budget=0, max_prefill_tokens=4096, **options) as engine:
        same = by_generate(model, prompts, num_new) == by_engine(engine, prompts, num_new)
        seconds = interleave(
            {
                "generate": lambda: by_generate(model, prompts, num_new),
                "engine_budget_0": lambda: by_engine(engine, prompts, num_new),
            },
            repeats=repeats,
        )
    ratios = [g / e for g, e in zip(seconds["generate"], seconds["engine_budget_0"], strict=True)]
    return {
        "num_requests": len(prompts),
        "prompt_tokens": [len(p) for p in prompts],
        "new_tokens": num_new,
        "same_tokens": same,
        **{name: median_and_spread(times) for name, times in seconds.items()},
        "speedup_median": statistics.median(ratios),
        "speedup_min": min(ratios),
        "speedup_max": max(ratios),
    }


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    models = {
        "bundled": transformers.AutoModelForCausalLM.from_pretrained(_TINY, dtype=torch.float32).eval(),
        "llama 8 layers x 512, vocabulary 16000, random": random_llama(8, 512, 16000),
    }
    rng = np.random.default_rng(0)
    results: dict[str, Any] = {}
    for name, model in models.items():
        vocab = model.config.vocab_size
        ragged = [rng.integers(10, vocab, n).astype(np.int32) for n in _RAGGED_LENGTHS]
        results[name] = {
            "one request": compare(model, ragged[4:5], args.new_tokens, args.repeats),
            "ragged batch of 8": compare(model, ragged, args.new_tokens, args.repeats),
        }
    write_json(args.json, {"what": "engine with budget 0 against model.generate, float32 greedy", "models": results})


if __name__ == "__main__":
    main()
