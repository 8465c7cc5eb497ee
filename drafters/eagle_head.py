"""EAGLE-1/2 and EAGLE-3 heads: one decoder layer that reads the target's states and guesses the next token's.

A row t of the head pairs the target's state at token t with token t + 1, and its output stands for the state at t + 1.

Version 1 (Li et al. 2024, arXiv 2401.15077; version 2 uses the same weights): the state is the input of the target's
``lm_head``; ``h = fc([embedding, state])``, a layer without input norm, and the target's own ``lm_head`` on its output.

Version 3 (Li et al. 2025, arXiv 2503.01840): the states of three layers, fused by ``fc``; the layer's attention reads
``[norm(embedding), norm(state)]`` while the residual stream carries the state; own ``norm`` and ``lm_head`` over a
reduced vocabulary. Its variants: ``norm_before_residual`` (the stream carries the normed state), and version 3.1's
norms of each fused state (``fc_norm``) and normed feedback (``norm_output``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from specdec.drafters.decoder_parts import gated, rms_norm, rotary_embedding, rotate, spread_over_vocabulary
from specdec.drafters.products import Products
from specdec.drafters.state_head import HeadCall
from specdec.kv_cache import CallShape

__all__ = ["Attend", "EagleConfig", "EagleHead", "attend_causally"]

# (query [1, Hq, T, D], key [1, Hkv, T, D], value, scaling, softcap, sinks) -> [1, T, Hq, D]; a head needs no more
Attend = Callable[[Tensor, Tensor, Tensor, None, None, None], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleConfig:
    """How a head is built and how its states are to be read.

    Args:
        version: 1 (also 2) or 3 (also 3.1).
        hidden_size: H of the head.
        target_hidden_size: width of one state of the target.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head.
        eps: of all RMS norms.
        hidden_layers: states it reads, as indices into ``output_hidden_states``.
        rope: ``rope_parameters`` of transformers: theta and, where there is one, scaling.
        max_length: longest text of its training.
        norm_before_residual: the residual stream carries the normed state.
        norm_output: the normed output is fed back.
    """

    version: int
    hidden_size: int
    target_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    hidden_layers: tuple[int, ...]
    rope: Mapping[str, object]
    max_length: int
    norm_before_residual: bool = False
    norm_output: bool = False


def attend_causally(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, *_: float | Tensor | None) -> Tensor:
    """Plain causal attention over a row of its own, without soft-cap and sinks, for teacher forcing."""
    out: Tensor = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2)


class EagleHead:
    """The arithmetic of a head; it holds weights and nothing of any request.

    Args:
        config: its shape.
        weights: by the names of the ``speculators`` layout (``layers.0.*``), all of one dtype, on one device.
        embed: ids [T] -> [T, H]: the target's embedding, or the head's own.
        project: [T, H] -> [T, D]: the target's ``lm_head``, for a head without one.
        target_ids: [D] int64: the target's id of every draft id; None: they are the same.
    """

    def __init__(
        self,
        config: EagleConfig,
        weights: Mapping[str, Tensor],
        *,
        embed: Callable[[Tensor], Tensor],
        project: Callable[[Tensor], Tensor],
        target_ids: Tensor | None,
    ) -> None:
        self.config = config
        self.weights = dict(weights)
        self.target_ids = target_ids
        self.device, self.dtype = self.weights["fc.weight"].device, self.weights["fc.weight"].dtype
        self._embed, self._project = embed, project
        self._rotary = rotary_embedding(
            config.rope, hidden_size=config.hidden_size, num_heads=config.num_heads, head_dim=config.head_dim,
            max_length=config.max_length,
        ).to(self.device)  # fmt: skip
        self._products = Products()

    @property
    def width(self) -> int:
        """H."""
        return self.config.hidden_size

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """States that it reads, as indices into ``output_hidden_states``."""
        return self.config.hidden_layers

    @property
    def calls(self) -> tuple[HeadCall, ...]:
        """Its one attention call."""
        config = self.config
        shape = CallShape(config.num_kv_heads, config.head_dim, config.head_dim)
        return (HeadCall(("full", 0), shape, config.num_heads // config.num_kv_heads),)

    def pack(self) -> None:
        """Compute from packed copies of the weights from now on, where that pays: no gradients any more."""
        self._products.is_packing = True

    def fuse(self, states: Tensor) -> Tensor:
        """[T, H] inputs from the target's states [T, layers * E] at the same tokens."""
        states = states.to(self.dtype)
        if self.config.version == 1:
            return states
        if "input_norm.weight" in self.weights:
            states = self._norm("input_norm", states)
        if "fc_norm.0.weight" in self.weights:
            parts = states.split(self.config.target_hidden_size, dim=-1)
            states = torch.cat([self._norm(f"fc_norm.{i}", part) for i, part in enumerate(parts)], dim=-1)
        return self._linear("fc", states)

    def forward(self, token_ids: Tensor, states: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """One pass over T rows.

        Args:
            token_ids: [T] int64.
            states: [T, H], fused or the head's own outputs.
            positions: [T] int64: of the rows.
            attend: lets rows see what they may.

        Returns:
            [T, H]: what the head's logits and the next level's states are made from.
        """
        embedded = self._embed(token_ids)
        if self.config.version == 1:
            stream = self._linear("fc", torch.cat((embedded, states), dim=-1))
            read = stream
        else:
            normed = self._norm("layers.0.hidden_norm", states)
            stream = normed if self.config.norm_before_residual else states
            read = torch.cat((self._norm("layers.0.input_layernorm", embedded), normed), dim=-1)
        stream = stream + self._attention(read, positions, attend)
        return stream + self._mlp(self._norm("layers.0.post_attention_layernorm", stream))

    def feedback(self, outputs: Tensor) -> Tensor:
        """[T, H]: the states of the next level from the outputs of this one."""
        return self._norm("norm", outputs) if self.config.norm_output else outputs

    def logits(self, outputs: Tensor) -> Tensor:
        """[T, D] over the head's own vocabulary."""
        if self.config.version == 3:
            outputs = self._norm("norm", outputs)
        return self._linear("lm_head", outputs) if "lm_head.weight" in self.weights else self._project(outputs)

    def target_logits(self, outputs: Tensor, vocab_size: int) -> Tensor:
        """[T, V] over the target's vocabulary; tokens that the head does not know are at -inf."""
        return spread_over_vocabulary(self.logits(outputs), self.target_ids, vocab_size)

    def _attention(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        config, name = self.config, "layers.0.self_attn"
        cos, sin = self._rotary(x[None], positions[None])  # [1, T, D]
        parts = self._linears(x, *(f"{name}.{part}_proj" for part in "qkv"))
        query, key, value = (part.unflatten(-1, (-1, config.head_dim)) for part in parts)
        if f"{name}.q_norm.weight" in self.weights:
            query, key = self._norm(f"{name}.q_norm", query), self._norm(f"{name}.k_norm", key)
        both = rotate(torch.cat((query, key), dim=1).transpose(0, 1)[None], cos, sin)  # [1, Hq + Hkv, T, D]
        query, key = both.split((config.num_heads, config.num_kv_heads), dim=1)
        out = attend(query, key, value.transpose(0, 1)[None], None, None, None)
        return self._linear(f"{name}.o_proj", out[0].flatten(1))

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self._linears(x, "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj")
        return self._linear("layers.0.mlp.down_proj", gated(gate, up))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return self._linears(x, name)[0]

    def _linears(self, x: Tensor, *names: str) -> Sequence[Tensor]:
        return self._products.of(self.weights, x, *names)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.eps)
