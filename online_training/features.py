"""The target's states that a drafter learns from: computed on the fly, or kept on disk between epochs.

Nothing here changes the target. The teacher's logits are never stored: they are the target's ``lm_head`` on the last
states, which are as many numbers as one row of the model is wide.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.errors import LoadError, UnsupportedError
from specdec.online_training.data import TrainBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TargetFeatures"]

_CLOSE = 1e-3  # relative; how well lm_head(last states) must give the model's own logits


class TargetFeatures:
    """Fills the states of batches, from a cache where there is one.

    Args:
        target: in evaluation mode. Effects: its parameters ask for no gradient any more.
        layers: whose states the drafter reads, as indices into ``output_hidden_states``; may be empty.
        cache: a directory for the states of every text seen, in bfloat16; None: they are computed each time. It holds
            what its texts say, in another form: treat it as the texts.

    Raises:
        UnsupportedError: the target's logits are not its ``lm_head`` on the last states.
    """

    def __init__(self, target: PreTrainedModel, layers: Sequence[int], *, cache: Path | None = None) -> None:
        self.target, self.layers = target.requires_grad_(False), tuple(layers)
        self.vocab_size = int(target.config.get_text_config().vocab_size)
        self._cap = getattr(target.config.get_text_config(), "final_logit_softcapping", None)
        self._check()
        self._folder = cache / self._fingerprint() if cache else None
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def teacher_logits(self, last: Tensor) -> Tensor:
        """[N, V] float32: the target's own, from its last states [N, H]."""
        head: Any = self.target.get_output_embeddings()
        logits: Tensor = head(last.to(head.weight.dtype)).float()
        return torch.tanh(logits / self._cap) * self._cap if self._cap else logits

    @torch.no_grad()
    def fill(self, batch: TrainBatch) -> TrainBatch:
        """The batch with ``states`` and ``last``; what it brings itself is kept.

        Raises:
            LoadError: the cache holds a file that cannot be read.
        """
        if batch.last is not None and (batch.states is not None or not self.layers):
            return batch
        if self._folder is None:
            return TrainBatch(batch.token_ids, batch.weights, *self._compute(batch.token_ids), batch.seed)
        lengths = [int(row.nonzero()[-1]) + 1 if bool(row.any()) else 0 for row in batch.weights]
        files = [
            self._folder / f"{blake2b(row[:length].cpu().numpy().tobytes(), digest_size=16).hexdigest()}.safetensors"
            for row, length in zip(batch.token_ids, lengths, strict=True)
        ]
        missing = [row for row, file in enumerate(files) if not file.exists()]
        if missing:
            self._store(batch.token_ids[missing], [files[i] for i in missing], [lengths[i] for i in missing])
        shape, width = batch.token_ids.shape, int(self.target.config.get_text_config().hidden_size)
        states = torch.zeros(*shape, len(self.layers) * width, device=batch.token_ids.device)
        last = torch.zeros(*shape, width, device=batch.token_ids.device)
        for row, (file, length) in enumerate(zip(files, lengths, strict=True)):
            try:
                kept = load_file(file)
            except (OSError, SafetensorError) as error:
                raise LoadError(
                    f"cannot read the cached states {file}: {error}; delete it to compute them anew"
                ) from error
            states[row, :length], last[row, :length] = kept["states"], kept["last"]
        return TrainBatch(batch.token_ids, batch.weights, states if self.layers else None, last, batch.seed)

    def _compute(self, token_ids: Tensor) -> tuple[Tensor | None, Tensor]:
        """States and last states; padding stands on the right, where causal attention cannot see it."""
        out: Any = self.target(input_ids=token_ids, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        states = torch.cat([out.hidden_states[layer] for layer in self.layers], dim=-1) if self.layers else None
        return states, out.hidden_states[-1]

    def _store(self, token_ids: Tensor, files: Sequence[Path], lengths: Sequence[int]) -> None:
        states, last = self._compute(token_ids)
        for row, (file, length) in enumerate(zip(files, lengths, strict=True)):
            own = {"last": last[row, :length].bfloat16().contiguous().cpu()}
            if states is not None:
                own["states"] = states[row, :length].bfloat16().contiguous().cpu()
            else:
                own["states"] = torch.zeros(length, 0)
            draft = file.with_suffix(f".{os.getpid()}.tmp")  # several processes may compute the same text
            save_file(own, draft)
            draft.replace(file)

    @torch.no_grad()
    def _check(self) -> None:
        ids = torch.arange(2, 18, device=self.target.device)[None] % self.vocab_size
        out: Any = self.target(input_ids=ids, output_hidden_states=True, use_cache=False)
        rebuilt, true = self.teacher_logits(out.hidden_states[-1][0]), out.logits[0].float()
        if rebuilt.shape != true.shape or not torch.allclose(
            rebuilt, true, rtol=_CLOSE, atol=_CLOSE * float(true.abs().max())
        ):
            raise UnsupportedError(
                f"{type(self.target).__name__} makes its logits from its last states in a way unknown to training"
            )

    def _fingerprint(self) -> str:
        """Of the weights and the layers: states of another target must never be taken for this one's."""
        digest = blake2b(repr((self.layers, type(self.target).__name__)).encode(), digest_size=12)
        for name, weight in self.target.state_dict().items():
            digest.update(name.encode())
            digest.update(weight.float().double().sum().cpu().numpy().tobytes())
        return digest.hexdigest()
