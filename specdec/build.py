"""From names and options to objects: the only place that knows every class."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress

from specdec.adaptive import controller_for, known_costs, overlap_for
from specdec.chain_target import ChainTarget
from specdec.config import EngineConfig
from specdec.device_work import DeviceClock
from specdec.drafters.checkpoint import DrafterKind, PendingDrafter, kind_in
from specdec.drafters.committee_loading import committee_kind
from specdec.drafters.diffusion_loading import load_diffusion
from specdec.drafters.eagle_loading import load_eagle
from specdec.drafters.early_exit import load_early_exit, read_early_exit
from specdec.drafters.fused_names import fused_kind, fused_parts
from specdec.drafters.lm_loading import load_layer_parallel, load_lm
from specdec.drafters.lookahead import LookaheadDrafter
from specdec.drafters.mtp import load_mtp, read_mtp
from specdec.drafters.ngram import NgramDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.ppm import PpmDrafter
from specdec.drafters.recycling import RecyclingDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.engine import Engine
from specdec.errors import ConfigError, UnsupportedError
from specdec.kernels.launch import uses_triton
from specdec.memory import free_bytes
from specdec.online_training.registry_kind import registry_kind
from specdec.packed_linear import pack_linears, packing_obstacle, unpack_linears
from specdec.placement import device_of, is_split
from specdec.plain_target import PlainTarget
from specdec.protocols import Controller, Drafter, Draws, Observer, TargetModel, Verifier
from specdec.ranks import AgreedController, from_rank_0, is_spread
from specdec.rope import freeze_rope
from specdec.routes import Route, choose_route
from specdec.sampling import Sampler
from specdec.step_buffers import BUCKETS
from specdec.strict import require_same_bits, require_strict_path
from specdec.threads import warn_of_threads
from specdec.tree_target import TreeTarget, kv_bytes_by_device
from specdec.verifier.match import MatchVerifier
from specdec.verifier.ratio_rules import RULES
from specdec.verifier.rejection import RejectionVerifier
from specdec.verifier.typical import TypicalVerifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

__all__ = [
    "DRAFTERS",
    "DRAFTER_KINDS",
    "VERIFIERS",
    "build_drafter",
    "build_engine",
    "build_target",
    "compile_ahead",
    "drafter_names",
    "load_drafter",
    "may_pack",
    "model_max_length",
    "name_drafter",
]

# Name on the command line and in ``speculate`` -> class; options are the class's keyword arguments.
DRAFTERS: Mapping[str, Callable[..., Drafter]] = {
    "none": NoDrafter,
    "ngram": NgramDrafter,
    "suffix": SuffixDrafter,
    "lookahead": LookaheadDrafter,
    "ppm": PpmDrafter,
    "recycling": RecyclingDrafter,
}

# What ``KIND:`` stands for; options after ``?`` are keyword arguments of its ``load``.
DRAFTER_KINDS: Mapping[str, DrafterKind] = {
    "committee": committee_kind(),
    "diffusion": DrafterKind(load_diffusion),
    "early-exit": DrafterKind(load_early_exit, read_early_exit, takes="N"),
    "eagle": DrafterKind(load_eagle),
    "fused": fused_kind(lambda name: name_drafter(name), lambda *target: load_drafter(*target)),
    "layer-parallel": DrafterKind(load_layer_parallel),
    "lm": DrafterKind(load_lm),
    "mtp": DrafterKind(load_mtp, read_mtp, takes=""),
    "registry": registry_kind(lambda kind, *args, **options: DRAFTER_KINDS[kind].load(*args, **options)),
}
VERIFIERS = ("match", *RULES, "typical")

_DEFAULT_MAX_LENGTH = 32_768  # for models that state no limit, such as recurrent ones
_MAX_CHAIN = 64  # a chain of retrieved tokens is seldom right for longer
_MEMORY_SHARE = 0.25  # of what is free, for the KV pool: weights and activations of others need the rest


def drafter_names() -> list[str]:
    """Every way of naming a drafter, for messages."""
    kinds = (f"{name}:{kind.takes}" if kind.takes else name for name, kind in sorted(DRAFTER_KINDS.items()))
    return [*sorted(DRAFTERS), *kinds]


def name_drafter(drafter: str | Drafter | PendingDrafter, **options: Any) -> Drafter | PendingDrafter:
    """A drafter from its name; one of ``KIND:...`` is checked now and loaded when the target is there.

    Raises:
        ConfigError: an unknown name, an unknown option, or options for a ready object.
        LoadError: there is no checkpoint at the path.
    """
    if not isinstance(drafter, str) or (kind := kind_in(drafter, DRAFTER_KINDS)) is None:
        return drafter if isinstance(drafter, PendingDrafter) else build_drafter(drafter, **options)
    if kind not in DRAFTER_KINDS:
        raise ConfigError(f"drafter must be one of {', '.join(drafter_names())}, got {drafter!r}")
    if kind == "fused" and all(part in DRAFTERS for part in fused_parts(drafter)):
        return DRAFTER_KINDS[kind].load(DRAFTER_KINDS[kind].read(drafter)[0], **options)  # no part waits for a target
    return PendingDrafter(drafter, DRAFTER_KINDS[kind], options)


def compile_ahead(*parts: object) -> None:
    """Let drafters and verifiers compile what they run, so that no request waits for it; others have nothing to do."""
    for part in parts:
        warmup = getattr(part, "warmup", None)
        if warmup is not None:
            warmup()


def load_drafter(
    drafter: str | Drafter | PendingDrafter,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    verifier: str = "match",
    **options: Any,
) -> Drafter:
    """A drafter for a target, from its name or from what ``name_drafter`` made of it; an object is given back.

    Args:
        drafter: any name, or an object.
        model: the target.
        tokenizer: the target's.
        verifier: who will judge; it decides how a drafter that can draw has to draw.
        **options: of a named drafter.

    Raises:
        ConfigError: as ``name_drafter``.
        LoadError: the checkpoint cannot be read, or does not fit the target.
        UnsupportedError: the model in it cannot draft, or the target runs on several devices and would lend it weights.
    """
    named = name_drafter(drafter, **options)
    if isinstance(named, PendingDrafter) and not named.name.startswith("lm:") and is_split(model):
        raise UnsupportedError(f"{named.name} reads weights of the target, which must run on one device for that")
    return named.load(model, tokenizer, _draws_for(verifier)) if isinstance(named, PendingDrafter) else named


def build_drafter(drafter: str | Drafter, **options: Any) -> Drafter:
    """A drafter that needs no target from its name, or the given object itself.

    Raises:
        ConfigError: an unknown name, an unknown option, or options for a ready object.
    """
    if not isinstance(drafter, str):
        if options:
            raise ConfigError(f"options {sorted(options)} need a drafter's name, got a {type(drafter).__name__}")
        return drafter
    if drafter not in DRAFTERS:
        raise ConfigError(f"drafter must be one of {', '.join(drafter_names())}, got {drafter!r}")
    try:
        return DRAFTERS[drafter](**options)
    except TypeError as error:
        raise ConfigError(f"drafter {drafter!r}: {error}") from None


def _draws_for(verifier: str) -> Draws | None:
    """How a drafter that can draw honestly has to draw for a verifier; None: it need not draw."""
    if verifier not in RULES:
        return None
    return max(RULES[verifier].draws, key=lambda draws: draws != "chain")


def _build_verifier(name: str, sampler: Sampler) -> Verifier:
    """A verifier from its name, one of ``VERIFIERS``; one that is not lossless says so in the log."""
    if name == "match":
        return MatchVerifier(sampler)
    if name in RULES:
        return RejectionVerifier(sampler, name)
    logger.warning("the verifier %r is lossy: sampled text does not follow the model's law", name)
    return TypicalVerifier(sampler)


def model_max_length(model: PreTrainedModel) -> int:
    """The longest context that the model's configuration states, in tokens."""
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(stated) if stated else _DEFAULT_MAX_LENGTH


def build_target(
    model: PreTrainedModel,
    config: EngineConfig,
    *,
    route: Route | None = None,
    hidden_layers: tuple[int, ...] = (),
    num_successors: int = 0,
) -> TargetModel:
    """The target for ``model`` on the best path that it can take.

    Args:
        model: a causal LM in evaluation mode, its RoPE frozen where that is needed.
        config: limits.
        route: what ``choose_route`` found before; None: it is asked now.
        hidden_layers: whose states a drafter reads; only the tree path gives them.
        num_successors: likeliest next tokens that a drafter reads after each prompt token; likewise, but the other
            paths serve without.

    Raises:
        UnsupportedError: no path can serve this model, or not with hidden states.
    """
    max_length = config.max_length or model_max_length(model)
    device = device_of(model)
    route = route or choose_route(model, max_length=max_length, kernels=config.kernels)
    if route.kind == "refused":
        raise UnsupportedError(f"{type(model).__name__} cannot be served: {' '.join(route.reasons)}")
    if hidden_layers and route.kind != "tree":
        raise UnsupportedError(f"the drafter reads hidden states, which need the tree path: {' '.join(route.reasons)}")
    num_drafts = _MAX_CHAIN if route.can_draft else 0
    if config.numerics == "strict":
        require_strict_path(route, by_kernels=uses_triton(config.kernels, device))
    if config.kernels == "triton" and route.kind != "tree":
        raise UnsupportedError(f'kernels="triton" needs the tree path, but this model takes the {route.kind} path')
    if route.kind == "plain":
        return PlainTarget(model, max_length=max_length, max_draft_tokens=num_drafts)
    per_token = kv_bytes_by_device(route.calls, model.dtype) or {device: 0}
    kv_tokens = min(_kv_tokens(count, place, config, max_length) for place, count in per_token.items())
    kv_tokens = from_rank_0(kv_tokens) if is_spread(model) else kv_tokens
    if route.kind == "chain":
        return ChainTarget(model, kv_tokens=kv_tokens, max_length=max_length, max_draft_tokens=num_drafts)
    target = TreeTarget(
        model,
        route.calls,
        kv_tokens=kv_tokens,
        max_length=max_length,
        max_batch_size=config.max_batch_size,
        max_step_tokens=config.max_prefill_tokens,
        is_strict=config.numerics == "strict",
        hidden_layers=hidden_layers,
        keeps_prefixes=config.prefix_cache,
        num_successors=num_successors,
        kernels=config.kernels,
        buckets=BUCKETS if config.graphs else (),
    )
    _capture(target, config)
    return target


def _capture(target: TreeTarget, config: EngineConfig) -> None:
    """CUDA graphs of the target's steps, with a progress bar; where they cannot be, the reason."""
    is_possible = target.runner is not None and target.device.type == "cuda"
    if config.graphs is False or (config.graphs == "auto" and not is_possible):
        return
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("capturing CUDA graphs", total=len(BUCKETS))
        try:
            target.capture_graphs(lambda done, total: progress.update(bar, completed=done, total=total))
        except UnsupportedError as error:
            if config.graphs is True:
                raise
            logger.warning("%s: its steps are launched one kernel at a time, slower", error)
            return
    if target.runner is not None:
        logger.info("%d CUDA graphs hold %.0f MiB", len(BUCKETS), target.runner.graph_bytes / 2**20)


def may_pack(model: PreTrainedModel, config: EngineConfig) -> bool:
    """True if the model's linear layers are to be packed and can be.

    Raises:
        ConfigError: ``packed=True`` for a model that cannot be packed.
    """
    if config.numerics == "strict" and uses_triton(config.kernels, device_of(model)):
        if config.packed is True:
            raise ConfigError(
                "packed=True is for strict numerics by torch; by Triton kernels the weights stay as they are"
            )
        return False
    if config.packed is False:
        if config.numerics == "strict":
            raise ConfigError('numerics="strict" works with packed weights only: packed must not be False')
        return False
    obstacle = packing_obstacle(model)
    if obstacle is not None and config.packed is True:
        raise ConfigError(f"packed=True is impossible here: {obstacle}")
    if obstacle is not None and config.numerics == "strict":
        raise UnsupportedError(f'numerics="strict" is impossible here: {obstacle}')
    return obstacle is None


def _kv_tokens(bytes_per_token: int, device: torch.device, config: EngineConfig, max_length: int) -> int:
    """How many tokens the KV pool holds: what was asked for, if there is memory for it, or what seems right."""
    free = free_bytes(device)
    if config.kv_tokens is None:
        wanted = config.max_batch_size * max_length
        affordable = wanted if free is None else int(free * _MEMORY_SHARE) // max(bytes_per_token, 1)
        return max(min(affordable, wanted), 2)
    needed = config.kv_tokens * bytes_per_token
    if free is not None and needed > free:
        raise ConfigError(
            f"kv_tokens = {config.kv_tokens} needs {needed / 2**30:.1f} GiB of memory on {device}, "
            f"{free / 2**30:.1f} GiB are free"
        )
    return config.kv_tokens


def build_engine(
    model: PreTrainedModel,
    drafter: str | Drafter | PendingDrafter = "ngram",
    *,
    budget: int | None = None,
    verifier: str = "match",
    controller: Controller | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    drafter_options: Mapping[str, Any] | None = None,
    observers: Sequence[Observer] = (),
    route: Route | None = None,
    **options: Any,
) -> Engine:
    """An engine around a Hugging Face causal LM.

    Args:
        model: the target, in evaluation mode.
        drafter: a name (see ``DRAFTERS`` and ``DRAFTER_KINDS``) or an object.
        budget: most draft tokens per request and step; 0: plain decoding. None: fused drafters get an
            ``AdaptiveController``, others follow what is accepted.
        verifier: ``match``, a rejection rule (``chain``, ``block``, ``specinfer``, ``rrsw``, ``traversal``), or the
            lossy ``typical``.
        controller: decides budgets in place of ``budget``.
        tokenizer: for stop strings, and for draft models that have another one.
        drafter_options: keyword arguments of the named drafter.
        observers: see every step.
        route: what ``choose_route`` found before for this model and length; None: it is asked now.
        **options: fields of ``EngineConfig``.

    Effects: until ``Engine.close``, linear layers of a model on the CPU are packed (see ``specdec.packed_linear``), and
        rotary embeddings whose frequencies follow the sequence length are frozen for the engine's longest request.

    Raises:
        ConfigError: an option breaks its rule.
        UnsupportedError: the model cannot be served, or the verifier cannot judge what the drafter guesses.
    """
    config = EngineConfig.of(**options)
    device = device_of(model)
    is_packed = may_pack(model, config)
    if device.type == "cpu":
        warn_of_threads(torch.get_num_threads())
    if verifier not in VERIFIERS:
        raise ConfigError(f"verifier must be one of {', '.join(VERIFIERS)}, got {verifier!r}")
    if controller is not None and budget is not None:
        raise ConfigError("give a budget or a controller, not both")
    guesser = load_drafter(drafter, model, tokenizer, verifier=verifier, **(drafter_options or {}))
    controller = controller or controller_for([guesser], budget)
    if is_spread(model):
        controller = AgreedController(controller)
    frozen = freeze_rope(model, config.max_length or model_max_length(model))
    holder = object()

    on_close: list[Callable[[], None]] = [frozen.restore, lambda: unpack_linears(model, holder)]

    def give_back() -> None:
        for action in on_close:
            action()

    try:
        needs = guesser.needs
        target = build_target(
            model, config, route=route, hidden_layers=needs.hidden_layers, num_successors=needs.num_successors
        )
        if is_packed:
            pack_linears(model, holder, strict=config.numerics == "strict")
        if config.numerics == "strict":
            require_same_bits(target)
        for notice in frozen.notices:
            logger.warning("%s", notice)
        on_close += known_costs(controller, model, target, config, is_packed=is_packed)
        judge = _build_verifier(verifier, Sampler(target.vocab_size, device=device, kernels=config.kernels))
        return Engine(
            target, judge, guesser, controller, tokenizer=tokenizer, config=config, observers=observers,
            on_close=give_back, clock=DeviceClock(device),
            overlap=overlap_for(model, guesser, controller, judge, config),
        )  # fmt: skip
    except BaseException:
        give_back()
        raise
