"""The first weights of a new EAGLE-3 head: it starts as an induction head, which copies, and learns the rest.

A row s of a head holds the token s + 1 and, in the target's state, the token s. So one attention layer can do what
two do in a language model (Olsson et al. 2022, arXiv 2209.11895): the query is the token just read, the keys are the
tokens of the states, the values are the tokens that came next. Where the newest token stood before, the head then says
what followed it. Only slowly rotating pairs of the rotary embedding take part, so that the match does not depend on the
distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from specdec.drafters.eagle_head import EagleConfig
from specdec.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["new_head"]

_SLOW = 3e-3  # radians a token: pairs that turn more slowly than this take part in the match
_MATCH = 24.0  # score of a match, so that one key of a few hundred stands out
_COPIED = 3.0  # RMS of what is copied, in the residual stream
_CARRIED = 0.2  # RMS of the state there: what was said before should not be said again
_RIDGE = 0.01  # of the mean square: keeps rare directions of an embedding quiet
_SAID = 8.0  # logit of a token that is copied alone


def new_head(
    target: PreTrainedModel,
    *,
    layers: Sequence[int],
    target_ids: Tensor | None = None,
    norm_before_residual: bool = True,
    max_length: int = 2048,
    seed: int = 0,
) -> tuple[EagleConfig, dict[str, Tensor]]:
    """Shape and first weights of a head as wide as its target.

    Args:
        target: any decoder; its widths, rotary base, embedding and ``lm_head`` are taken over.
        layers: whose states it reads, as indices into ``output_hidden_states``; the first should be a low one, which
            still holds its own token.
        target_ids: [D] int64, its vocabulary; None: the target's.
        norm_before_residual: the residual stream carries the normed state (speculators, vLLM). Without, the head starts
            out copying in its first step only: its own outputs are as loud as what it copies next.
        max_length: longest text of the training.
        seed: of the weights.

    Raises:
        UnsupportedError: the target's heads have an odd width.
    """
    text = target.config.get_text_config()
    width, num_heads = int(text.hidden_size), int(text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or width // num_heads)
    if head_dim % 2:
        raise UnsupportedError(f"a head needs an even head_dim, the target's is {head_dim}")
    parameters = getattr(text, "rope_parameters", None) or {}
    theta = float(parameters.get("rope_theta") or getattr(text, "rope_theta", None) or 10_000.0)
    config = EagleConfig(
        version=3,
        hidden_size=width,
        target_hidden_size=width,
        num_heads=num_heads,
        num_kv_heads=num_heads,  # what is copied must fit through the values
        head_dim=head_dim,
        eps=float(getattr(text, "rms_norm_eps", 1e-6)),
        hidden_layers=tuple(layers),
        rope={"rope_type": "default", "rope_theta": theta},
        max_length=max_length,
        norm_before_residual=norm_before_residual,
    )
    return config, _weights(config, target, int(text.intermediate_size), target_ids, seed)


def _weights(config: EagleConfig, target: Any, inner: int, target_ids: Tensor | None, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width, parts = config.hidden_size, len(config.hidden_layers)
    total = config.num_heads * config.head_dim

    def drawn(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        values: Tensor = torch.randn(rows, columns, generator=generator) * (scale * columns**-0.5)
        return values

    unembedding: Tensor = target.get_output_embeddings().weight.detach().float().cpu()
    if target_ids is not None:
        unembedding = unembedding[target_ids.cpu()]
    loudness = float(unembedding.norm(dim=1).median())
    state = _typical_size(target, config.hidden_layers[0])
    match = _match(config, generator)
    noise, nothing = drawn(total, width, 0.02), torch.zeros(total, width)
    copied = torch.linalg.qr(torch.randn(max(total, width), min(total, width), generator=generator))[0]
    copied = copied if total >= width else copied.T  # [total, width], orthonormal in its shorter direction
    carried = _CARRIED if config.norm_before_residual else 1.0
    through = torch.cat([torch.eye(width) / state, drawn(width, width * (parts - 1), 0.02)], dim=1)
    through *= _CARRIED / carried
    layer = "layers.0."
    return {
        "fc.weight": through,
        f"{layer}self_attn.q_proj.weight": torch.cat([match, noise], dim=1),
        f"{layer}self_attn.k_proj.weight": torch.cat([noise, match / carried], dim=1),
        f"{layer}self_attn.v_proj.weight": torch.cat([copied, nothing], dim=1),
        f"{layer}self_attn.o_proj.weight": _COPIED * _said_from_read(target) @ copied.T,
        f"{layer}mlp.gate_proj.weight": drawn(inner, width),
        f"{layer}mlp.up_proj.weight": drawn(inner, width),
        f"{layer}mlp.down_proj.weight": drawn(width, inner, 0.1),
        **{f"{layer}{name}.weight": torch.ones(width) for name in _NORMS},
        f"{layer}hidden_norm.weight": torch.full((width,), carried),
        # A normed vector along a token's row of the head has the logit sqrt(width) * loudness.
        "norm.weight": torch.full((width,), _SAID / (width**0.5 * loudness)),
        "lm_head.weight": unembedding,
    }


_NORMS = ("input_layernorm", "post_attention_layernorm")


def _match(config: EagleConfig, generator: torch.Generator) -> Tensor:
    """[heads * D, H]: random orthonormal directions in the slowly rotating pairs, scaled for ``_MATCH``."""
    half, width = config.head_dim // 2, config.hidden_size
    speeds = float(str(config.rope["rope_theta"])) ** (-torch.arange(half) / half)
    slow = (speeds < _SLOW).nonzero().flatten()
    slow = slow if len(slow) else torch.tensor([half - 1])
    pairs = torch.cat([slow, slow + half])
    pairs = pairs[:width]
    match: Tensor = torch.zeros(config.num_heads, config.head_dim, width)
    for head in range(config.num_heads):
        basis = torch.linalg.qr(torch.randn(width, len(pairs), generator=generator))[0]
        match[head, pairs] = basis.T
    # Normed rows have length sqrt(H), of which these directions see len(pairs) / H.
    scale = (_MATCH * config.head_dim**0.5 / len(pairs)) ** 0.5
    scaled: Tensor = match.flatten(0, 1) * scale
    return scaled


def _said_from_read(target: Any) -> Tensor:
    """[H, H]: takes a token's normed embedding to its normed row of the ``lm_head``, as well as a matrix can.

    The identity where the two are tied.
    """
    read, said = (
        normalize(layer.weight.detach().float().cpu(), dim=1)
        for layer in (target.get_input_embeddings(), target.get_output_embeddings())
    )
    if torch.equal(read, said):
        return torch.eye(read.shape[1])
    gram = read.T @ read
    ridge = _RIDGE * float(gram.diagonal().mean()) * torch.eye(len(gram))
    solved: Tensor = torch.linalg.solve(gram + ridge, read.T @ said).T
    size = (read @ solved.T).norm(dim=1).median().clamp_min(1e-6)
    found: Tensor = solved / size
    return found


@torch.no_grad()
def _typical_size(target: Any, layer: int) -> float:
    """RMS of the target's states on some tokens."""
    ids = torch.arange(2, 66, device=target.device)[None] % int(target.config.get_text_config().vocab_size)
    states = target(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[layer]
    return float(states.float().square().mean(-1).sqrt().median().clamp_min(1e-6))
