"""What a model's attention does, learned from the model itself: one 4-token forward, no per-model code, no config keys.

The forward runs under a probe attention implementation, registered with transformers' ``AttentionInterface`` and
``AttentionMaskInterface``. It records the geometry of every attention call and which mask the model hands to it; the
mask's kind is found by evaluating the model's own mask predicate. That is the only reliable source: some models keep
their window or chunk in the mask alone and never tell the attention function.

A model that computes attention elsewhere makes no call here and yields an empty record. What the record means for
the path that a model takes is decided in ``specdec.routes``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from specdec.errors import UnsupportedError
from specdec.mask_laws import MaskKind, MaskPredicate, classify
from specdec.placement import device_of

__all__ = ["CallSpec", "MaskKind", "attention_implementation", "forward_inputs", "probe"]

_NAME = "specdec_probe"
_NUM_TOKENS = 4
# Keyword arguments that are passed along to attention functions without changing what SDPA computes.
_HARMLESS_KWARGS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True)
class CallSpec:
    """One attention call of a forward, in the order of the calls.

    Args:
        num_query_heads: Hq.
        num_kv_heads: Hkv.
        key_dim: width of a key (and query) head.
        value_dim: width of a value head.
        scaling: factor on the scores; None = ``key_dim ** -0.5``.
        softcap: c of ``c * tanh(scores / c)``; None = off.
        has_sinks: the call passes attention sinks, one logit per query head (``s_aux``).
        mask_kind: the causal law that the model's own mask predicate follows; "other" is none of ours.
        window: sliding: W, a key is visible iff ``query - W < key <= query``. chunked: C, iff also
            ``key // C == query // C``. None otherwise.
        layer_name: qualified name of the calling module.
        extra_kwargs: names of keyword arguments with a value that we do not know.
        device: of the query.
    """

    num_query_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scaling: float | None
    softcap: float | None
    has_sinks: bool
    mask_kind: MaskKind
    window: int | None
    layer_name: str
    extra_kwargs: tuple[str, ...] = ()
    device: torch.device = field(default=torch.device("cpu"), compare=False)


@dataclass(slots=True)
class _Recorder:
    """The calls and masks of one probe forward."""

    layer_names: dict[nn.Module, str]
    limit: int
    calls: list[CallSpec] = field(default_factory=list)
    # (the tensor that the model was handed, an untouched copy, what its predicate does)
    masks: list[tuple[torch.Tensor, torch.Tensor, tuple[MaskKind, int | None]]] = field(default_factory=list)

    def kind_of(self, mask: torch.Tensor | None) -> tuple[MaskKind, int | None]:
        """The law of a mask that reached the attention function; "other" if the model changed or made it itself."""
        if mask is None:
            return "other", None
        for handed_out, copy, law in self.masks:
            same_memory = mask.data_ptr() == handed_out.data_ptr() and mask.shape == handed_out.shape
            if same_memory and mask.dtype == copy.dtype and torch.equal(mask, copy):
                return law
        return "other", None


_recorder: ContextVar[_Recorder] = ContextVar("specdec_probe_recorder")


def _probe_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, Hq, T, Dk]
    key: torch.Tensor,  # [1, Hkv, T, Dk]
    value: torch.Tensor,  # [1, Hkv, T, Dv]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Record the call; the values of the forward do not matter, so the answer is zero."""
    recorder = _recorder.get()
    mask_kind, window = recorder.kind_of(attention_mask)
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS_KWARGS)
    recorder.calls.append(
        CallSpec(
            num_query_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[3],
            value_dim=value.shape[3],
            scaling=None if scaling is None else float(scaling),
            softcap=None if softcap is None else float(softcap),
            has_sinks=s_aux is not None,
            mask_kind=mask_kind,
            window=window,
            layer_name=recorder.layer_names.get(module, type(module).__name__),
            extra_kwargs=tuple(unknown),
            device=query.device,
        )
    )
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _probe_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: MaskPredicate = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    *,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    """Hand out the mask that SDPA would get, never skipped, and remember what its predicate does."""
    recorder = _recorder.get()
    mask: torch.Tensor = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    recorder.masks.append((mask, mask.clone(), classify(mask_function, recorder.limit, torch.device(device))))
    return mask


AttentionInterface.register(_NAME, _probe_attention)
AttentionMaskInterface.register(_NAME, _probe_mask)


def _configs(model: nn.Module) -> list[Any]:
    """Every config object that some part of the model reads, sub-configs included, each once."""
    pending: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    found: dict[int, Any] = {}
    while pending:
        config = pending.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation"):
            continue
        found[id(config)] = config
        pending += [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    return list(found.values())


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Run the model under the registered attention implementation ``name``, then put the original one back.

    The name is written to every config that a part of the model reads. ``set_attn_implementation`` is not used, as it
    refuses models whose source text it cannot inspect; what really happens is seen by counting calls.

    Effects: the configs of ``model`` are changed inside the block and as before after it, errors included.
    """
    configs = _configs(model)
    originals = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = {"": name}  # the dict form leaves sub-configs alone: they are in the list
        yield
    finally:
        for config, original in zip(configs, originals, strict=True):
            config._attn_implementation = {"": original}


def forward_inputs(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that the model's forward declares (``logits_to_keep``, ``position_ids``, ...)."""
    parameters = inspect.signature(model.forward).parameters.values()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return frozenset(p.name for p in parameters if p.kind not in variadic)


def probe(model: nn.Module, *, limit: int = 1 << 18) -> tuple[CallSpec, ...]:
    """What every attention call of ``model`` is like, in the order of the calls of one forward.

    Args:
        model: a causal LM of transformers, on any device and in any dtype.
        limit: masks are compared at positions below this one (>= 2). Pass the longest sequence that will be served: a
            window that is not shorter cannot be told from full attention and need not be.

    Returns:
        One record per call; empty if the model does not use transformers' attention interface.

    Raises:
        UnsupportedError: the model cannot run a plain 4-token forward under an attention implementation of ours.
    """
    if limit < 2:
        raise ValueError(f"limit must be >= 2, got {limit}")
    accepted = forward_inputs(model)
    device = device_of(model)
    tokens = {
        "input_ids": torch.arange(3, 3 + _NUM_TOKENS, device=device)[None],
        "attention_mask": torch.ones(1, _NUM_TOKENS, dtype=torch.long, device=device),
        "position_ids": torch.arange(_NUM_TOKENS, device=device)[None],
        "use_cache": False,
    }
    recorder = _Recorder({module: name for name, module in model.named_modules()}, limit)
    token = _recorder.set(recorder)
    try:
        with attention_implementation(model, _NAME), torch.no_grad():
            model(**{name: value for name, value in tokens.items() if name in accepted})
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be probed: its forward of {_NUM_TOKENS} tokens under our attention "
            f"implementation raised {type(error).__name__}: {error}"
        ) from error
    finally:
        _recorder.reset(token)
    return tuple(recorder.calls)
