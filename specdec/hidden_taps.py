"""Takes the states that drafters read out of a forward: hooks on a few layers write them into one block of memory.

Asking a model for ``output_hidden_states`` keeps the states of all layers alive for the length of the forward, in a
captured CUDA graph for good. Hooks write what is wanted and nothing else; in a graph, always to the same place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specdec.placement import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["HiddenTaps"]


class HiddenTaps:
    """States of some layers of one model, side by side.

    Args:
        body: gives the state after the last norm as ``last_hidden_state``.
        stack: its decoder layers; the state i goes into layer i.
        layers: as indices into ``output_hidden_states``.
    """

    def __init__(self, body: nn.Module, stack: Sequence[nn.Module], layers: Sequence[int]) -> None:
        self._body, self._stack, self._layers = body, stack, tuple(layers)

    @classmethod
    def of(cls, model: PreTrainedModel, layers: Sequence[int]) -> HiddenTaps | None:
        """Taps that a forward has shown to give what ``output_hidden_states`` gives, bit for bit; None: there are none.

        Args:
            model: in evaluation mode.
            layers: at least one.
        """
        body = getattr(model, "model", None)
        stack = getattr(body, "layers", None)
        if body is None or not isinstance(stack, nn.ModuleList) or max(layers) > len(stack):
            return None
        taps = cls(body, list(stack), layers)
        ids = torch.arange(3, device=device_of(model))[None] % model.config.get_text_config().vocab_size
        with torch.inference_mode(), taps.taking() as taken:
            out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        states = out.hidden_states
        if taken.rows is None or not states or max(layers) >= len(states):
            return None
        wanted = torch.cat([states[layer][0] for layer in layers], dim=-1)
        return taps if torch.equal(taken.rows, wanted) else None

    @contextmanager
    def taking(self) -> Iterator[_Taken]:
        """Take the states of the forward inside, which must be over one row of tokens."""
        taken = _Taken(len(self._layers))
        hooks = []
        for place, layer in enumerate(self._layers):
            if layer < len(self._stack):
                hook = taken.before(place)
                hooks.append(self._stack[layer].register_forward_pre_hook(hook, with_kwargs=True))
            else:
                hooks.append(self._body.register_forward_hook(taken.after(place)))
        try:
            yield taken
        finally:
            for handle in hooks:
                handle.remove()


class _Taken:
    """What one forward has given so far: ``rows`` [T, layers * E]."""

    def __init__(self, num_layers: int) -> None:
        self.rows: Tensor | None = None
        self._num_layers = num_layers

    def before(self, place: int) -> Any:
        """A hook that takes a layer's input."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._write(place, args[0] if args else kwargs["hidden_states"])

        return hook

    def after(self, place: int) -> Any:
        """A hook that takes the body's output."""

        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._write(place, output[0])

        return hook

    def _write(self, place: int, states: Tensor) -> None:
        row = states[0]
        if self.rows is None:
            self.rows = row.new_empty(row.shape[0], self._num_layers * row.shape[1])
        self.rows[:, place * row.shape[1] : (place + 1) * row.shape[1]].copy_(row)
