"""The first weights of a new EAGLE-3 head: it starts as an induction head, which copies, and learns the rest.

A row s of a head holds the token s + 1 and, in the target's state, the token s and what the target knows of those
before it. So one attention layer can do what two do in a language model (Olsson et al. 2022, arXiv 2209.11895): the
keys are the states, the query is what the newest token's state will be, by a regression on that token and on the state
before it; the values are the tokens that came next. Where the newest tokens stood before, the head then says what
followed them. A low layer that looks back a few tokens finds the same context, not only the same token.

Only slowly rotating pairs of the rotary embedding take part, so that the match does not depend on the distance. The
head's next level reads its output in place of a state. So the values also carry on the state found, in directions that
the ``lm_head`` hardly reads: it stands for the one that the target would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from specdec.drafters.eagle_head import EagleConfig
from specdec.errors import UnsupportedError
from specdec.online_training.data import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["new_head"]

_SLOW = 3e-3  # radians a token: pairs that turn more slowly than this take part in the match
_MATCH = 32.0  # score of a match, so that one key of a few hundred stands out
_COPIED = 3.0  # RMS of what is copied, in the residual stream
_STATE = 5.0  # factor of the state found there, in directions that are not said
_CARRIED = 0.2  # RMS of the state there: what was said before should not be said again
_RIDGE = 0.01  # of the mean square: keeps rare directions of an embedding quiet
_SAID = 14.0  # logit of a token that is copied alone
_WIDE = 128  # head_dim, where heads can be joined: a match in few dimensions is noisy
_SAMPLE = 10_000  # tokens of the regression


def new_head(
    target: PreTrainedModel,
    *,
    layers: Sequence[int],
    examples: Sequence[Example] = (),
    target_ids: Tensor | None = None,
    norm_before_residual: bool = True,
    max_length: int = 2048,
    seed: int = 0,
) -> tuple[EagleConfig, dict[str, Tensor]]:
    """Shape and first weights of a head as wide as its target.

    Args:
        target: any decoder; its widths, rotary base, embedding and ``lm_head`` are taken over.
        layers: whose states it reads, as indices into ``output_hidden_states``; the first should be a low one, which
            still holds its own token and those before it.
        examples: texts for the regression; without any, random tokens serve.
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
    while head_dim < _WIDE and num_heads % 2 == 0:
        head_dim, num_heads = 2 * head_dim, num_heads // 2
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
    sample = _sample(target, layers[0], examples, seed)
    return config, _weights(config, target, int(text.intermediate_size), target_ids, sample, seed)


def _weights(
    config: EagleConfig,
    target: Any,
    inner: int,
    target_ids: Tensor | None,
    sample: _Sample,
    seed: int,
) -> dict[str, Tensor]:
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
    carried = _CARRIED if config.norm_before_residual else 1.0
    through = torch.cat([torch.eye(width) / sample.size, drawn(width, width * (parts - 1), 0.02)], dim=1)
    through *= _CARRIED / carried
    query, key = _match(config, sample, generator)
    quiet = _quiet_directions(unembedding, max(0, min(total - width, width // 2)))
    copied = _orthonormal(total, width + quiet.shape[1], generator)
    read = torch.zeros(copied.shape[1], 2 * width)
    read[:width, :width] = torch.eye(width)
    read[width:, width:] = normalize(quiet, dim=0).T / carried
    layer = "layers.0."
    return {
        "fc.weight": through,
        f"{layer}self_attn.q_proj.weight": query * _gains(width, carried),
        f"{layer}self_attn.k_proj.weight": torch.cat([drawn(total, width, 0.02), key / carried], dim=1),
        f"{layer}self_attn.v_proj.weight": copied @ read,
        f"{layer}self_attn.o_proj.weight": torch.cat([_COPIED * _said_from_read(target), _STATE * quiet], 1) @ copied.T,
        f"{layer}mlp.gate_proj.weight": drawn(inner, width),
        f"{layer}mlp.up_proj.weight": drawn(inner, width),
        f"{layer}mlp.down_proj.weight": drawn(width, inner, 0.1),
        **{f"{layer}{name}.weight": torch.ones(width) for name in _NORMS},
        f"{layer}hidden_norm.weight": torch.full((width,), carried),
        # A normed vector along a token's row of the head has the logit sqrt(width) * loudness.
        "norm.weight": torch.full((width,), _SAID / (width**0.5 * loudness)),
        "lm_head.weight": unembedding,
    }


def _gains(width: int, carried: float) -> Tensor:
    """[2 * H]: undoes the gain that the norm of the state has, and that of the embedding has not."""
    return torch.cat([torch.ones(width), torch.full((width,), 1 / carried)])


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, columns], random, orthonormal in its shorter direction."""
    found: Tensor = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator))[0]
    return found if rows >= columns else found.T


def _quiet_directions(unembedding: Tensor, count: int) -> Tensor:
    """[H, count]: the directions in which tokens differ least, as long as they are quieter than the mean one."""
    energy, directions = torch.linalg.eigh(unembedding.T @ unembedding)
    found: Tensor = directions[:, :count] * (1 - energy[:count] / energy.mean()).clamp_min(0.0)
    return found


_NORMS = ("input_layernorm", "post_attention_layernorm")


def _match(config: EagleConfig, sample: _Sample, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[heads * D, 2 * H] and [heads * D, H]: queries and keys whose product says how alike two states are.

    The query is made from what the state is expected to be. Every head compares in random directions of its own.
    """
    half, width = config.head_dim // 2, config.hidden_size
    speeds = float(str(config.rope["rope_theta"])) ** (-torch.arange(half) / half)
    slow = (speeds < _SLOW).nonzero().flatten()
    slow = slow if len(slow) else torch.tensor([half - 1])
    pairs = torch.cat([slow, slow + half])[:width]
    read, made = sample.read, sample.states
    ridge = _RIDGE * torch.eye(2 * width) * len(read)
    expected = torch.linalg.solve(read.T @ read + ridge, read.T @ made).T  # [H, 2 * H]
    metric = _metric(made)
    size = (made @ metric).norm(dim=1).median().clamp_min(1e-6)
    query = torch.zeros(config.num_heads, config.head_dim, 2 * width)
    key = torch.zeros(config.num_heads, config.head_dim, width)
    scale = (_MATCH * config.head_dim**0.5 * width / len(pairs)) ** 0.5 / size
    for head in range(config.num_heads):
        seen = scale * _orthonormal(len(pairs), width, generator) @ metric
        query[head, pairs], key[head, pairs] = seen @ expected, seen
    return query.flatten(0, 1), key.flatten(0, 1)


def _metric(states: Tensor) -> Tensor:
    """[H, H]: half-way to whitened, without what all states share."""
    mean = states.mean(0)
    spread, directions = torch.linalg.eigh((states - mean).T @ (states - mean) / len(states))
    whitened = directions * (spread + spread.mean()).rsqrt() @ directions.T
    shared = normalize(mean, dim=0)
    found: Tensor = whitened - torch.outer(whitened @ shared, shared)
    return found


@dataclass(frozen=True, slots=True)
class _Sample:
    """What a head reads at some tokens, float32 on the CPU.

    Args:
        read: [N, 2 * H]: normed embeddings of tokens, and normed states of the tokens before them.
        states: [N, H]: normed states of the tokens.
        size: RMS of the states before the norm.
    """

    read: Tensor
    states: Tensor
    size: float


@torch.no_grad()
def _sample(target: Any, layer: int, examples: Sequence[Example], seed: int) -> _Sample:
    texts = [torch.from_numpy(example.token_ids.astype(np.int64)) for example in examples]
    if not texts:
        vocab_size = int(target.config.get_text_config().vocab_size)
        texts = list(torch.randint(vocab_size, (_SAMPLE // 256, 256), generator=torch.Generator().manual_seed(seed)))
    ends = np.cumsum([len(text) for text in texts])
    read, states, sizes = [], [], []
    for text in texts[: max(1, int(np.searchsorted(ends, _SAMPLE)))]:
        ids = text[None].to(target.device)
        found = target(input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
        raw = found[layer][0].float().cpu()
        embedded = _normed(target.get_input_embeddings()(ids)[0].float().cpu())
        read.append(torch.cat([embedded[1:], _normed(raw[:-1])], dim=1))
        states.append(_normed(raw[1:]))
        sizes.append(raw.square().mean(1).sqrt())
    return _Sample(torch.cat(read), torch.cat(states), float(torch.cat(sizes).median().clamp_min(1e-6)))


def _normed(rows: Tensor) -> Tensor:
    found: Tensor = rows * (rows.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return found


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
