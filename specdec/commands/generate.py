"""``specdec generate``: continue one prompt, show the text as it comes, and say what speculation brought."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specdec.commands import printing
from specdec.commands.loading import LoadedModel, load_model
from specdec.commands.options import (
    BudgetOption,
    DeviceOption,
    DrafterOption,
    DTypeOption,
    JsonOption,
    MaxNewTokensOption,
    ModelOption,
    OverlapOption,
    SeedOption,
    TemperatureOption,
    VerifierOption,
)
from specdec.errors import ConfigError, LoadError, UnsupportedError

if TYPE_CHECKING:
    from specdec.engine import Engine
    from specdec.types import Request, RequestOutput

__all__ = ["GenerationResult", "generate"]


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """One finished output and what it cost. Times are in seconds and leave out loading the model."""

    text: str
    output: RequestOutput  # the last one
    first_seconds: float  # until the first token: mostly the prompt
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        state = self.output.state
        decoded = max(state.num_output_tokens - 1, 0)
        decode_seconds = self.seconds - self.first_seconds
        return {
            "text": self.text,
            "token_ids": state.output_ids.tolist(),
            "finish_reason": self.output.finish_reason,
            "num_prompt_tokens": state.num_prompt_tokens,
            "num_output_tokens": state.num_output_tokens,
            "num_steps": state.num_steps,
            "num_drafted": state.num_drafted,
            "num_accepted": state.num_accepted,
            "acceptance_length": 1 + state.num_accepted / max(state.num_steps, 1),
            "acceptance_rate": state.num_accepted / max(state.num_drafted, 1),
            "seconds": self.seconds,
            "first_token_seconds": self.first_seconds,
            "tokens_per_second": state.num_output_tokens / self.seconds,
            "decode_tokens_per_second": decoded / decode_seconds if decoded and decode_seconds > 0 else None,
        }

    def summary(self) -> str:
        """The line below the text."""
        return (
            "{num_output_tokens} tokens in {seconds:.2f} s, {tokens_per_second:.1f} tokens/s; "
            "acceptance length {acceptance_length:.2f} over {num_steps} steps, "
            "{num_accepted} of {num_drafted} draft tokens accepted"
        ).format_map(self.as_json())


def generate(
    model: ModelOption,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", "-f", help="A file with the text to continue; - is stdin.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the text as a user's message in the chat template.")
    ] = False,
    drafter: DrafterOption = "ngram",
    budget: BudgetOption = None,
    overlap: OverlapOption = "auto",
    verifier: VerifierOption = "match",
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", min=0, help="Draw from the k likeliest tokens; 0 is off.")] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the likeliest tokens of this mass; 1 is off.")
    ] = 1.0,
    seed: SeedOption = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End the text here; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end mark.")] = False,
    dtype: DTypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt; the text streams to stdout, the statistics follow on stderr.

    specdec generate --model path/to/model --prompt "def add(a, b):" --drafter ngram

    Drafters with a checkpoint are written KIND:PATH?option=value&option=value.

    lm:PATH drafts with a smaller model (top_k, width, depth, min_gain). It wins where that model is several times
    cheaper than the target and of its family; it loses in large batches, and where both are about as slow.

    eagle:PATH drafts with an EAGLE-1/2/3 head that was trained for this very model (top_k, depth, min_gain, probe). It
    wins on most text at small batches; it loses with a head for another model, and far beyond its training's context.

    early-exit:N drafts with the target's own first N layers. It wins with targets that were trained to exit early; with
    others little of it is accepted.

    mtp drafts with the target's own multi-token-prediction layer, where its checkpoint has one (top_k, depth). It wins
    at small batches; it loses in large ones, and with targets that were fine-tuned without it.

    diffusion:PATH drafts with a DFlash or DSpark head that was trained for this very model, or with a masked diffusion
    LM that shares its tokens (rule, top_k). A head wins where a pass of a few layers buys several tokens; a masked LM
    only where it is much smaller than the target.

    layer-parallel:PATH?n=4 is lm:PATH whose draft runs in groups of n layers, over the ranks of torch.distributed. It
    wins where several devices idle while drafting; where a timed level says that it does not pay, it is off unless
    force=1.
    """
    from dataclasses import replace

    from specdec.build import build_engine, name_drafter
    from specdec.types import Request, SamplingParams

    # Whatever can be wrong without the model is said before the minutes that loading may take.
    words = _prompt(prompt, prompt_file)
    sampling = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens,
        stop_strings=tuple(stop or ()),
    )  # fmt: skip
    guesser = name_drafter(drafter)
    loaded = load_model(model, dtype=dtype, device=device)
    assert loaded.tokenizer is not None  # load_model requires one
    engine = build_engine(
        loaded.model, guesser, budget=budget, verifier=verifier, tokenizer=loaded.tokenizer, max_batch_size=1,
        overlap=overlap,
    )  # fmt: skip
    if not ignore_eos:
        sampling = replace(sampling, stop_token_ids=loaded.eos_ids)
    request = Request("cli", _encode(loaded, words, chat=chat), sampling)
    done = _run(engine, request, loaded.tokenizer, is_streamed=not as_json)
    if as_json:
        given = {"model": model, "drafter": drafter, "budget": budget, "verifier": verifier, "seed": seed}
        printing.result({**given, "is_lossless": engine.verifier.is_lossless, **done.as_json()})
    else:
        lossy = "" if engine.verifier.is_lossless else f"; LOSSY: {verifier} changes the law of the text"
        printing.note(f"\n{done.summary()}{lossy}")


def _prompt(prompt: str | None, prompt_file: str | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ConfigError("give the text to continue as --prompt or as --prompt-file, exactly one of them")
    if prompt is not None:
        return prompt
    try:
        return sys.stdin.read() if prompt_file == "-" else Path(str(prompt_file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"cannot read the prompt file {prompt_file!r}: {error}") from error


def _encode(loaded: LoadedModel, words: str, *, chat: bool) -> Any:
    tokenizer: Any = loaded.tokenizer
    if not chat:
        return tokenizer(words)["input_ids"]
    if not tokenizer.chat_template:
        raise UnsupportedError(f"--chat needs a chat template, and the tokenizer of {loaded.name} has none")
    messages = [{"role": "user", "content": words}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def _run(engine: Engine, request: Request, tokenizer: Any, *, is_streamed: bool) -> GenerationResult:
    from specdec.text import TextStream

    stream, pieces = TextStream(tokenizer), []
    begin = perf_counter()
    first = last = None
    for last in engine.generate([request]):
        if first is None and last.new_ids:
            first = perf_counter()
        pieces.append(stream.feed(last.new_ids))
        if is_streamed:
            printing.text(pieces[-1])
    end = perf_counter()
    assert last is not None, "an engine gives at least one output per request"
    pieces.append(stream.flush())
    if is_streamed:
        printing.text(pieces[-1] + "\n")
    return GenerationResult("".join(pieces), last, (first or end) - begin, end - begin)
