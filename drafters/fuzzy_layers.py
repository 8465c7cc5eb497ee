"""Layer-parallel drafting: attentions of neighbouring layers read one input, so that they can run at the same time.

In a group of n layers every attention reads the input of the group's first layer; residual stream and MLPs stay in
order. Only draft nodes run like this. Committed tokens are read exactly, in the forward that every step begins with
anyway, so errors of a draft never reach the next one (bonus calibration). First and last layer are never grouped.

There are three forms of one arithmetic. Layer by layer: the reference, which gains nothing. Batched: the attentions of
a group are one product each for Q, K, V and O. Distributed: each rank of a process group computes the attentions of its
layers and one all-gather per group brings them together; weights, MLPs and exact forwards are replicated.

Source: EasySpec (Wu et al. 2025, arXiv 2502.02493), sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specdec.attention import go_to_call
from specdec.drafters.batched_layers import BatchedAttention
from specdec.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

__all__ = ["FuzzyLayers", "layer_groups"]

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def layer_groups(num_layers: int, size: int) -> list[range]:
    """Runs of ``size`` neighbouring layers, without the first and the last one; a shorter run may end them.

    Example:
        >>> [list(group) for group in layer_groups(8, 4)]
        [[1, 2, 3, 4], [5, 6]]
    """
    if size < 1:
        raise ConfigError(f"n must be >= 1, got {size}")
    return [range(first, min(first + size, num_layers - 1)) for first in range(1, num_layers - 1, size)]


class FuzzyLayers:
    """Makes a model's groups of layers fuzzy while ``active``; otherwise the model is what it was.

    Args:
        model: a causal LM whose blocks are ``x += attention(norm(x)); x += mlp(norm(x))``.
        size: layers per group, n >= 1; 1 changes nothing.
        ranks: of which this process is one; all run the same calls. None: one process.
        is_batched: in one process: the batched form. It can be turned off and on again (``is_batched``).

    Raises:
        ConfigError: n < 1.
        UnsupportedError: the blocks are of another kind, or cannot be batched.
    """

    def __init__(
        self, model: PreTrainedModel, size: int, *, ranks: ProcessGroup | None = None, is_batched: bool = False
    ) -> None:
        self._layers = _blocks(model)
        self.groups = [group for group in layer_groups(len(self._layers), size) if len(group) > 1]
        self._first = {layer: group[0] for group in self.groups for layer in group}
        self._ranks = ranks
        self._is_active = False
        self.is_batched = is_batched
        self._batched = {
            group[0]: BatchedAttention([self._layers[layer] for layer in group], group[0])
            for group in (self.groups if is_batched else ())
        }
        self._inputs: dict[int, Tensor] = {}  # first layer of a group -> its input
        self._outputs: dict[int, Any] = {}  # layer -> what its attention gave, on whichever rank
        self._attention: dict[int, Any] = {}
        for layer in self._first:
            block: Any = self._layers[layer]
            block.input_layernorm.register_forward_pre_hook(self._norm_hook(layer))
            if ranks is not None or is_batched:
                self._attention[layer] = block.self_attn.forward
                block.self_attn.forward = self._shared_attention(layer)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Forwards in here are fuzzy."""
        self._is_active = True
        try:
            yield
        finally:
            self._is_active = False
            self._inputs.clear()
            self._outputs.clear()

    def _norm_hook(self, layer: int) -> Any:
        """Hands the input of the group's first layer to the norm before a layer's attention."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not self._is_active:
                return None
            if layer == self._first[layer]:
                self._inputs[layer] = args[0]
                return None
            return (self._inputs[self._first[layer]], *args[1:])

        return hook

    def _shared_attention(self, layer: int) -> Any:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._is_active or (self._ranks is None and not self.is_batched):
                return self._attention[layer](hidden_states, *args, **kwargs)
            if layer == self._first[layer]:
                if self._ranks is None:
                    self._multiply(layer, kwargs["position_embeddings"])
                else:
                    self._gather(layer, args, kwargs)
            return self._outputs.pop(layer), None

        return forward

    def _multiply(self, first: int, position_embeddings: tuple[Tensor, Tensor]) -> None:
        """Compute all attentions of a group at once."""
        outputs = self._batched[first](self._inputs[first], position_embeddings)
        group = next(group for group in self.groups if group[0] == first)
        go_to_call(group[-1] + 1)
        for layer, output in zip(group, outputs, strict=True):
            self._outputs[layer] = output[None]

    def _gather(self, first: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute the attentions that are ours, and get the others'."""
        import torch.distributed as dist

        group = next(group for group in self.groups if group[0] == first)
        num_ranks, rank = dist.get_world_size(self._ranks), dist.get_rank(self._ranks)
        shared = self._inputs[first]
        per_rank = -(-len(group) // num_ranks)
        mine = shared.new_zeros(per_rank, *shared.shape)
        for place, layer in enumerate(group[rank::num_ranks]):
            block: Any = self._layers[layer]
            go_to_call(layer)
            mine[place] = self._attention[layer](_unhooked(block.input_layernorm, shared), *args, **kwargs)[0]
        go_to_call(group[-1] + 1)
        everything = [torch.empty_like(mine) for _ in range(num_ranks)]
        dist.all_gather(everything, mine, group=self._ranks)
        for place, layer in enumerate(group):
            self._outputs[layer] = everything[place % num_ranks][place // num_ranks]


def _unhooked(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm itself: its hook would record or replace the input once more."""
    normed: Tensor = norm.forward(x)
    return normed


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, after a look at whether they compute what is assumed here."""
    decoder: Any = model.get_decoder()
    layers = list(getattr(decoder, "layers", []))
    name = type(model).__name__
    if not layers or not all(hasattr(layer, part) for layer in layers for part in _PARTS):
        raise UnsupportedError(f"{name} has no layers with {', '.join(_PARTS)}: it cannot be drafted with by groups")
    seen: dict[str, Tensor] = {}

    def note(key: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if key == "block":
                seen["x"] = args[0] if args else kwargs["hidden_states"]
            seen[key] = out[0] if isinstance(out, tuple) else out

        return hook

    block: Any = layers[0]
    hooks = [block.register_forward_hook(note("block"), with_kwargs=True)]
    hooks.append(block.self_attn.register_forward_hook(note("attention"), with_kwargs=True))
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([[1, 2, 3, 4]], device=model.device), use_cache=False)
            middle = seen["x"] + seen["attention"]
            expected = middle + block.mlp(block.post_attention_layernorm(middle))
    finally:
        for hook in hooks:
            hook.remove()
    if not torch.allclose(expected, seen["block"], rtol=1e-2, atol=1e-2 * float(seen["block"].abs().max())):
        raise UnsupportedError(
            f"the layers of {name} are no plain pre-norm blocks: it cannot be drafted with by groups"
        )
    return layers
