"""A target's own multi-token-prediction (MTP) layer as a head: transformers' decoder layer over our own KV pool.

DeepSeek-V3 (arXiv 2412.19437, section 2.2): from the target's normed last state at token t and the embedding of token
t + 1, each normed, ``eh_proj`` makes the input of one ordinary decoder layer of the target's kind, latent attention and
experts included; after a norm the target's own ``lm_head`` names token t + 2. The normed output is the state of the
next level, as in transformers and SGLang: so one layer drafts further than it was trained for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specdec.attention import IMPLEMENTATION, active
from specdec.drafters.state_head import Attend, HeadCall
from specdec.errors import UnsupportedError
from specdec.kv_cache import CallShape
from specdec.packed_linear import pack_linears, packing_obstacle
from specdec.probe import CallSpec, probe
from specdec.tree_target import group_key

__all__ = ["MtpHead"]


class MtpHead:
    """The first MTP layer of a target (`specdec.drafters.state_head.StateHead`).

    Args:
        model: ``MtpModel`` of transformers with its weights, of the target's dtype and on its device.
        num_layers: of the target.
        embed: ids [T] -> [T, H]: the target's embedding.
        project: [T, H] -> [T, V]: the target's ``lm_head``.
        max_length: longest text to be served, in tokens.

    Raises:
        UnsupportedError: the layer's attention cannot see trees.
    """

    target_ids: Tensor | None = None

    def __init__(
        self,
        model: Any,
        *,
        num_layers: int,
        embed: Callable[[Tensor], Tensor],
        project: Callable[[Tensor], Tensor],
        max_length: int,
    ) -> None:
        self.hidden_layers = (num_layers,)
        self.device, self.dtype = model.device, model.dtype
        self.width = int(model.config.hidden_size)
        self.weights: Mapping[str, Tensor] = {}  # they are the target's: nobody trains them by themselves
        self._embed, self._project = embed, project
        self._layer: nn.Module = model.layers[0]
        self._norm: nn.Module | None = model.shared_post_norm if model.use_shared_post_norm else None
        self._rotary: nn.Module | None = model.rotary_emb  # the target's own
        self._rope_kind = {"layer_type": model.config.layer_types[0]} if model.has_per_layer_rope else {}
        self.calls = tuple(_head_call(call) for call in probe(_AsCausalLm(model), limit=max_length))
        if not self.calls:
            raise UnsupportedError("the MTP layer computes attention without transformers' attention interface")
        for module in self._layer.modules():  # the configuration is a copy of the target's
            if hasattr(module, "config"):
                module.config._attn_implementation = {"": IMPLEMENTATION}

    def pack(self) -> None:
        """Pack the linear layers where that can be done; the target's own are packed by its engine."""
        if packing_obstacle(self._layer) is None:
            pack_linears(self._layer, self)

    def fuse(self, states: Tensor) -> Tensor:
        """The target's normed last states as they are: the layer norms them again."""
        return states.to(self.dtype)

    def forward(self, token_ids: Tensor, states: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """One pass over T rows, see ``StateHead``; a row stands at its token's own position, as in transformers."""
        embedded, places = self._embed(token_ids)[None], positions[None] + 1
        angles = None if self._rotary is None else self._rotary(embedded, position_ids=places, **self._rope_kind)
        with active(_Calls(attend)):
            outputs = self._layer(
                embedded, states[None], position_embeddings=angles, attention_mask=None, position_ids=places,
                past_key_values=None,
            )  # fmt: skip
        normed: Tensor = outputs if self._norm is None else self._norm(outputs)
        return normed[0]

    def feedback(self, outputs: Tensor) -> Tensor:
        """The normed outputs themselves."""
        return outputs

    def logits(self, outputs: Tensor) -> Tensor:
        """[T, V] by the target's ``lm_head``."""
        return self._project(outputs)


class _Calls:
    """Hands the attention calls of a pass on to whoever computes them."""

    def __init__(self, attend: Attend) -> None:
        self.num_calls, self.attend = 0, attend


class _AsCausalLm(nn.Module):
    """The layer behind the arguments that the probe passes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        states = torch.zeros(1, input_ids.shape[1], self._model.config.hidden_size)
        states = states.to(self._model.device, self._model.dtype)
        outputs: Tensor = self._model.forward_layer(0, states, position_ids, None, input_ids=input_ids)
        return outputs


def _head_call(call: CallSpec) -> HeadCall:
    if call.extra_kwargs or call.mask_kind == "other" or call.num_query_heads % call.num_kv_heads:
        said = f"passes {', '.join(call.extra_kwargs)}" if call.extra_kwargs else f"has a {call.mask_kind} mask"
        raise UnsupportedError(f"the attention of the MTP layer {said}: it cannot see trees")
    shape = CallShape(call.num_kv_heads, call.key_dim, call.value_dim)
    return HeadCall(group_key(call), shape, call.num_query_heads // call.num_kv_heads)
