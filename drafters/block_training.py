"""Many blocks of many texts in one pass of a block-diffusion head: for training and for probing checkpoints.

As in DFlash's training (arXiv 2602.06036, section 4): some places of a text are chosen as anchors. Each gets a block
that sees the states of the tokens strictly before its anchor (the anchor's own state does not exist yet when a block is
drafted) and the rows of its own block. On a GPU all blocks are one call of FlexAttention, whose mask says so block by
block; on a CPU attention over the contexts is one plain product.

A training step on B texts of S tokens, padded on the right:

    >>> outputs = forward_blocks(head, states, token_ids, anchors)          # [B, A, rows, H], with gradients
    >>> rows = head.guessing_rows(outputs)                                  # [B, A, guesses, H]
    >>> labels = block_labels(head.config, token_ids, anchors)              # [B, A, guesses], -1 behind the end
    >>> logits, confidences = teacher_forced(head, rows, token_ids, anchors)

``logits[b, a, k]`` is the law of ``labels[b, a, k]``, the token at ``anchors[b, a] + 1 + k``, whatever the dialect; the
target's own law for it comes from the state at ``anchors[b, a] + k``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from specdec.drafters.diffusion_head import BlockAttend, DiffusionConfig, DiffusionHead

__all__ = ["attend_by_mask", "attend_by_products", "block_labels", "forward_blocks", "teacher_forced"]


def forward_blocks(head: DiffusionHead, states: Tensor, token_ids: Tensor, anchors: Tensor) -> Tensor:
    """Run the blocks of some anchors.

    Args:
        head: trained or to be trained; gradients reach every weight that wants them.
        states: [B, S, layers * E]: the target's states at the tokens of the texts.
        token_ids: [B, S] int64.
        anchors: [B, A] int64, each in [1, S).

    Returns:
        [B, A, rows, H].
    """
    config, (batch, length) = head.config, token_ids.shape
    positions = anchors[..., None] + torch.arange(config.block_size, device=anchors.device)  # [B, A, rows]
    block_ids = torch.full_like(positions, config.mask_token_id)
    block_ids[..., 0] = token_ids.gather(1, anchors)
    places = torch.arange(length, device=states.device).repeat(batch)
    # [L, B * S, Hkv, D] -> [L, B, Hkv, S, D]
    context = head.context(head.fuse(states.flatten(0, 1)), places)
    keys, values = (part.unflatten(1, (batch, length)).transpose(2, 3) for part in context)
    build = attend_by_products if states.device.type == "cpu" else attend_by_mask
    outputs = head.forward(block_ids.flatten(), positions.flatten(), build(config, keys, values, anchors))
    return outputs.view(*positions.shape, -1)


def block_labels(config: DiffusionConfig, token_ids: Tensor, anchors: Tensor) -> Tensor:
    """[B, A, guesses] int64: the tokens behind each anchor; -1 behind the end of the text."""
    length = token_ids.shape[1]
    places = anchors[..., None] + 1 + torch.arange(config.num_guesses, device=anchors.device)
    return torch.where(places < length, _at(token_ids, places), -1)


def teacher_forced(
    head: DiffusionHead, rows: Tensor, token_ids: Tensor, anchors: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The laws and confidences of all guesses, each given the text's own tokens before it.

    Args:
        head: as in ``forward_blocks``.
        rows: [B, A, guesses, H] of ``DiffusionHead.guessing_rows``.
        token_ids: [B, S] int64.
        anchors: [B, A] int64.

    Returns:
        Logits [B, A, guesses, D] over the draft vocabulary, Markov head included, and the confidence head's logits
        [B, A, guesses] float32, or None without one. Guesses behind the end of the text are not defined.
    """
    count = rows.shape[2]
    previous = _at(token_ids, anchors[..., None] + torch.arange(count, device=anchors.device))
    logits = head.logits(rows)
    if head.config.markov == "rnn":
        memory, biases = None, []
        for k in range(count):
            bias, memory = head.bias(rows[:, :, k], previous[:, :, k], memory)
            biases.append(bias)
        logits = logits + torch.stack([bias for bias in biases if bias is not None], dim=2)
    elif head.config.markov != "none":
        bias, _ = head.bias(rows, previous, None)
        logits = logits if bias is None else logits + bias
    return logits, head.confidence(rows, previous) if head.config.has_confidence else None


def _at(token_ids: Tensor, places: Tensor) -> Tensor:
    """[B, A, K]: the tokens [B, S] at some places, the last one's behind the end."""
    return token_ids.gather(1, places.flatten(1).clamp_max(token_ids.shape[1] - 1)).view(places.shape)


def attend_by_products(config: DiffusionConfig, keys: Tensor, values: Tensor, anchors: Tensor) -> BlockAttend:
    """Attention of blocks over their contexts and their own rows, as plain products.

    Args:
        config: of the head.
        keys: [L, B, Hkv, S, D], of the contexts.
        values: the same.
        anchors: [B, A] int64.
    """
    rows = torch.arange(config.block_size, device=anchors.device)
    positions = anchors[..., None] + rows  # [B, A, rows]
    length = keys.shape[3]
    places = torch.arange(length, device=anchors.device)

    def hidden(layer: int) -> tuple[Tensor, Tensor]:
        """[B, 1, 1, A, 1 or rows, S] and [rows, rows] bool: what rows must not see of context and block."""
        ahead = places >= anchors[..., None, None]
        inside = torch.zeros(len(rows), len(rows), dtype=torch.bool, device=anchors.device)
        if config.windows[layer]:
            ahead = ahead | (places <= positions[..., None] - config.windows[layer])
            inside = rows <= rows[:, None] - config.windows[layer]
        if config.causal[layer]:
            inside = inside | (rows > rows[:, None])
        return ahead[:, None, None], inside

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shape = (config.num_kv_heads, config.num_heads // config.num_kv_heads, *positions.shape)
        # [1, Hq, T, D] -> [B, Hkv, G, A, rows, D]; under autocast the rotary embedding leaves keys in float32
        q = (query[0].reshape(*shape, -1) * config.head_dim**-0.5).movedim(2, 0).to(value.dtype)
        own_keys, own_values = (
            part[0].unflatten(1, positions.shape).movedim(1, 0)[:, :, None].to(value.dtype) for part in (key, value)
        )
        ahead, inside = hidden(layer)
        over = torch.matmul(q.flatten(2, 4), keys[layer].to(value.dtype).transpose(-1, -2))
        own = torch.matmul(q, own_keys.transpose(-1, -2))
        scores = torch.cat(
            (over.view(*q.shape[:-1], length).masked_fill(ahead, -torch.inf), own.masked_fill(inside, -torch.inf)), -1
        )
        weights = scores.float().softmax(dim=-1).to(value.dtype)
        out = torch.matmul(weights[..., :length].flatten(2, 4), values[layer].to(value.dtype)).view(q.shape)
        out = out + torch.matmul(weights[..., length:], own_values)
        return out.movedim(0, 2).flatten(0, 1).flatten(1, 3).transpose(0, 1)[None]  # [1, T, Hq, D]

    return attend


def attend_by_mask(config: DiffusionConfig, keys: Tensor, values: Tensor, anchors: Tensor) -> BlockAttend:
    """The same by FlexAttention: one call for all blocks of a layer, with a mask that skips what no row sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, (batch, count), length = config.block_size, anchors.shape, keys.shape[3]
    masks: dict[tuple[int, bool], Any] = {}

    def mask_of(window: int, is_causal: bool) -> Any:
        def sees(b: Tensor, _: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            anchor, other = anchors[b, q // rows], kv - length
            seen = torch.where(kv < length, kv < anchor, other // rows == q // rows)
            place = torch.where(kv < length, kv, anchor + other % rows)
            own = anchor + q % rows
            if window:
                seen = seen & (place > own - window)
            return seen & (place <= own) if is_causal else seen

        size = count * rows
        return create_block_mask(sees, batch, None, size, length + size, device=anchors.device.type)

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, own_keys, own_values = (  # [1, H, B * A * rows, D] -> [B, H, A * rows, D]
            part[0].unflatten(1, (batch, count * rows)).transpose(0, 1).to(value.dtype) for part in (query, key, value)
        )
        which = (config.windows[layer], config.causal[layer])
        if which not in masks:
            masks[which] = mask_of(*which)
        out: Tensor = _flex(anchors.device.type)(
            q, torch.cat((keys[layer].to(value.dtype), own_keys), dim=2),
            torch.cat((values[layer].to(value.dtype), own_values), dim=2), block_mask=masks[which], enable_gqa=True,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(0, 1)[None]  # [1, T, Hq, D]

    return attend


@cache
def _flex(device: str) -> Any:
    """FlexAttention, compiled where it is meant to be fast; elsewhere it runs as plain operations, for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
