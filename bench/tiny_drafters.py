"""The bundled model's drafters: the prompts that they are trained on, and how long their drafts are accepted.

    python -m specdec.bench.tiny_drafters prompts --out prompts.jsonl
    python -m specdec.bench.tiny_drafters measure --json bench/results/tiny_drafters.json

Training prompts come from the training side of the split alone; what is measured is held out (`bench/edit_tasks.py`).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from specdec.bench.edit_tasks import stdlib_root
from specdec.bench.tiny_data import Corpus, RowStream, load_corpus

__all__ = ["app", "measure", "prompts"]

_TINY = Path(__file__).parent / "tiny"
_DRAFTERS = Path(__file__).parent / "tiny_drafters"
app = typer.Typer(help="The bundled model's drafters.")


@app.callback()
def _root() -> None:
    """The bundled model's drafters."""


@app.command()
def prompts(
    out: Annotated[Path, typer.Option(help="JSON lines with prompt_ids.")],
    edits: Annotated[int, typer.Option(help="Edit tasks.", min=0)] = 1000,
    plain: Annotated[int, typer.Option(help="Pieces of code to continue.", min=0)] = 800,
    seed: Annotated[int, typer.Option(help="Picks both.")] = 0,
) -> None:
    """Write training prompts from the standard library's training side, edits and plain code mixed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_TINY)
    corpus = load_corpus(stdlib_root(), None)
    found = [prompt for prompt, _ in RowStream(corpus, tokenizer, seed=seed).edits(0, edits, (200, 1800))]
    found += _code(corpus, tokenizer, plain, seed)
    random.Random(f"prompts-{seed}").shuffle(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in found), encoding="utf-8")
    typer.echo(f"{len(found)} prompts, {sum(map(len, found))} tokens")


def _code(corpus: Corpus, tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Beginnings and middles of files, 200 to 1200 characters."""
    rng, found = random.Random(f"code-{seed}"), list[list[int]]()
    while len(found) < count:
        text = rng.choice(corpus.files)
        start = 0 if rng.random() < 0.3 else text.rfind("\n", 0, rng.randrange(len(text))) + 1
        piece = text[start : start + rng.randrange(200, 1200)]
        if len(piece) > 150:
            found.append(tokenizer(piece)["input_ids"])
    return found


def _arms(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> drafter and budget: what is bundled, and n-gram lookup beside it."""
    arms: dict[str, dict[str, Any]] = {"ngram, chain of 5": {"drafter": "ngram", "budget": 5}}
    if (folder / "eagle3").is_dir():
        head = f"eagle:{folder / 'eagle3'}?min_gain=0"  # lengths: nothing that measured times decide
        arms |= {
            "eagle3, chain of 5": {"drafter": f"{head}&top_k=1&depth=5", "budget": 5},
            "eagle3, tree of 16": {"drafter": f"{head}&top_k=4&depth=6", "budget": 16},
            "eagle3, tree of 59": {"drafter": f"{head}&top_k=10&depth=8", "budget": 59},
            "eagle3, tree of 59, 14 deep": {"drafter": f"{head}&top_k=10&depth=14", "budget": 59},
        }
    if (folder / "dspark").is_dir():
        block = f"diffusion:{folder / 'dspark'}"
        arms |= {
            "dspark, chain of 5": {"drafter": block, "budget": 5},
            "dspark, tree of 16": {"drafter": f"{block}?top_k=4", "budget": 16},
        }
    if (folder / "lm").is_dir():
        small = f"lm:{folder / 'lm'}?min_gain=0"
        arms |= {
            "lm, chain of 5": {"drafter": f"{small}&top_k=1&width=1&depth=5", "budget": 5},
            "lm, tree of 16": {"drafter": f"{small}&top_k=4&width=4&depth=6", "budget": 16},
        }
    return arms


@app.command()
def measure(
    json_file: Annotated[Path, typer.Option("--json", help="Where the figures go.")],
    folder: Annotated[Path, typer.Option(help="The drafters: eagle3, dspark, lm.")] = _DRAFTERS,
    count: Annotated[int, typer.Option("--prompts", help="Held-out texts of each kind.", min=1)] = 8,
    new_tokens: Annotated[int, typer.Option(help="Decoded after each.", min=8)] = 96,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Acceptance lengths on held-out edits, held-out code and over all steps of both, greedy and sampled; no times."""
    import numpy as np
    import torch

    from specdec.bench.drafter_tables import pooled
    from specdec.bench.edit_tasks import heldout_files, heldout_tasks
    from specdec.bench.measure import write_json
    from specdec.bench.model_drafters import measure as decode
    from specdec.bench.tiny_eval import edit_prompt, load_model

    torch.set_num_threads(threads)
    model, tokenizer = load_model(_TINY)
    texts = {
        "edits": [edit_prompt(tokenizer, task.user) for task in heldout_tasks(count)],
        "code": [tokenizer(file.text[:600])["input_ids"] for file in heldout_files()[:count]],
    }
    rows: list[dict[str, Any]] = []
    for temperature in (0.0, 0.8):
        for arm, options in _arms(folder).items():
            found = {
                kind: decode(
                    model, tokenizer, prompts=[np.array(one[-1500:], dtype=np.int32) for one in prompts_of],
                    batch=count, temperature=temperature, num_new=new_tokens, **options,
                )
                for kind, prompts_of in texts.items()
            }  # fmt: skip
            lengths = {
                **{kind: row["acceptance_length"] for kind, row in found.items()},
                "both": pooled(found.values()),
            }
            for kind, length in lengths.items():
                steps = found[kind]["steps"] if kind in found else sum(row["steps"] for row in found.values())
                row = {"text": kind, "temperature": temperature, "arm": arm}
                rows.append({**row, "acceptance_length": round(length, 3), "steps": steps})
                typer.echo(f"{kind}, T={temperature}, {arm}: {length:.2f}")
    what = "acceptance lengths (tokens per step of the target) of the bundled drafters, bundled model, float32"
    write_json(json_file, {"what": what, "prompts": count, "new_tokens": new_tokens, "rows": rows})


if __name__ == "__main__":
    app()
