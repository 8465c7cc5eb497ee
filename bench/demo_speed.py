"""What ``make demo`` shows, over more edits and with the machine written down.

    python -m specdec.bench.demo_speed --json bench/results/demo.json

Plain decoding (the same engine, budget 0) and the drafter alternate in one process; the bundled model edits held-out
standard library code in float32, greedily.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from specdec.bench.edit_tasks import heldout_tasks
from specdec.bench.measure import write_json
from specdec.demo import run_demo

_TINY = Path(__file__).parent / "tiny"


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--drafter", default="ngram")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(_TINY, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(_TINY)
    outcome = run_demo(model, tokenizer, heldout_tasks(args.tasks), drafter=args.drafter, repeats=args.repeats)
    plain, drafted = outcome.tokens_per_s
    num_new = sum(edit.num_new_tokens for edit in outcome.edits)
    num_steps = sum(edit.num_new_tokens / edit.acceptance_length for edit in outcome.edits)
    edits = [
        {k: v for k, v in asdict(edit).items() if k != "diff"} | {"speedup": edit.speedup} for edit in outcome.edits
    ]
    result = {
        "what": "the bundled model edits held-out standard library code, float32, greedy",
        "drafter": outcome.drafter,
        "num_edits": len(edits),
        "num_right": sum(edit.is_right for edit in outcome.edits),
        "same_tokens": outcome.same_tokens,
        "num_new_tokens": num_new,
        "acceptance_length": num_new / num_steps,
        "plain_tokens_per_s": plain,
        "drafted_tokens_per_s": drafted,
        "speedup": outcome.speedup,
        "edits": edits,
    }
    write_json(args.json, result)


if __name__ == "__main__":
    main()
