"""Many blocks of one text in one pass of a block-diffusion head: for training and for probing checkpoints.

As in DFlash's training (arXiv 2602.06036, section 4): some places of the text are chosen as anchors. Each gets a block
that sees the states of the tokens strictly before its anchor (the anchor's own state does not exist yet when a block is
drafted) and the rows of its own block. Attention over the context is one product for all blocks.

A training step on one text of S tokens:

    >>> outputs = forward_blocks(head, states, token_ids, anchors)          # [A, rows, H], with gradients
    >>> rows = head.guessing_rows(outputs)                                  # [A, guesses, H]
    >>> labels = block_labels(head.config, token_ids, anchors)              # [A, guesses], -1 behind the text's end
    >>> logits, confidences = teacher_forced(head, rows, token_ids, anchors)

``logits[a, k]`` is the law of ``labels[a, k]``, the token at ``anchors[a] + 1 + k``, whatever the dialect; the target's
own law for it comes from the state at ``anchors[a] + k``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.drafters.diffusion_head import BlockAttend, DiffusionConfig, DiffusionHead

__all__ = ["block_labels", "forward_blocks", "teacher_forced"]


def forward_blocks(head: DiffusionHead, states: Tensor, token_ids: Tensor, anchors: Tensor) -> Tensor:
    """Run the blocks of some anchors.

    Args:
        head: trained or to be trained; gradients reach every weight that wants them.
        states: [S, layers * E]: the target's states at the tokens of the text.
        token_ids: [S] int64.
        anchors: [A] int64, each in [1, S).

    Returns:
        [A, rows, H].
    """
    config = head.config
    rows = torch.arange(config.block_size, device=anchors.device)
    positions = anchors[:, None] + rows  # [A, rows]
    block_ids = torch.full_like(positions, config.mask_token_id)
    block_ids[:, 0] = token_ids[anchors]
    context = head.context(head.fuse(states), torch.arange(len(states), device=states.device))
    outputs = head.forward(block_ids.flatten(), positions.flatten(), _attend_blocks(config, context, positions))
    return outputs.view(*positions.shape, -1)


def block_labels(config: DiffusionConfig, token_ids: Tensor, anchors: Tensor) -> Tensor:
    """[A, guesses] int64: the tokens behind each anchor; -1 behind the end of the text."""
    places = anchors[:, None] + 1 + torch.arange(config.num_guesses, device=anchors.device)
    return torch.where(places < len(token_ids), token_ids[places.clamp_max(len(token_ids) - 1)], -1)


def teacher_forced(
    head: DiffusionHead, rows: Tensor, token_ids: Tensor, anchors: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The laws and confidences of all guesses, each given the text's own tokens before it.

    Args:
        head: as in ``forward_blocks``.
        rows: [A, guesses, H] of ``DiffusionHead.guessing_rows``.
        token_ids: [S] int64.
        anchors: [A] int64.

    Returns:
        Logits [A, guesses, D] over the draft vocabulary, Markov head included, and the confidence head's logits
        [A, guesses] float32, or None without one. Guesses behind the end of the text are not defined.
    """
    places = anchors[:, None] + torch.arange(rows.shape[1], device=anchors.device)
    previous = token_ids[places.clamp_max(len(token_ids) - 1)]
    logits = head.logits(rows)
    if head.config.markov == "rnn":
        memory, biases = None, []
        for k in range(rows.shape[1]):
            bias, memory = head.bias(rows[:, k], previous[:, k], memory)
            biases.append(bias)
        logits = logits + torch.stack([bias for bias in biases if bias is not None], dim=1)
    elif head.config.markov != "none":
        bias, _ = head.bias(rows, previous, None)
        logits = logits if bias is None else logits + bias
    return logits, head.confidence(rows, previous) if head.config.has_confidence else None


def _attend_blocks(config: DiffusionConfig, context: tuple[Tensor, Tensor], positions: Tensor) -> BlockAttend:
    """Attention of blocks at ``positions`` [A, rows] over a shared context and their own rows, as plain products."""
    keys, values = (part.transpose(1, 2) for part in context)  # [L, Hkv, S, D]
    places = torch.arange(keys.shape[2], device=positions.device)
    rows = torch.arange(positions.shape[1], device=positions.device)

    def hidden(layer: int) -> tuple[Tensor, Tensor]:
        """[A, 1 or rows, S] and [rows, rows] bool: what the rows must not see of context and block."""
        ahead = places >= positions[:, :1, None]
        inside = torch.zeros(len(rows), len(rows), dtype=torch.bool, device=positions.device)
        if config.windows[layer]:
            ahead = ahead | (places <= positions[..., None] - config.windows[layer])
            inside = rows <= rows[:, None] - config.windows[layer]
        if config.causal[layer]:
            inside = inside | (rows > rows[:, None])
        return ahead, inside

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups = config.num_heads // config.num_kv_heads
        shape = (config.num_kv_heads, groups, *positions.shape)
        q = query[0].reshape(*shape, -1) * config.head_dim**-0.5  # [Hkv, G, A, rows, D]
        own_keys, own_values = (part[0].unflatten(1, positions.shape)[:, None] for part in (key, value))
        ahead, inside = hidden(layer)
        over = torch.matmul(q.flatten(1, 3), keys[layer].transpose(1, 2)).view(*shape, -1)
        own = torch.matmul(q, own_keys.transpose(-1, -2))
        scores = torch.cat((over.masked_fill(ahead, -torch.inf), own.masked_fill(inside, -torch.inf)), dim=-1)
        weights = scores.float().softmax(dim=-1).to(value.dtype)
        split = keys.shape[2]
        out = torch.matmul(weights[..., :split].flatten(1, 3), values[layer]).view(q.shape)
        out = out + torch.matmul(weights[..., split:], own_values)
        return out.flatten(0, 1).flatten(1, 2).transpose(0, 1)[None]  # [1, T, Hq, D]

    return attend
