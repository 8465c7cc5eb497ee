"""Which path a model takes, and why: tree, chain, plain, or refused. No per-model code.

| path | the model must | what it gets |
| --- | --- | --- |
| tree | send all its attention through transformers' interface, causal, with nothing unknown in it | batches of trees |
| chain | run with transformers' own cache, several tokens at a time | chains, one row per request |
| plain | have a causal forward | chains, everything recomputed in each step |
| plain, no drafts | have a forward | plain decoding |

Rules only sort out what cannot work; a self-test against ordinary forwards then decides. Every demotion keeps its
reason in words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from specdec.chain_target import ChainTarget
from specdec.errors import ConfigError, UnsupportedError
from specdec.plain_target import PlainTarget
from specdec.probe import CallSpec, probe
from specdec.protocols import TargetModel
from specdec.row_forward import RowForward, vocab_size_of
from specdec.self_test import (
    NUM_REQUESTS,
    NUM_TOKENS,
    Reference,
    relative_errors,
    rounding,
    run_self_test,
    scripted_ids,
)
from specdec.tree_target import TreeTarget

__all__ = ["Route", "RouteKind", "TargetFactories", "choose_route"]

RouteKind: TypeAlias = Literal["tree", "chain", "plain", "refused"]


@dataclass(frozen=True, slots=True)
class Route:
    """The path of one model.

    Args:
        kind: the path.
        reasons: why each better path was not taken, one sentence each, best path first; for "refused", why.
        calls: what the probe saw; empty if it saw nothing.
        can_draft: False: plain decoding only, because a token's logits depend on the tokens after it.
    """

    kind: RouteKind
    reasons: tuple[str, ...] = ()
    calls: tuple[CallSpec, ...] = ()
    can_draft: bool = True


@dataclass(frozen=True, slots=True)
class TargetFactories:
    """How to build a small target of each kind for the self-test."""

    tree: Callable[[Any, tuple[CallSpec, ...], int], TargetModel] = field(
        default=lambda model, calls, max_length: TreeTarget(
            model,
            calls,
            kv_tokens=NUM_TOKENS,
            max_length=max_length,
            max_batch_size=NUM_REQUESTS,
            max_step_tokens=NUM_TOKENS,
        )
    )
    chain: Callable[[Any, int], TargetModel] = field(
        default=lambda model, max_length: ChainTarget(model, kv_tokens=NUM_TOKENS, max_length=max_length)
    )
    plain: Callable[[Any, int], TargetModel] = field(
        default=lambda model, max_length: PlainTarget(model, max_length=max_length)
    )


def choose_route(
    model: Any, *, max_length: int, self_test: bool = True, factories: TargetFactories | None = None
) -> Route:
    """Find the best path for ``model``.

    Args:
        model: a causal LM of transformers with its weights, in evaluation mode, its RoPE frozen where that is needed.
        max_length: longest sequence to be served, in tokens.
        self_test: False trusts the rules alone; for tests.
        factories: builders of the targets that the self-test tries.

    Returns:
        The route; "refused" is a route too.

    Raises:
        ConfigError: the model is in training mode, or has no weights.
    """
    if model.training:
        raise ConfigError(f"{type(model).__name__} is in training mode, where dropout is random: call model.eval()")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(f"{type(model).__name__} has parameters on the meta device: load its weights first")
    refusal = _refusal(model)
    if refusal is not None:
        return Route("refused", (refusal,))
    factories = factories or TargetFactories()
    calls, tree_problem = _probed(model, max_length)
    reasons = []
    reference = None
    if self_test:
        reference, problem = _reference(model)
        if reference is None:
            return Route("refused", (problem or "",), calls)
        if not reference.is_causal:
            why = "tree, chain, drafts: a token's logits depend on the tokens after it"
            return Route("plain", (why,), calls, can_draft=False)
    windows = sorted({call.window for call in calls if call.window is not None})
    if tree_problem is None and reference is not None:
        tree_problem = _tried(lambda: factories.tree(model, calls, max_length), reference, windows)
    if tree_problem is None:
        return Route("tree", (), calls)
    reasons.append(f"tree: {tree_problem}")
    chain_problem = None
    if reference is not None:
        chain_problem = _tried(lambda: factories.chain(model, max_length), reference, windows)
    if chain_problem is None:
        return Route("chain", tuple(reasons), calls)
    reasons.append(f"chain: {chain_problem}")
    return Route("plain", tuple(reasons), calls)


def _refusal(model: Any) -> str | None:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder; specdec serves decoder-only language models"
    if not hasattr(model, "generate") or (hasattr(model, "can_generate") and not model.can_generate()):
        return f"{name} has no language-model head to generate with: load it with AutoModelForCausalLM"
    return None


def _probed(model: Any, max_length: int) -> tuple[tuple[CallSpec, ...], str | None]:
    """The calls, and why the tree path is out of the question (None: it is not)."""
    try:
        calls = probe(model, limit=max(2, max_length))
    except UnsupportedError as error:
        return (), str(error)
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return calls, "the model lies on several devices, the KV pool on one"
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


def _reference(model: Any) -> tuple[Reference | None, str | None]:
    """Ordinary forwards of the model, if they are what its ``generate`` does."""
    name = type(model).__name__
    try:
        reference = Reference.of(RowForward(model), vocab_size_of(model))
        problem = _generate_problem(model, reference)
    except Exception as error:  # noqa: BLE001  -- a model that cannot do this cannot be served, whatever it raised
        return None, f"{name} cannot run an ordinary forward on text alone: {type(error).__name__}: {error}"
    return (reference, None) if problem is None else (None, f"{name}: {problem}")


def _generate_problem(model: Any, reference: Reference) -> str | None:
    """Why two tokens of ``model.generate`` come from other logits than ordinary forwards, or None."""
    prompt = scripted_ids(vocab_size_of(model), 12, salt=5)
    config = GenerationConfig(
        max_new_tokens=2,
        min_new_tokens=2,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    input_ids = torch.from_numpy(prompt).to(reference.row.device, torch.long)[None]
    out = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
    sequence = out.sequences[0].cpu().numpy().astype(prompt.dtype)
    if len(sequence) < len(prompt) + len(out.logits):
        return "its generate returns something else than the prompt and its continuation"
    for step, logits in enumerate(out.logits):
        expected, _ = reference.row(sequence[: len(prompt) + step], first_row=len(prompt) + step - 1)
        error = float(relative_errors(logits, expected).max())
        if error > max(10 * rounding(expected.dtype), reference.tolerance(expected.dtype)):
            return f"its generate uses other logits than an ordinary forward (relative error {error:.2g})"
    return None


def _tried(build: Callable[[], TargetModel], reference: Reference, windows: list[int]) -> str | None:
    try:
        target = build()
    except UnsupportedError as error:
        return str(error)
    return run_self_test(target, reference, windows=windows)
