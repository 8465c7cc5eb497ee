"""How much memory a model needs: its weights, and per request its keys, values and recurrent state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch

from specdec.doctor.report import Attention, Memory
from specdec.memory import free_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdec.probe import CallSpec

__all__ = ["estimate_memory", "state_nbytes", "summarise_attention"]

# A layer with a window holds up to twice the window, so that it has to be compacted once per window only.
_WINDOWS_HELD: Final = 2


def summarise_attention(calls: Sequence[CallSpec], itemsize: int) -> tuple[Attention, ...]:
    """Attention calls that are alike, counted, in the order in which they first come."""
    alike = Counter(replace(call, layer_name="", extra_kwargs=(), scaling=None) for call in calls)
    return tuple(
        Attention(
            num_calls=count,
            mask_kind=call.mask_kind,
            window=call.window,
            num_query_heads=call.num_query_heads,
            num_kv_heads=call.num_kv_heads,
            key_dim=call.key_dim,
            value_dim=call.value_dim,
            has_sinks=call.has_sinks,
            softcap=call.softcap,
            nbytes_per_token=count * call.num_kv_heads * (call.key_dim + call.value_dim) * itemsize,
        )
        for call, count in alike.items()
    )


def estimate_memory(
    model: PreTrainedModel, attention: Sequence[Attention], *, batch: int, context: int, state_nbytes: int = 0
) -> Memory:
    """Bytes for ``batch`` requests of ``context`` tokens each.

    Args:
        model: on its device.
        attention: its attention calls.
        batch: requests.
        context: tokens per request.
        state_nbytes: recurrent state of a request.
    """
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    request = state_nbytes + sum(
        entry.nbytes_per_token * min(context, _WINDOWS_HELD * entry.window if entry.window else context)
        for entry in attention
    )
    available = free_bytes(model.device)
    return Memory(
        weights_nbytes=weights,
        kv_nbytes_per_token=sum(entry.nbytes_per_token for entry in attention),
        kv_nbytes_per_far_token=sum(entry.nbytes_per_token for entry in attention if entry.window is None),
        state_nbytes=state_nbytes,
        batch=batch,
        context=context,
        request_nbytes=request,
        total_nbytes=weights + batch * request,
        available_nbytes=available,
        largest_batch=available // request if available is not None and request else None,
    )


@torch.inference_mode()
def state_nbytes(model: PreTrainedModel) -> int | None:
    """Bytes of a request's cache that do not grow with its context; None if the model shows no cache.

    Found by caching 4 and 8 tokens and extending the line to none.
    """
    sizes = []
    for num_tokens in (4, 8):
        input_ids = torch.zeros(1, num_tokens, dtype=torch.int64, device=model.device)
        output: Any = model(input_ids=input_ids, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        cache = getattr(output, "cache_params", None) if cache is None else cache
        if cache is None:
            return None
        sizes.append(sum(tensor.nbytes for tensor in _tensors(cache, set())))
    return max(2 * sizes[0] - sizes[1], 0)


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Every tensor that hangs on an object, each once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item, seen)
    elif type(value).__module__.startswith("transformers.") and not isinstance(value, torch.nn.Module):
        yield from _tensors(getattr(value, "__dict__", {}), seen)
