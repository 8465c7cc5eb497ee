"""Adaptive Parallel Decoding of a masked diffusion LM as the target: **lossy**, and it says so.

A large diffusion LM proposes a run of tokens in one pass, a small causal LM decides how many of them are kept (Israel
et al. 2025, arXiv 2506.00413). At every place both choose with the same noise g: the diffusion LM by
``x = argmax(l_D + g)``, the product of experts by ``y = argmax(R l_D + (1 - R) l_A + g)``. The longest prefix with
x = y is kept, the first token in any case; a token that fails is dropped and guessed anew. What comes out follows
neither model's law, nor decoding one token at a time: for R -> 1 everything is kept, for R -> 0 only what the causal
LM would have chosen too.

Two approximations make it cheap: a window W re-reads only the last tokens over a cache whose other rows are stale, and
M limits how many masks stand behind the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from specdec.drafters.masked_lm import MaskedLm
from specdec.errors import ConfigError, RequestError, UnsupportedError
from specdec.rng import TARGET, gumbel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ApdDecoder", "ApdOutput", "gumbel_couple", "match_probability"]

_NUM_STREAMS = 4  # of ``specdec.rng``: those that are TARGET modulo this are ours, one per step


def gumbel_couple(draft: Tensor, target: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draws from two laws with shared noise: [n] int64 each, each exact for its own law.

    Args:
        draft: [n, V] scores.
        target: [n, V] scores.
        noise: [n, V] standard Gumbel; zeros choose the best.
    """
    return (draft + noise).argmax(dim=-1), (target + noise).argmax(dim=-1)


def match_probability(p: Tensor, q: Tensor) -> Tensor:
    """[n] float64: the chance that coupled draws from laws p and q [n, V] are equal.

    ``sum_v 1 / sum_u max(p_u / p_v, q_u / q_v)`` (Daliri et al. 2024, arXiv 2408.07978); at least (1 - TV) / (1 + TV).
    """
    p, q = p.double(), q.double()
    ratios = torch.maximum(p[:, None] / p[..., None], q[:, None] / q[..., None])  # [n, v, u]
    shared = (p > 0) & (q > 0)
    return torch.where(shared, 1.0 / ratios.nan_to_num(posinf=torch.inf).sum(dim=-1), 0.0).sum(dim=-1)


@dataclass(frozen=True, slots=True)
class ApdOutput:
    """New tokens, and how they came about.

    Args:
        token_ids: what was written, without the prompt.
        kept: tokens kept in each step.
        lossless: never.
    """

    token_ids: list[int]
    kept: list[int]
    lossless: Literal[False] = False

    @property
    def tokens_per_step(self) -> float:
        """Mean of ``kept``; 0 before the first step."""
        return sum(self.kept) / max(len(self.kept), 1)


class ApdDecoder:
    """Decodes one request at a time with a diffusion LM and a small causal one.

    Args:
        target: the diffusion LM.
        small: the causal LM, over the same tokens; None with ``tokens_per_step``, which needs no gate.
        ratio: R in [0, 1]: weight of the diffusion LM in the product of experts.
        window: W >= 1: tokens re-read in each step; None: all.
        lookahead: M >= 1: masks behind the text; None: as many as tokens may come.
        tokens_per_step: K >= 1: keep exactly so many, without a gate; 1 is plain decoding from left to right.
        temperature: 0: no noise.
        seed: of the noise.
        stop_ids: end-of-text tokens; the first one is the last token written.

    Raises:
        ConfigError: an option is outside its rule.
        UnsupportedError: a window, and a target whose forward takes no cache.
    """

    lossless: Literal[False] = False

    def __init__(
        self,
        target: MaskedLm,
        small: PreTrainedModel | None,
        *,
        ratio: float = 0.6,
        window: int | None = None,
        lookahead: int | None = None,
        tokens_per_step: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> None:
        if not 0 <= ratio <= 1:
            raise ConfigError(f"ratio must be in [0, 1], got {ratio}")
        if not temperature >= 0:
            raise ConfigError(f"temperature must be >= 0, got {temperature}")
        for name, value in (("window", window), ("lookahead", lookahead), ("tokens_per_step", tokens_per_step)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if (small is None) == (tokens_per_step is None):
            raise ConfigError("a gate needs a small causal model, and tokens_per_step needs none: give one of the two")
        if window is not None and not target.can_cache:
            raise UnsupportedError(f"window={window} needs a cache, and {type(target.model).__name__} takes none")
        self._target, self._small = target, small
        self._ratio, self._window, self._lookahead, self._count = ratio, window, lookahead, tokens_per_step
        self._temperature, self._seed, self._stop_ids = temperature, seed, frozenset(stop_ids)
        small_size = target.vocab_size if small is None else int(small.config.get_text_config().vocab_size)
        self._vocab_size = min(target.vocab_size, small_size)

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> ApdOutput:
        """Continue a prompt.

        Args:
            prompt_ids: one or more tokens.
            max_new_tokens: >= 1.

        Raises:
            RequestError: the prompt is empty or holds an unknown token, or no token may come.
        """
        text = [int(token) for token in prompt_ids]
        if not text or max_new_tokens < 1 or not all(0 <= token < self._vocab_size for token in text):
            raise RequestError(
                f"a prompt of one or more tokens below {self._vocab_size} and max_new_tokens >= 1 are needed"
            )
        end = len(text) + max_new_tokens
        kept: list[int] = []
        mine, its = DynamicCache(), DynamicCache()
        while len(text) < end and not (kept and self._stop_ids.intersection(text[-kept[-1] :])):
            num = min(self._lookahead or end, end - len(text))
            laws = self._laws(text, num, kept[-1] if kept else len(text), mine)
            noise = self._noise(len(text), num, len(kept))
            drafted = (laws + noise).argmax(dim=-1)
            count = self._count or self._agreeing(text, drafted, laws, noise, its)
            new = drafted[:count].tolist()
            stop = next((place for place, token in enumerate(new) if token in self._stop_ids), len(new) - 1)
            kept.append(stop + 1)
            text += new[: stop + 1]
        return ApdOutput(text[len(prompt_ids) :], kept)

    def _laws(self, text: list[int], num: int, newest: int, cache: Any) -> Tensor:
        """[num, V] log-laws of the places behind the text; ``newest`` of its tokens were masks in the last step."""
        lm, start = self._target, 0
        ids = lm.masked(text, num)
        if self._window is None:
            logits = lm.forward(ids)
        else:
            # The newest tokens are read again as what they are, and the window before them.
            start = max(len(text) - self._window - newest + 1, 0)
            _crop(cache, start)
            logits = lm.forward(ids[:, start:], cache=cache, start=start)
        first = len(text) - start - lm.is_shifted
        return self._scaled(lm.without_mask(logits[0, first : first + num]))

    def _agreeing(self, text: list[int], drafted: Tensor, laws: Tensor, noise: Tensor, cache: Any) -> int:
        """How many of the drafted tokens are kept: 1 to all."""
        assert self._small is not None
        known = min(cache.get_seq_length(), len(text) - 1)
        _crop(cache, known)  # the last token is read again: its row guesses the first place
        ids = torch.tensor([text[known:] + drafted[:-1].tolist()], device=self._small.device)
        logits = self._small(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -len(drafted) :]
        _crop(cache, len(text))
        expert = self._scaled(logits.to(laws.device).float())
        mixture = self._ratio * laws + (1 - self._ratio) * expert if self._ratio < 1 else laws
        x, y = gumbel_couple(laws, torch.where(laws.isneginf(), -torch.inf, mixture), noise)
        agrees = x == y
        agrees[0] = True  # a single token is an exact draw of the diffusion LM's own
        return int(agrees.int().cumprod(dim=0).sum())

    def _scaled(self, logits: Tensor) -> Tensor:
        return (logits[:, : self._vocab_size] / (self._temperature or 1.0)).log_softmax(dim=-1)

    def _noise(self, first: int, num: int, step: int) -> Tensor:
        """[num, V]: drawn anew in each step, zero at temperature 0."""
        if self._temperature == 0:
            return torch.zeros(num, self._vocab_size, device=self._target.device)
        places = range(first, first + num)
        stream = TARGET + _NUM_STREAMS * step
        return gumbel([self._seed] * num, list(places), self._vocab_size, device=self._target.device, stream=stream)


def _crop(cache: Any, length: int) -> None:
    """Keep the first ``length`` rows."""
    extra = cache.get_seq_length() - length
    if extra > 0:
        cache.crop(-extra)
