"""``specdec train``: a drafter for one target, from the target's own answers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from specdec.commands import printing
from specdec.commands.loading import load_model
from specdec.commands.options import DeviceOption, JsonOption, ModelOption, SeedOption
from specdec.errors import ConfigError

if TYPE_CHECKING:
    from specdec.online_training.train_loop import StepReport, TrainPlan
    from specdec.online_training.train_run import RunOptions, TrainRun
    from specdec.online_training.train_setup import DrafterPlan

__all__ = ["train"]

Kind = Literal["eagle3", "dflash", "dspark", "lm"]


KindOption = Annotated[
    Kind,
    typer.Argument(
        help="eagle3: an EAGLE-3 head; dflash, dspark: block-diffusion heads, dspark with a Markov and a confidence "
        "head; lm: a small draft model."
    ),
]
DataOption = Annotated[
    list[Path],
    typer.Option("--data", help="JSON lines: token_ids and prompt_length, messages, or prompt and response."),
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Where the drafter is written when the schedule ends.")]
WorkOption = Annotated[
    Path | None, typer.Option("--work", help="Checkpoint, curve, TensorBoard events; OUT.work if omitted.")
]
InitOption = Annotated[Path | None, typer.Option("--init", help="Begin from this drafter's weights.")]
LayersOption = Annotated[
    str | None,
    typer.Option("--layers", help="Heads: whose states they read, such as 2,16,29 of 32: entering these layers."),
]
LayoutOption = Annotated[
    Literal["speculators", "specforge"],
    typer.Option("--layout", help="eagle3: speculators is for vLLM, specforge for SGLang."),
]
DraftVocabOption = Annotated[
    int | None, typer.Option("--draft-vocab", min=1, help="eagle3: only so many of the most frequent tokens.")
]
DepthOption = Annotated[
    int | None,
    typer.Option(
        "--depth",
        min=1,
        help="eagle3: steps of the training-time test, 7; dflash, dspark: tokens of a block, 15 and 7; lm: tokens "
        "looked ahead, 4.",
    ),
]
NumLayersOption = Annotated[
    int | None,
    typer.Option("--num-layers", min=1, help="dflash, dspark: layers, 5; lm: so many first ones of the target, 2."),
]
LossOption = Annotated[
    str | None,
    typer.Option(
        "--loss",
        help="forward_kl, reverse_kl, total_variation, cross_entropy, lk_alpha, lk_hybrid; a=0.1,b=0.9; the published "
        "one of the kind if omitted.",
    ),
]
BeginAsOption = Annotated[
    str | None,
    typer.Option(
        "--begin-as", help="dflash, dspark: layers of the target to begin as, such as 1,5; random if omitted."
    ),
]
CopyingOption = Annotated[
    bool,
    typer.Option("--copying", help="dflash, dspark: made to copy from the first step; needs --begin-as, such as 0,1."),
]
MaskTokenOption = Annotated[
    int | None,
    typer.Option("--mask-token", min=0, help="dflash, dspark: a token no text holds; the padding token if omitted."),
]
InnerSizeOption = Annotated[
    int, typer.Option("--inner-size", min=0, help="dflash, dspark: width of the MLPs; 0: the target's.")
]
MarkovOption = Annotated[
    Literal["none", "vanilla", "gated", "rnn"], typer.Option("--markov", help="dspark: kind of the Markov head.")
]
MarkovRankOption = Annotated[int, typer.Option("--markov-rank", min=1, help="dspark: of the Markov head.")]
AnchorsOption = Annotated[int, typer.Option("--anchors", min=1, help="dflash, dspark: most blocks of a text and step.")]
SlotWeightsOption = Annotated[
    Literal["decay", "dpace"], typer.Option("--slot-weights", help="dflash, dspark: how a block's guesses are weighed.")
]
DecayOption = Annotated[
    float, typer.Option("--decay", help="dflash, dspark: guess k weighs exp(-k / this); 7 for blocks of 16, 4 of 8.")
]
ConfidenceOption = Annotated[
    float, typer.Option("--confidence", min=0.0, help="dspark: factor of the confidence head's loss; 0: no such head.")
]
ConfidenceOfOption = Annotated[
    Literal["drawn", "likeliest"],
    typer.Option("--confidence-of", help="dspark: the chance that a drawn or that the likeliest token is accepted."),
]
EpochsOption = Annotated[float, typer.Option("--epochs", help="Passes over the data.")]
BatchTokensOption = Annotated[int, typer.Option("--batch-tokens", help="Tokens of a micro-batch, with padding.")]
AccumulateOption = Annotated[int, typer.Option("--accumulate", help="Micro-batches of one optimizer step.")]
MaxLengthOption = Annotated[
    int | None, typer.Option("--max-length", min=4, help="Longer examples are cut; 2048 or the context if omitted.")
]
LrOption = Annotated[float, typer.Option("--lr", help="Peak rate of AdamW.")]
MuonLrOption = Annotated[
    float, typer.Option("--muon-lr", help="Above 0: hidden matrices learn by Muon at this peak rate.")
]
ScheduleOption = Annotated[
    Literal["constant", "cosine", "linear"], typer.Option("--schedule", help="Of the rates, after the warm-up.")
]
PrecisionOption = Annotated[
    Literal["bf16", "fp32"], typer.Option("--precision", help="Of products; weights stay float32.")
]
FeatureCacheOption = Annotated[
    Path | None, typer.Option("--feature-cache", help="Keep the target's states here between epochs.")
]
EvaluateEveryOption = Annotated[int, typer.Option("--evaluate-every", help="Steps between evaluations.")]
SaveEveryOption = Annotated[int, typer.Option("--save-every", help="Steps between checkpoints.")]
StopAfterOption = Annotated[
    int, typer.Option("--stop-after", help="Take so many steps now and go on another time; 0: all.")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Begin anew where a checkpoint could be gone on with.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; torch's own if omitted.")]


def train(
    kind: KindOption,
    model: ModelOption,
    data: DataOption,
    out: OutOption,
    work: WorkOption = None,
    init: InitOption = None,
    layers: LayersOption = None,
    layout: LayoutOption = "speculators",
    draft_vocab: DraftVocabOption = None,
    depth: DepthOption = None,
    num_layers: NumLayersOption = None,
    loss: LossOption = None,
    begin_as: BeginAsOption = None,
    copying: CopyingOption = False,
    mask_token: MaskTokenOption = None,
    inner_size: InnerSizeOption = 0,
    markov: MarkovOption = "vanilla",
    markov_rank: MarkovRankOption = 256,
    anchors: AnchorsOption = 512,
    slot_weights: SlotWeightsOption = "decay",
    decay: DecayOption = 4.0,
    confidence: ConfidenceOption = 1.0,
    confidence_of: ConfidenceOfOption = "drawn",
    epochs: EpochsOption = 3.0,
    batch_tokens: BatchTokensOption = 4096,
    accumulate: AccumulateOption = 1,
    max_length: MaxLengthOption = None,
    lr: LrOption = 6e-4,
    muon_lr: MuonLrOption = 0.0,
    schedule: ScheduleOption = "cosine",
    precision: PrecisionOption = "fp32",
    feature_cache: FeatureCacheOption = None,
    evaluate_every: EvaluateEveryOption = 200,
    save_every: SaveEveryOption = 100,
    stop_after: StopAfterOption = 0,
    fresh: FreshOption = False,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train a drafter for a target; a killed run goes on from its last checkpoint.

    specdec train eagle3 --model path/to/model --data examples.jsonl --out head

    The examples' answers should be the target's own: specdec regenerate makes them. The drafter comes out as published
    ones are laid out, and drafts as eagle:HEAD, diffusion:HEAD or lm:MODEL.

    On several devices: torchrun --nproc-per-node 4 -m specdec train ...
    """
    import torch

    from specdec.online_training.losses import parse_mix
    from specdec.online_training.train_loop import TrainPlan
    from specdec.online_training.train_run import RunOptions
    from specdec.online_training.train_setup import BlockPlan, DrafterPlan, join_group

    if threads:
        torch.set_num_threads(threads)
    options = RunOptions(
        epochs=epochs, tokens_per_batch=batch_tokens, accumulate=accumulate, evaluate_every=evaluate_every,
        save_every=save_every, stop_after=stop_after, seed=seed,
    )  # fmt: skip
    blocks = BlockPlan(
        begin_as=_layers(begin_as) or (), is_copying=copying, mask_token_id=mask_token, inner_size=inner_size,
        markov=markov, rank=markov_rank, anchors=anchors, slot_weights=slot_weights, decay=decay, confidence=confidence,
        confidence_of=confidence_of,
    )  # fmt: skip
    shape = DrafterPlan(
        kind=kind, layers=_layers(layers), layout=layout, draft_vocab=draft_vocab, depth=depth, num_layers=num_layers,
        mix=None if loss is None else parse_mix(loss), init=init, seed=seed, blocks=blocks,
    )  # fmt: skip
    plan = TrainPlan(1, learning_rate=lr, muon_lr=muon_lr, schedule=schedule, precision=precision)
    with join_group(device) as place:
        run = _run(
            shape, plan, options, model=model, data=data, work=work or out.with_name(f"{out.name}.work"),
            max_length=max_length, cache=feature_cache, device=place, is_resumed=not fresh,
        )  # fmt: skip
        _finish(run, out, as_json=as_json)


def _finish(run: TrainRun, out: Path, *, as_json: bool) -> None:
    """Train on, and write the drafter when the schedule has ended."""
    found = _follow(run)
    if run.trainer.step < run.total_steps:
        printing.note(f"stopped after step {run.trainer.step} of {run.total_steps}; the same command goes on")
        return
    run.export(out)
    _tell(found, out, as_json=as_json)


def _run(
    shape: DrafterPlan,
    plan: TrainPlan,
    options: RunOptions,
    *,
    model: str,
    data: list[Path],
    work: Path,
    max_length: int | None,
    cache: Path | None,
    device: str,
    is_resumed: bool,
) -> TrainRun:
    """The run, its target and its data loaded."""
    from specdec.online_training.train_run import TrainRun
    from specdec.online_training.train_setup import build_module, length_limit, read_data

    loaded = load_model(model, dtype="float32", device=device, needs_tokenizer=False)
    limit = length_limit(loaded.model, max_length)
    examples = read_data(data, loaded.model, loaded.tokenizer, max_length=limit)
    shape = replace(shape, max_length=limit)
    module, features = build_module(shape, loaded.model, loaded.tokenizer, examples, cache=cache)
    return TrainRun(module, features, examples, plan=plan, options=options, work=work, is_resumed=is_resumed)


def _layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"layers must be numbers with commas, such as 2,16,29, got {text!r}") from None


def _follow(run: TrainRun) -> StepReport:
    """Train under a progress bar; the held-out figures, or the last step's where nothing is held out."""
    with printing.progress() as bar:
        task = bar.add_task("training", total=run.total_steps, completed=run.trainer.step)

        def show(step: StepReport) -> None:
            length = "" if math.isnan(step.acceptance_length) else f", acceptance length {step.acceptance_length:.2f}"
            bar.update(task, completed=step.step, description=f"loss {step.loss:.3f}{length}")

        last = run.run(show)
    return run.evaluate() if run.options.heldout else last


def _tell(found: StepReport, out: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        values: dict[str, Any] = {"out": str(out), **asdict(found)}
        printing.result(values)
        return
    agreement = ", ".join(f"{value:.3f}" for value in found.agreement)
    printing.note(
        f"{out}: after {found.step} steps, on held-out examples: loss {found.loss:.4f}, simulated acceptance length "
        f"{found.acceptance_length:.2f}, agreement by depth {agreement}"
    )
