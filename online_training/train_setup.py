"""From what a run asks for to a module in training: which drafter, from which weights, on which device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import torch
import torch.distributed as dist

from specdec.drafters.diffusion_files import read_diffusion_files
from specdec.drafters.diffusion_head import MarkovKind
from specdec.drafters.eagle_files import read_files
from specdec.drafters.lm_loading import load_model
from specdec.errors import ConfigError, UnsupportedError
from specdec.online_training.data import Example, frequent_ids, read_examples
from specdec.online_training.features import TargetFeatures
from specdec.online_training.train_block_start import BlockShape, new_block_head, published_layers
from specdec.online_training.train_blocks import BlockModule, BlockOptions, ConfidenceOf, SlotWeights
from specdec.online_training.train_eagle import EagleModule, EagleOptions
from specdec.online_training.train_lm import LmModule, LmOptions, first_layers
from specdec.online_training.train_module import DraftModule
from specdec.online_training.train_start import new_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "LOSSES",
    "BlockPlan",
    "DrafterKind",
    "DrafterPlan",
    "build_module",
    "join_group",
    "length_limit",
    "read_data",
]

_USUAL_LENGTH = 2048
DrafterKind: TypeAlias = Literal["eagle3", "dflash", "dspark", "lm"]
LOSSES: Final[Mapping[DrafterKind, Mapping[str, float]]] = {
    "eagle3": {"forward_kl": 1.0},
    "dflash": {"cross_entropy": 1.0},
    "dspark": {"cross_entropy": 0.1, "total_variation": 1.8},
    "lm": {"forward_kl": 1.0},
}


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """What a block-diffusion head has beside the rest, and how it is trained; see ``BlockShape`` and ``BlockOptions``.

    Args:
        begin_as: target layers that its layers begin as; empty: random weights.
        is_copying: the layers are made to copy from the first step.
        mask_token_id: None: the target's padding token.
        inner_size: width of the MLPs; 0: the target's.
        markov: kind of DSpark's Markov head.
        rank: of the Markov head; 256 in the published ones.
        anchors: most blocks of a text and step.
        slot_weights: ``decay`` or ``dpace``.
        decay: rate of ``decay``.
        confidence: factor of the loss of DSpark's confidence head; 0: without the head.
        confidence_of: what it tells the chance of: ``drawn`` or ``likeliest`` tokens.
    """

    begin_as: tuple[int, ...] = ()
    is_copying: bool = False
    mask_token_id: int | None = None
    inner_size: int = 0
    markov: MarkovKind = "vanilla"
    rank: int = 256
    anchors: int = 512
    slot_weights: SlotWeights = "decay"
    decay: float = 4.0
    confidence: float = 1.0
    confidence_of: ConfidenceOf = "drawn"


@dataclass(frozen=True, slots=True)
class DrafterPlan:
    """Which drafter is to be trained.

    Args:
        kind: ``eagle3``, ``dflash``, ``dspark`` or ``lm``.
        layers: whose states a head reads, as indices into ``output_hidden_states``; None: the published ones, except
            that an EAGLE-3 head's lowest is the embedding, see ``train_start``.
        layout: of an EAGLE-3 head: ``speculators`` (vLLM) or ``specforge`` (SGLang), see ``train_export``.
        draft_vocab: size of an EAGLE-3 head's vocabulary; None: the target's.
        depth: steps of the training-time test, tokens of a block, or tokens that a draft model's simulated length looks
            ahead; None: 7 (eagle3, dspark), 15 (dflash), 4 (lm).
        num_layers: of a new draft model or block-diffusion head; None: 2, and 5.
        mix: names and factors of the losses; None: the kind's own, see ``LOSSES``.
        init: a drafter to begin from.
        blocks: of a block-diffusion head alone.
        max_length: longest text of the training.
        seed: of new weights.
    """

    kind: DrafterKind
    layers: tuple[int, ...] | None = None
    layout: Literal["speculators", "specforge"] = "speculators"
    draft_vocab: int | None = None
    depth: int | None = None
    num_layers: int | None = None
    mix: Mapping[str, float] | None = None
    init: Path | None = None
    max_length: int = 2048
    seed: int = 0
    blocks: BlockPlan = field(default_factory=BlockPlan)

    def __post_init__(self) -> None:
        if self.kind == "lm" and self.layers is not None:
            raise ConfigError("layers belong to heads, not to lm")
        if self.kind != "eagle3" and self.draft_vocab is not None:
            raise ConfigError(f"draft_vocab belongs to eagle3, not to {self.kind}")
        if not self.is_blocks and self.blocks != BlockPlan():
            raise ConfigError(f"anchors, Markov head and slot weights belong to dflash and dspark, not to {self.kind}")
        if self.init is not None and (self.layers is not None or self.draft_vocab is not None):
            raise ConfigError("a drafter to begin from brings its own layers and vocabulary: leave them out")
        if self.init is not None and (self.blocks.begin_as or self.blocks.inner_size or self.num_layers is not None):
            raise ConfigError("a drafter to begin from has its shape: leave num_layers, inner_size and begin_as out")

    @property
    def is_blocks(self) -> bool:
        """True for block-diffusion heads."""
        return self.kind in ("dflash", "dspark")

    @property
    def losses(self) -> Mapping[str, float]:
        """Names and factors of the losses."""
        return LOSSES[self.kind] if self.mix is None else self.mix


def length_limit(target: PreTrainedModel, asked: int | None) -> int:
    """Tokens at which examples are cut: what is asked for, or 2048, or the target's context where that is less.

    Raises:
        ConfigError: more is asked for than the target's context.
    """
    context = int(getattr(target.config.get_text_config(), "max_position_embeddings", 0) or _USUAL_LENGTH)
    if asked is not None and asked > context:
        raise ConfigError(f"max_length must be at most the target's context of {context} tokens, got {asked}")
    return asked or min(_USUAL_LENGTH, context)


def read_data(
    paths: Sequence[Path], target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, max_length: int
) -> list[Example]:
    """The examples of some files, checked against the target.

    Raises:
        LoadError: see ``read_examples``.
    """
    text = target.config.get_text_config()
    return read_examples(paths, max_length=max_length, vocab_size=int(text.vocab_size), tokenizer=tokenizer)


def build_module(
    plan: DrafterPlan,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    examples: Sequence[Example],
    *,
    cache: Path | None = None,
) -> tuple[DraftModule, TargetFeatures]:
    """The drafter in training, and the source of the states that it learns from, both on the target's device.

    Raises:
        ConfigError: the plan does not fit the target.
        LoadError: the drafter to begin from cannot be read or does not fit the target.
        UnsupportedError: the target's states or logits cannot be had, or the drafter is of a kind that is not trained.
    """
    if plan.kind == "lm":
        features = TargetFeatures(target, (), cache=cache)
        small = first_layers(target, plan.num_layers or 2) if plan.init is None else load_model(plan.init, target)
        return LmModule(small, features, options=LmOptions(plan.depth or 4, plan.losses), tokenizer=tokenizer), features
    build = _blocks if plan.is_blocks else _eagle
    module = build(plan, target, examples, cache)
    return module.to(target.device), module.features


def _blocks(plan: DrafterPlan, target: PreTrainedModel, examples: Sequence[Example], cache: Path | None) -> BlockModule:
    text, own = target.config.get_text_config(), plan.blocks
    options = BlockOptions(
        plan.losses, own.anchors, own.slot_weights, own.decay, own.confidence, confidence_of=own.confidence_of
    )
    if plan.init is not None:
        files = read_diffusion_files(plan.init)
        config, weights = files.head_config(text), files.published
        unusual = sorted({"embed_tokens.weight", "lm_head.weight", "t2d", "d2t"} & weights.keys())
        if unusual:
            raise UnsupportedError(f"{plan.init} has {unusual[0]}: only heads that use the target's are trained")
    else:
        is_dspark = plan.kind == "dspark"
        shape = BlockShape(
            guesses_next=is_dspark, num_guesses=plan.depth or (7 if is_dspark else 15),
            hidden_layers=plan.layers or published_layers(int(text.num_hidden_layers)),
            num_layers=plan.num_layers or 5, begin_as=own.begin_as, is_copying=own.is_copying,
            mask_token_id=own.mask_token_id,
            inner_size=own.inner_size, markov=own.markov if is_dspark else "none",
            rank=own.rank if is_dspark and own.markov != "none" else 0,
            has_confidence=is_dspark and own.confidence > 0, max_length=plan.max_length, seed=plan.seed,
        )  # fmt: skip
        config, weights = new_block_head(shape, target, examples)
    return BlockModule(config, weights, TargetFeatures(target, config.hidden_layers, cache=cache), options=options)


def _eagle(plan: DrafterPlan, target: PreTrainedModel, examples: Sequence[Example], cache: Path | None) -> EagleModule:
    text = target.config.get_text_config()
    vocab_size, num_layers = int(text.vocab_size), int(text.num_hidden_layers)
    options = EagleOptions(plan.depth or 7, mix=plan.losses)
    if plan.init is not None:
        files = read_files(plan.init)
        if files.version != 3:
            raise UnsupportedError(f"{plan.init} is an EAGLE head of version 1 or 2; only EAGLE-3 heads are trained")
        config, ids = files.head_config(text), files.target_ids(vocab_size)
        weights = {name: weight for name, weight in files.weights.items() if name not in ("d2t", "t2d")}
        if "embed_tokens.weight" in weights:
            raise UnsupportedError(
                f"{plan.init} has an embedding of its own; only heads that use the target's are trained"
            )
    else:
        layers = plan.layers or (0, num_layers // 2, max(num_layers - 3, 0))
        if not all(0 <= layer <= num_layers for layer in layers):
            raise ConfigError(f"layers must be in 0..{num_layers}, got {layers}")
        ids = frequent_ids(examples, plan.draft_vocab or vocab_size, vocab_size)
        config, weights = new_head(
            target, layers=layers, examples=examples, target_ids=ids, norm_before_residual=plan.layout == "speculators",
            max_length=plan.max_length, seed=plan.seed,
        )  # fmt: skip
    features = TargetFeatures(target, config.hidden_layers, cache=cache)
    ids = None if ids is None else ids.to(target.device)
    on_device = {name: weight.to(target.device) for name, weight in weights.items()}
    return EagleModule(config, on_device, features, target_ids=ids, options=options)


@contextmanager
def join_group(device: str) -> Iterator[str]:
    """The device of this process; under ``torchrun`` its process group exists while the block runs.

    NCCL where there are GPUs, gloo elsewhere.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield device
        return
    is_cuda = device != "cpu" and torch.cuda.is_available()
    if is_cuda:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if is_cuda else "gloo")
    try:
        yield device if is_cuda else "cpu"
    finally:
        dist.destroy_process_group()
