"""Measure the bundled model on held-out files: code loss, edits carried out, lines copied, loops.

    python -m specdec.bench.tiny_eval --model bench/tiny --json bench/results/tiny_eval.json

Everything is greedy and in float32. A loop shows as a low distinct-4-gram ratio: the share of 4-grams in the first
128 new tokens that are different from each other (1.0 = no 4-gram occurs twice).
"""

from __future__ import annotations

import difflib
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.bench.edit_tasks import EditTask, heldout_files, heldout_tasks
from specdec.errors import ConfigError

__all__ = ["card_table", "copied_lines", "distinct_ngrams", "edit_prompt", "evaluate", "generate", "load_model", "main"]

_CONTINUATION = 128  # new tokens that the distinct-4-gram ratio looks at
_CONTEXT = 2048


def load_model(folder: Path) -> tuple[Any, Any]:
    """Return (model in float32 and eval mode, tokenizer) of an exported folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def edit_prompt(tokenizer: Any, user: str) -> list[int]:
    """Return the token ids of a user message in the chat format, ready for the answer."""
    messages = [{"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def distinct_ngrams(ids: Sequence[int], n: int = 4) -> float:
    """Return distinct n-grams / n-grams of a sequence, 1.0 when it is too short to hold two."""
    grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def copied_lines(answer: str, reference: str) -> float:
    """Return the share of the reference's lines that the answer holds, in order."""
    lines = reference.splitlines()
    matcher = difflib.SequenceMatcher(None, answer.splitlines(), lines, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / max(1, len(lines))


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], *, batch: int = 10
) -> list[list[int]]:
    """Return greedy continuations without the end token, each at most its limit long; long prompts share batches."""
    out: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    pad, eos = model.config.pad_token_id, model.config.eos_token_id
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        width = max(len(prompts[i]) for i in some)
        ids = torch.full((len(some), width), pad)
        mask = torch.zeros((len(some), width), dtype=torch.long)
        for row, i in enumerate(some):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        longest = max(limits[i] for i in some)
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=False)[:, width:]
        for row, i in enumerate(some):
            new = made[row].tolist()
            out[i] = (new[: new.index(eos)] if eos in new else new)[: limits[i]]
    return out


@torch.no_grad()
def _code_loss(model: Any, tokenizer: Any, rows: int, length: int) -> dict[str, float]:
    """Return loss per token, perplexity and bits per byte on windows spread evenly over the held-out files."""
    text = "\n".join(file.text for file in heldout_files())
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    stride = max(length, (len(ids) - length) // rows)
    windows = torch.tensor([ids[i : i + length] for i in range(0, len(ids) - length, stride)][:rows])
    total, nbytes = 0.0, 0
    for window in torch.split(windows, 4):
        logits = model(input_ids=window, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
        nbytes += sum(len(tokenizer.decode(row[1:].tolist()).encode()) for row in window)
    tokens = windows.shape[0] * (length - 1)
    return {
        "tokens": tokens,
        "loss": round(total / tokens, 4),
        "perplexity": round(math.exp(total / tokens), 3),
        "bits_per_byte": round(total / math.log(2) / nbytes, 4),
    }


def _edits(model: Any, tokenizer: Any, tasks: Sequence[EditTask]) -> dict[str, Any]:
    """Return exact matches, copied lines and distinct 4-grams of the greedy answers, in all and by kind."""
    prompts = [edit_prompt(tokenizer, task.user) for task in tasks]
    references = [tokenizer(task.answer, add_special_tokens=False)["input_ids"] for task in tasks]
    limits = [min(len(r) + 64, _CONTEXT - len(p)) for p, r in zip(prompts, references, strict=True)]
    answers = generate(model, prompts, limits)
    texts = [tokenizer.decode(ids) for ids in answers]
    exact = [text == task.answer for text, task in zip(texts, tasks, strict=True)]
    lines = [copied_lines(text, task.answer) for text, task in zip(texts, tasks, strict=True)]
    kinds = sorted({task.kind for task in tasks})
    return {
        "tasks": len(tasks),
        "mean_prompt_tokens": round(statistics.fmean(map(len, prompts)), 1),
        "mean_answer_tokens": round(statistics.fmean(map(len, references)), 1),
        "exact_match": round(statistics.fmean(exact), 4),
        "line_accuracy": round(statistics.fmean(lines), 4),
        "line_accuracy_worst": round(min(lines), 4),
        "ended_by_itself": round(statistics.fmean(len(a) < limit for a, limit in zip(answers, limits, strict=True)), 4),
        "distinct_4gram_ratio": round(statistics.fmean(distinct_ngrams(a[:_CONTINUATION]) for a in answers), 4),
        "distinct_4gram_ratio_of_references": round(
            statistics.fmean(distinct_ngrams(r[:_CONTINUATION]) for r in references), 4
        ),
        "exact_match_by_kind": {
            kind: round(statistics.fmean(e for e, t in zip(exact, tasks, strict=True) if t.kind == kind), 4)
            for kind in kinds
        },
    }


def _continuations(model: Any, tokenizer: Any, count: int, seed: int) -> dict[str, Any]:
    """Return distinct 4-grams of greedy continuations of held-out files, cut at a random place."""
    rng = random.Random(f"continuations-{seed}")
    files = heldout_files()
    prompts: list[list[int]] = []
    references: list[list[int]] = []
    while len(prompts) < count:
        ids = tokenizer(rng.choice(files).text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= 3 * _CONTINUATION:
            start = rng.randrange(len(ids) - 3 * _CONTINUATION + 1)
            prompts.append(ids[start : start + 2 * _CONTINUATION])
            references.append(ids[start + 2 * _CONTINUATION : start + 3 * _CONTINUATION])
    ratios = [distinct_ngrams(ids) for ids in generate(model, prompts, [_CONTINUATION] * count)]
    return {
        "prompts": count,
        "prompt_tokens": 2 * _CONTINUATION,
        "distinct_4gram_ratio": round(statistics.fmean(ratios), 4),
        "share_below_half": round(statistics.fmean(r < 0.5 for r in ratios), 4),
        "distinct_4gram_ratio_of_references": round(statistics.fmean(map(distinct_ngrams, references)), 4),
    }


def evaluate(folder: Path, *, tasks: int = 50, seed: int = 0) -> dict[str, Any]:
    """Return all measurements of an exported model.

    Args:
        folder: holds weights, config and tokenizer.
        tasks: number of edit prompts and of plain continuation prompts, at least 1.
        seed: picks the held-out prompts.

    Raises:
        ConfigError: ``tasks`` < 1.
    """
    if tasks < 1:
        raise ConfigError(f"tasks must be at least 1, got {tasks}")
    started = time.monotonic()
    model, tokenizer = load_model(folder)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "code": _code_loss(model, tokenizer, rows=48, length=512),
        "edit": _edits(model, tokenizer, heldout_tasks(tasks, seed=seed)),
        "continuation": _continuations(model, tokenizer, tasks, seed),
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "seconds": round(time.monotonic() - started),
    }


def card_table(result: dict[str, Any]) -> str:
    """Return the Markdown table of one result, as the model card shows it."""
    code, edit, plain = result["code"], result["edit"], result["continuation"]
    rows = [
        ("loss per token on held-out code", f"{code['loss']:.2f} (perplexity {code['perplexity']:.1f})"),
        ("bits per byte on held-out code", f"{code['bits_per_byte']:.2f}"),
        (f"edit tasks carried out exactly, of {edit['tasks']}", f"{edit['exact_match']:.0%}"),
        ("lines of the reference answer reproduced", f"{edit['line_accuracy']:.1%}"),
        ("answers that end by themselves", f"{edit['ended_by_itself']:.0%}"),
        ("distinct 4-grams, edit answers (references)", _pair(edit)),
        (f"distinct 4-grams, plain continuation of {plain['prompts']} prompts (references)", _pair(plain)),
        ("plain continuations below 0.5", f"{plain['share_below_half']:.0%}"),
    ]
    return "\n".join(["| measured | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _pair(part: dict[str, Any]) -> str:
    return f"{part['distinct_4gram_ratio']:.2f} ({part['distinct_4gram_ratio_of_references']:.2f})"


def _update_card(card: Path, result: dict[str, Any]) -> None:
    """Put the table between the card's two markers."""
    before, _, rest = card.read_text().partition("<!-- eval -->\n")
    _, marker, after = rest.partition("<!-- /eval -->")
    if not marker:
        raise ConfigError(f"{card} must hold the markers <!-- eval --> and <!-- /eval -->")
    card.write_text(f"{before}<!-- eval -->\n{card_table(result)}\n{marker}{after}")


def main(
    model: Annotated[Path, typer.Option(help="The exported model.")] = Path("bench/tiny"),
    tasks: Annotated[int, typer.Option(help="Edit prompts, and continuation prompts.", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="Of the choice of prompts.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    out: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
    card: Annotated[Path | None, typer.Option(help="Also put the table into this model card.")] = None,
) -> None:
    """Print the measurements as JSON."""
    torch.set_num_threads(threads)
    result = evaluate(model, tasks=tasks, seed=seed)
    text = json.dumps(result, indent=1)
    typer.echo(text)
    if card:
        _update_card(card, result)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
