"""Which path a model takes, and why: tree, chain, plain, or refused. No per-model code.

| path | the model must | what it gets |
| --- | --- | --- |
| tree | send all its attention through transformers' interface, causal, with nothing unknown in it | batches of trees |
| chain | run with transformers' own cache, several tokens at a time | chains, one row per request |
| chain, no drafts | run with transformers' own cache, token by token | plain decoding, one row per request |
| plain | have a causal forward | chains, everything recomputed in each step |
| plain, no drafts | have a forward | plain decoding, everything recomputed in each step |

Rules only sort out what cannot work; a self-test against ordinary forwards then decides. Every demotion keeps its
reason in words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from transformers import DynamicCache
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from specdec.chain_target import ChainTarget
from specdec.errors import ConfigError, UnsupportedError
from specdec.kernels.launch import Backend
from specdec.placement import device_of, is_offloaded
from specdec.probe import CallSpec, probe
from specdec.protocols import TargetModel
from specdec.reference import Reference
from specdec.row_forward import RowForward, vocab_size_of
from specdec.self_test import NUM_REQUESTS, NUM_TOKENS, run_decoding_test, run_self_test
from specdec.tree_target import TreeTarget

__all__ = ["Route", "RouteKind", "TargetFactories", "choose_route"]

# The probe and the self-test look at sequences of at least this length where the model takes them: with less, windows
# cannot be told from plain causal masks and the script's trees do not fit.
_TESTED_LENGTH = 64

RouteKind: TypeAlias = Literal["tree", "chain", "plain", "refused"]


@dataclass(frozen=True, slots=True)
class Route:
    """The path of one model.

    Args:
        kind: the path.
        reasons: why each better path was not taken, one sentence each, best path first; for "refused", why.
        calls: what the probe saw; empty if it saw nothing.
        can_draft: False: plain decoding only; the target is to be built with ``max_draft_tokens=0``.
    """

    kind: RouteKind
    reasons: tuple[str, ...] = ()
    calls: tuple[CallSpec, ...] = ()
    can_draft: bool = True


def _tree_with(kernels: Backend) -> Callable[[Any, tuple[CallSpec, ...], int], TargetModel]:
    return lambda model, calls, max_length: TreeTarget(
        model,
        calls,
        kv_tokens=NUM_TOKENS,
        max_length=max_length,
        max_batch_size=NUM_REQUESTS,
        max_step_tokens=NUM_TOKENS,
        kernels=kernels,
    )


@dataclass(frozen=True, slots=True)
class TargetFactories:
    """How to build the small targets that the self-test tries. The plain target needs no test: it is the reference."""

    tree: Callable[[Any, tuple[CallSpec, ...], int], TargetModel] = field(default_factory=lambda: _tree_with("auto"))
    chain: Callable[[Any, int, int], TargetModel] = field(
        default=lambda model, max_length, max_draft_tokens: ChainTarget(
            model, kv_tokens=NUM_TOKENS, max_length=max_length, max_draft_tokens=max_draft_tokens
        )
    )


def choose_route(
    model: Any,
    *,
    max_length: int,
    self_test: bool = True,
    factories: TargetFactories | None = None,
    kernels: Backend = "auto",
) -> Route:
    """Find the best path for ``model``.

    Args:
        model: a causal LM of transformers with its weights, in evaluation mode, its RoPE frozen where that is needed.
        max_length: longest sequence to be served, in tokens.
        self_test: False trusts the rules alone; for tests.
        factories: builders of the targets that the self-test tries.
        kernels: of the tree target that it tries, without ``factories``.

    Returns:
        The route; "refused" is a route too.

    Raises:
        ConfigError: the model is in training mode, or has no weights.
    """
    if model.training:
        raise ConfigError(f"{type(model).__name__} is in training mode, where dropout is random: call model.eval()")
    if any(parameter.is_meta for parameter in model.parameters()) and not is_offloaded(model):
        raise ConfigError(f"{type(model).__name__} has parameters on the meta device: load its weights first")
    refusal = _refusal(model)
    if refusal is not None:
        return Route("refused", (refusal,))
    factories = factories or TargetFactories(tree=_tree_with(kernels))
    max_length = max(max_length, min(_TESTED_LENGTH, _stated_length(model)))
    calls, tree_problem = _probed(model, max_length)
    if not self_test:
        return Route("tree", (), calls) if tree_problem is None else Route("chain", (f"tree: {tree_problem}",), calls)
    try:
        reference = Reference.of(RowForward(model), vocab_size_of(model))
    except Exception as error:  # noqa: BLE001  -- a model that cannot do this cannot be served, whatever it raised
        why = f"{type(model).__name__} cannot generate from text alone: {type(error).__name__}: {error}"
        return Route("refused", (why,), calls)
    if not reference.generates_ordinarily or not reference.is_causal:
        return _without_drafts(model, reference, calls, max_length, factories)
    windows = sorted({call.window for call in calls if call.window is not None})
    if tree_problem is None:
        tree_problem = _tried(
            lambda: factories.tree(model, calls, max_length), lambda t: run_self_test(t, reference, windows=windows)
        )
    if tree_problem is None:
        return Route("tree", (), calls)
    reasons = [f"tree: {tree_problem}"]
    problem = _tried(
        lambda: factories.chain(model, max_length, 64), lambda t: run_self_test(t, reference, windows=windows)
    )
    if problem is None:
        return Route("chain", tuple(reasons), calls)
    reasons.append(f"chain: {problem}")
    problem = _tried(lambda: factories.chain(model, max_length, 0), lambda t: run_decoding_test(t, reference))
    if problem is None:
        return Route("chain", tuple(reasons), calls, can_draft=False)
    reasons.append(f"chain without drafts: {problem}")
    return Route("plain", tuple(reasons), calls)


def _stated_length(model: Any) -> int:
    """The longest context that the configuration states; 0 if it states none."""
    return int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 0)


def _without_drafts(
    model: Any, reference: Reference, calls: tuple[CallSpec, ...], max_length: int, factories: TargetFactories
) -> Route:
    """The route of a model for which several tokens in one forward are not the same as one after the other."""
    if reference.generates_ordinarily:
        why = "all drafts: a token's logits depend on the tokens after it"
        return Route("plain", (why,), calls, can_draft=False)
    why = (
        "all drafts: its generate computes other logits than an ordinary forward over the same tokens (relative error "
        f"{reference.generate_error:.2g})"
    )
    problem = _tried(lambda: factories.chain(model, max_length, 0), lambda t: run_decoding_test(t, reference))
    if problem is None:
        return Route("chain", (why,), calls, can_draft=False)
    return Route("refused", (f"{type(model).__name__}: {why}; {problem}",), calls)


def _refusal(model: Any) -> str | None:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder; specdec serves decoder-only language models"
    if not hasattr(model, "generate") or (hasattr(model, "can_generate") and not model.can_generate()):
        return f"{name} has no language-model head to generate with: load it with AutoModelForCausalLM"
    try:
        device_of(model)
    except UnsupportedError as error:
        return str(error)
    return None


def _probed(model: Any, max_length: int) -> tuple[tuple[CallSpec, ...], str | None]:
    """The calls, and why the tree path is out of the question (None: it is not)."""
    try:
        calls = probe(model, limit=max(2, max_length))
    except UnsupportedError as error:
        return (), str(error)
    return calls, _calls_problem(calls) or _cache_problem(model)


def _calls_problem(calls: tuple[CallSpec, ...]) -> str | None:
    if not calls:
        return "the model computes attention without transformers' attention interface, or has none"
    for call in calls:
        if call.extra_kwargs:
            return f"attention call {call.layer_name} passes {', '.join(call.extra_kwargs)}, which we do not know"
        if call.mask_kind == "other":
            return f"attention call {call.layer_name} has a mask that is not causal, sliding or chunked"
        if call.num_query_heads % call.num_kv_heads:
            heads = f"{call.num_query_heads} query heads for {call.num_kv_heads} key heads"
            return f"attention call {call.layer_name} has {heads}"
    return None


def _cache_problem(model: Any) -> str | None:
    """Layers that keep more than keys and values; a tree's branches would share it."""
    if getattr(model, "_is_stateful", False):
        return "the model keeps a recurrent state"
    try:
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    except Exception as error:  # noqa: BLE001  -- transformers raises whatever an unusual config leads to
        return f"transformers has no cache for its layers ({type(error).__name__}: {error})"
    plain = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
    odd = sorted({type(layer).__name__ for layer in layers if type(layer) not in plain})
    return f"its cache keeps more than keys and values: {', '.join(odd)}" if odd else None


def _tried(build: Callable[[], TargetModel], test: Callable[[TargetModel], str | None]) -> str | None:
    """Why a target cannot be used: its constructor refuses the model, or it fails the test. None: it can."""
    try:
        target = build()
    except UnsupportedError as error:
        return str(error)
    return test(target)
