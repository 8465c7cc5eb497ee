"""Small EAGLE-3 checkpoints that know a text by heart, and changes to what a checkpoint holds or says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from specdec.drafters.eagle_files import read_files
from specdec.drafters.eagle_head import EagleConfig, attend_causally
from specdec.drafters.eagle_probe import Lesson, build_head
from tests.drafters.eagle_checkpoints import VOCAB_SIZE

__all__ = ["edit_config", "edit_weights", "train"]


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of ``model.safetensors`` in place."""
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path / "model.safetensors")


def edit_config(path: Path, **changes: Any) -> None:
    """Overwrite fields of ``config.json``."""
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def train(
    path: Path, target: Any, config: EagleConfig, lesson: Lesson, *, wrong: Sequence[EagleConfig] = (), steps: int = 400
) -> Path:
    """Train the specforge checkpoint at ``path``, read as ``config``, until it names the target's choices.

    Read as one of ``wrong`` it learns to name others: a small head that knows few words by heart would not notice.
    """
    wanted = lesson.truth
    edit_weights(path, lambda weights: weights.update(_vocabulary_of(wanted, len(weights["d2t"]))))
    files = read_files(path)
    head = build_head(files, target, config)
    names = [name for name in head.weights if name != "embed_tokens.weight"]
    weights = [head.weights[name].requires_grad_(True) for name in names]
    optimiser = torch.optim.Adam(weights, lr=5e-3)
    ids, positions = lesson.token_ids[1:].clone(), torch.arange(len(lesson.token_ids) - 1)

    def loss_of(reading: EagleConfig, truth: torch.Tensor) -> torch.Tensor:
        head.config, head._rotary = reading, build_head(files, target, reading)._rotary
        states = torch.cat([lesson.states[layer][:-1] for layer in reading.hidden_layers], -1).clone()
        outputs = head.forward(ids, head.fuse(states), positions, attend_causally)
        return torch.nn.functional.cross_entropy(head.target_logits(outputs, VOCAB_SIZE), truth)

    with torch.random.fork_rng(), torch.enable_grad():
        for step in range(steps):
            loss = loss_of(config, wanted.clone())
            if wrong:
                loss = loss + loss_of(wrong[step % len(wrong)], wanted.roll(1).clone())
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    saved = load_file(path / "model.safetensors")
    for name, weight in zip(names, weights, strict=True):
        saved[name.replace("layers.0.", "midlayer.")] = weight.detach().contiguous()
    save_file(saved, path / "model.safetensors")
    return path


def _vocabulary_of(wanted: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """A draft vocabulary that knows all wanted tokens, and others up to ``size``."""
    first = torch.unique(wanted)
    known = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    known[first] = True
    known[(~known).nonzero()[: size - len(first), 0]] = True
    return {"t2d": known, "d2t": known.nonzero()[:, 0] - torch.arange(size)}
