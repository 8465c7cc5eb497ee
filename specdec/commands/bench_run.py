"""``specdec bench``: simulation, replay and live runs, and what can be done with their results.

specdec bench --mode simulate --tokenizer DIR --traces FILE --out result.json
specdec bench --mode replay --shape qwen2.5-0.5b --tokenizer DIR --traces FILE --out result.json
specdec bench --mode serve --url http://localhost:8000 --rate 1,2,4 --out result.json
specdec bench --gpu --out result.json
specdec bench compare A.json B.json
specdec bench report result.json --html report.html
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from specdec.commands import printing
from specdec.commands.bench import bench
from specdec.commands.bench_gpu import gpu
from specdec.commands.bench_serve import serve
from specdec.commands.bench_show import finish, numbers, show, slo_of
from specdec.commands.loading import load_model
from specdec.commands.options import (
    BudgetOption,
    DeviceOption,
    DTypeOption,
    OverlapOption,
    SeedOption,
    TemperatureOption,
    TracesOption,
)
from specdec.errors import ConfigError

if TYPE_CHECKING:
    from specdec.bench.targets import Target

__all__ = ["app"]

_DEFAULT_ARMS = {True: "plain,ngram,suffix,lookahead", False: "plain,ngram,suffix,generate,prompt-lookup"}  # simulated?


class _ByMode(TyperGroup):
    """``bench --mode replay ...`` is ``bench run --mode replay ...``; serve is a command of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            words = [word for arg in args for word in arg.split("=", 1)]
            mode = words[words.index("--mode") + 1 : words.index("--mode") + 2] if "--mode" in words else []
            if "--gpu" in words:
                args = ["gpu", *(arg for arg in args if arg != "--gpu")]
            elif mode == ["serve"]:
                args = ["serve", *(arg for arg in args if arg not in ("--mode", "serve", "--mode=serve"))]
            else:
                args = ["retrieval" if "--parts" in words else "run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_ByMode,
    help="Measure on recorded traffic. Without a command, --gpu is `gpu`, --mode serve is `serve`, --parts is "
    "`retrieval`, else `run`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("retrieval")(bench)
app.command()(serve)
app.command()(gpu)


@app.command()
def run(
    out: Annotated[Path, typer.Option("--out", "-o", help="The result file.")],
    traces: TracesOption = None,
    mode: Annotated[
        str, typer.Option("--mode", help="simulate: no model; replay: recorded answers are forced; live: it speaks.")
    ] = "simulate",
    model: Annotated[str | None, typer.Option("--model", "-m", help="A model with weights.")] = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Random weights: a known shape, or a config.json.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="A folder with one; default: the model's.")
    ] = None,
    assistant: Annotated[str | None, typer.Option("--assistant", help="The small model of the arm `assisted`.")] = None,
    arms: Annotated[
        str | None,
        typer.Option("--arms", help="Comma-separated; a wrong name lists them. Default: ours, and peers if timed."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Timed rounds; default 3, of a simulation 1.")
    ] = None,
    concurrency: Annotated[
        str, typer.Option("--concurrency", help="Requests at a time, such as 1,4,16: a sweep with plain at each.")
    ] = "1",
    temperature: TemperatureOption = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="1: off.")] = 1.0,
    budget: BudgetOption = None,
    overlap: OverlapOption = "auto",
    warmth: Annotated[str, typer.Option("--warmth", help="cold, self-warmed or warmed.")] = "self-warmed",
    train: Annotated[
        list[Path] | None, typer.Option("--train", help="Traces that warmed stores know; default: the other half.")
    ] = None,
    train_calls: Annotated[int, typer.Option("--train-calls", min=0, help="Of each source; 0: all.")] = 0,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Measure only the episodes nothing was tuned on.")
    ] = False,
    calls: Annotated[int, typer.Option("--calls", min=0, help="Of each source; 0: all.")] = 0,
    per_episode: Annotated[int, typer.Option("--per-episode", min=0, help="Calls of an episode; 0: all.")] = 0,
    max_prompt: Annotated[int, typer.Option("--max-prompt", min=0, help="Tokens kept at a prompt's end; 0: all.")] = 0,
    max_response: Annotated[int, typer.Option("--max-response", min=0, help="Tokens of an answer; 0: all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Of a live answer.")] = 128,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put prompts into the tokenizer's own template.")
    ] = False,
    slo: Annotated[str | None, typer.Option("--slo", help="TTFT,TPOT in milliseconds, for goodput.")] = None,
    format: Annotated[str, typer.Option("--format", help="Of the traces; auto: told from their keys.")] = "auto",
    strict: Annotated[bool, typer.Option("--strict", help="The first faulty record is an error.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what the result file has.")] = False,
    compact: Annotated[bool, typer.Option("--compact", help="Leave single calls out of the file.")] = False,
    seed: SeedOption = 0,
    dtype: DTypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Time every arm on the same calls in turns; Ctrl-C keeps what there is, --resume goes on."""
    from specdec.bench.run import BenchOptions, make_training, make_workload, run_bench

    is_simulated = mode == "simulate"
    options = BenchOptions(
        mode=mode, arms=tuple(filter(None, (arms or _DEFAULT_ARMS[is_simulated]).split(","))),
        rounds=rounds or (1 if is_simulated else 3), budget=budget, warmth=warmth,  # type: ignore[arg-type]
        max_new_tokens=max_new_tokens, calls=calls, per_episode=per_episode, max_prompt=max_prompt,
        max_response=max_response, seed=seed, temperature=temperature, top_p=top_p, held_out=held_out,
        train_calls=train_calls, chat_template=chat_template, concurrency=numbers("concurrency", concurrency, int),
        keep_rows=not compact, slo_ms=slo_of(slo), strict=strict, overlap=overlap,
    )  # fmt: skip
    target, words = _target(is_simulated, model, shape, tokenizer, dtype, device)
    helper = None if assistant is None else load_model(assistant, dtype=dtype, device=device).model
    encode = _encoder(words)
    with printing.status("reading the traces"):
        work = make_workload(traces or [], encode, options, format=format, tokenizer=words)
        training = make_training(train or [], traces or [], encode, options, format=format)
    if work.skips.counts:
        printing.note(f"passed over: {work.skips}")
    with printing.progress() as bar:
        task = bar.add_task(f"{mode} of {len(work.items)} calls by {len(options.arms)} arms", total=None)
        result = run_bench(
            target, work, options, output=out, resume=resume, assistant=helper, training=training, tokenizer=words,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    finish(result, out)


def _encoder(words: Any) -> Callable[[str], Any]:
    return lambda text: words.encode(text, add_special_tokens=False)


def _tokenizer(name: str | None) -> Any:
    """The tokenizer of the traces."""
    import transformers

    from specdec.errors import LoadError

    if name is None:
        raise ConfigError("without a model's own tokenizer, give one with --tokenizer")
    try:
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot load a tokenizer from {name!r}: {error}") from error


def _target(
    is_simulated: bool, model: str | None, shape: str | None, tokenizer: str | None, dtype: Any, device: str
) -> tuple[Target | None, Any]:
    """The model under test and the tokenizer of the traces."""
    from specdec.bench.targets import load_target, random_target

    if is_simulated:
        if model is not None or shape is not None:
            raise ConfigError("a simulation has no model: leave --model and --shape out, or choose --mode replay")
        return None, _tokenizer(tokenizer)
    if (model is None) == (shape is None):
        raise ConfigError("give the model as --model (with weights) or --shape (random ones), exactly one of them")
    words = None if tokenizer is None and model is not None else _tokenizer(tokenizer)
    if model is not None:
        loaded = load_model(model, dtype=dtype, device=device, needs_tokenizer=words is None)
        return load_target(loaded.model, loaded.tokenizer, loaded.name), words or loaded.tokenizer
    place = "cpu" if device == "auto" else device
    kind = "float32" if dtype == "auto" else dtype
    with printing.status(f"making {shape}"):
        return random_target(str(shape), dtype=kind, device=place), words


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A.json")], second: Annotated[Path, typer.Argument(help="B.json")]
) -> None:
    """Two results side by side; ~ marks differences within the spread of the rounds."""
    from specdec.bench.results_schema import read_result
    from specdec.bench.tables import compare_table, text_table

    rows, doubts = compare_table(read_result(first), read_result(second))
    printing.text(text_table(rows))
    for doubt in doubts:
        printing.text(f"note: {doubt}\n")


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="A result file.")],
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with plots, complete in itself.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
) -> None:
    """A result as tables on the terminal, as Markdown, or as a page."""
    from specdec.bench.html_report import html_report
    from specdec.bench.results_schema import read_result
    from specdec.bench.tables import markdown_table, result_table

    found = read_result(result)
    if html is not None:
        html.write_text(html_report(found), encoding="utf-8")
        printing.note(f"written to {html}")
    if markdown:
        printing.text(markdown_table(result_table(found)))
    elif html is None:
        show(found)
