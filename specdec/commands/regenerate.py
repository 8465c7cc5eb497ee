"""``specdec regenerate``: a target's own answers to prompts, which its drafters learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specdec.commands import printing
from specdec.commands.loading import load_model
from specdec.commands.options import (
    DeviceOption,
    DrafterOption,
    DTypeOption,
    MaxNewTokensOption,
    ModelOption,
    SeedOption,
    TemperatureOption,
)

__all__ = ["regenerate"]


def regenerate(
    model: ModelOption,
    prompts: Annotated[
        Path, typer.Argument(help="JSON lines, each with prompt, messages or prompt_ids.", exists=True, dir_okay=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Examples as JSON lines; an existing file is extended.")],
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    drafter: DrafterOption = "suffix",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts answered at a time.")] = 16,
    dtype: DTypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Let the target answer prompts: what its drafter should learn from.

    specdec regenerate prompts.jsonl --model path/to/model --out examples.jsonl

    Prompts that the output file already holds are not answered again, so an interrupted run goes on.
    """
    from specdec.build import build_engine
    from specdec.online_training.data import read_examples
    from specdec.online_training.regenerate import read_prompts
    from specdec.online_training.regenerate import regenerate as answer
    from specdec.types import SamplingParams

    loaded = load_model(model, dtype=dtype, device=device)
    length = int(getattr(loaded.model.config.get_text_config(), "max_position_embeddings", 0) or 32_768)
    asked = [ids for ids in read_prompts(prompts, loaded.tokenizer) if len(ids) < length]
    done = set()
    if out.exists() and out.stat().st_size:
        kept = read_examples([out], max_length=length, vocab_size=loaded.model.config.get_text_config().vocab_size)
        done = {example.token_ids[: example.prompt_length].tobytes() for example in kept}
    todo = [(i, ids) for i, ids in enumerate(asked) if ids.tobytes() not in done]
    sampling = [
        SamplingParams(
            temperature=temperature, seed=seed + i, max_new_tokens=max_new_tokens, stop_token_ids=loaded.eos_ids
        )
        for i, _ in todo
    ]
    num_tokens = 0
    with (
        build_engine(loaded.model, drafter, tokenizer=loaded.tokenizer, max_batch_size=batch_size) as engine,
        out.open("a", encoding="utf-8") as stream,
        printing.progress() as bar,
    ):
        task = bar.add_task("answers", total=len(todo))
        for example in answer(engine, [ids for _, ids in todo], sampling):
            stream.write(example.as_json() + "\n")
            stream.flush()
            num_tokens += len(example.token_ids) - example.prompt_length
            bar.advance(task)
    printing.note(
        f"{len(todo)} answers of {num_tokens} tokens added to {out}; {len(done)} prompts were answered before"
    )
