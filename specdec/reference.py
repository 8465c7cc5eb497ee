"""What a model computes by itself: ordinary forwards, and a transcript of a few tokens of its ``generate``.

The self-test holds targets against this. Errors are relative to the spread of a row of logits, so that one number
fits every model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from specdec.errors import UnsupportedError
from specdec.row_forward import RowForward
from specdec.types import IntArray

__all__ = ["Reference", "Transcript", "relative_errors", "rounding", "scripted_ids"]

# Largest relative error of a node's logits that counts as rounding, beside what two ordinary forwards of the model
# show themselves. A wrong mask, position or state changes logits by the order of their own spread. Rounding grows
# with depth: units of 2^-8 (bfloat16) and 2^-11 (float16) reach a few percent and about one percent over tens of
# layers; in float32 1e-4 leaves three orders for badly conditioned models.
_ROUNDING = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
_ROUNDING_FLOAT32 = 1e-4
_NOISE_FACTOR = 8  # the noise is seen on one pair of forwards, the test takes the worst node of many
_LARGEST_TOLERANCE = 0.2  # a model noisier than this cannot be told from a mistake
_NUM_ROUNDS = 3  # in low precision a router's near-tie hits a random node, a mistake hits the same one in each round


@dataclass(frozen=True, slots=True, eq=False)
class Transcript:
    """A prompt and a few greedy tokens of ``model.generate``.

    Args:
        token_ids: [P + n] int32.
        num_prompt_tokens: P.
        logits: [n, V]: the unprocessed scores that each of the n tokens came from.
    """

    token_ids: IntArray
    num_prompt_tokens: int
    logits: torch.Tensor

    @classmethod
    def of(cls, model: Any, device: torch.device, prompt: IntArray, num_new_tokens: int) -> Transcript:
        """Let the model generate.

        Raises:
            UnsupportedError: what it returns is not the prompt and its continuation.
        """
        config = GenerationConfig(
            max_new_tokens=num_new_tokens,
            min_new_tokens=num_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        input_ids = torch.from_numpy(prompt).to(device, torch.long)[None]
        out = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
        token_ids = out.sequences[0].cpu().numpy().astype(np.int32)
        if len(token_ids) != len(prompt) + num_new_tokens or not np.array_equal(token_ids[: len(prompt)], prompt):
            raise UnsupportedError("its generate returns something else than the prompt and its continuation")
        return cls(token_ids, len(prompt), torch.cat(list(out.logits)))


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What the model computes by itself.

    Args:
        row: runs ordinary forwards.
        noise: relative error between rows of two ordinary forwards that share their first tokens: its own rounding.
        is_causal: a token's logits do not depend on the tokens after it.
        generate_error: largest relative error between the logits that ``generate`` uses and ordinary forwards.
    """

    row: RowForward
    noise: float
    is_causal: bool
    generate_error: float

    @classmethod
    def of(cls, row: RowForward, vocab_size: int) -> Reference:
        """Learn all of it from two tokens of ``generate`` and two ordinary forwards.

        Raises:
            UnsupportedError: its ``generate`` does not return the prompt and its continuation.
        """
        low = row.dtype in _ROUNDING
        noise, error = 0.0, torch.full((2,), torch.inf)
        is_causal = True
        for salt in range(_NUM_ROUNDS if low else 1):
            token_ids = scripted_ids(vocab_size, 24, salt=9 + salt)
            transcript = Transcript.of(row.model, row.device, token_ids[:17], 2)
            once = row(transcript.token_ids[:18], first_row=0)
            other = row(token_ids, first_row=0)
            shared = relative_errors(other[:17], once[:17])
            # A router's near-tie in low precision makes single rows jump; a model that looks ahead moves most of them.
            noise = float(shared.quantile(0.75) if low else shared.max())
            is_causal = noise <= 10 * rounding(row.dtype)
            first = once[16:17] if is_causal else row(token_ids[:17], first_row=16)
            error = torch.minimum(error, relative_errors(transcript.logits, torch.cat((first, once[17:18]))).cpu())
            if float(error.max()) <= rounding(row.dtype):
                break
        return cls(row, noise if is_causal else 0.0, is_causal, float(error.max()))

    @property
    def tolerance(self) -> float:
        """Largest relative error that is rounding."""
        return min(max(rounding(self.row.dtype), _NOISE_FACTOR * self.noise), _LARGEST_TOLERANCE)

    @property
    def num_rounds(self) -> int:
        """How often a test may be run before the nodes that failed each time count as wrong."""
        return _NUM_ROUNDS if self.row.dtype in _ROUNDING else 1

    @property
    def generates_ordinarily(self) -> bool:
        """True if ``generate`` computes what ordinary forwards compute."""
        return self.generate_error <= self.tolerance


def rounding(dtype: torch.dtype) -> float:
    """Relative error that the logits of a deep model of this dtype may have."""
    return _ROUNDING.get(dtype, _ROUNDING_FLOAT32)


def scripted_ids(vocab_size: int, count: int, *, salt: int) -> IntArray:
    """[count] int32 token ids spread over the vocabulary by a multiplicative hash, neighbours different."""
    index = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(1009 * (salt + 1))
    hashed = (index * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)
    first = min(4, vocab_size - 1)  # ids below are padding and other marks in most vocabularies
    return (first + hashed % np.uint64(vocab_size - first)).astype(np.int32)


def relative_errors(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[n] float32: per row, error over spread, both root mean squares over the vocabulary; inf where not finite."""
    logits, expected = logits.float(), expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean(-1).sqrt().clamp_min(1e-12)
    errors = (logits - expected).square().mean(-1).sqrt() / spread
    return torch.where(torch.isfinite(errors), errors, torch.inf)
