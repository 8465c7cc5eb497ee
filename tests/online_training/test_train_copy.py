"""New heads that copy before any training: what followed the same context, not only the same token, and k tokens on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.bench import tiny_eval
from specdec.errors import ConfigError
from specdec.online_training.data import Example, collate
from specdec.online_training.train_module import DraftModule
from specdec.online_training.train_setup import BlockPlan, DrafterPlan, build_module
from tests.online_training.test_train_loop import walking_target

TINY = Path(tiny_eval.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The bundled model: its first layer looks one to seven tokens back."""
    return AutoModelForCausalLM.from_pretrained(TINY, dtype="float32").eval()


def repeating_texts() -> list[Example]:
    """Three passages of 30 tokens drawn from 12, said again: a token alone hardly tells what follows."""
    rng, found = np.random.default_rng(3), []
    for _ in range(20):
        few = rng.integers(10, 4000, 12)
        passages = [few[rng.integers(0, 12, 30)] for _ in range(3)]
        found.append(Example(np.concatenate([*passages, *passages]).astype(np.int32), 98))
    return found


def agreement(module: DraftModule) -> list[float]:
    """By place: how often the head's first choice is the token of the text."""
    batch = module.features.fill(collate(repeating_texts()[:6]))
    # The text stands for the target: its states say the next token, which is what the sums compare with.
    embedding = module.features.target.get_input_embeddings().weight
    following = torch.cat([batch.token_ids[:, 1:], batch.token_ids[:, :1]], dim=1)
    assert batch.last is not None
    batch.last.copy_(50 * embedding[following])
    with torch.no_grad():
        sums = module(batch)
    return (sums.hits / sums.tried).tolist()


def test_a_new_eagle_head_copies_by_context(tiny: Any):
    module, _ = build_module(DrafterPlan("eagle3", layers=(1, 3, 5), depth=4), tiny, None, repeating_texts())
    by_token, _ = build_module(DrafterPlan("eagle3", layers=(0, 3, 5), depth=4), tiny, None, repeating_texts())
    assert min(agreement(module)) > 0.85
    assert max(agreement(by_token)) < 0.6


def dspark(**options: Any) -> DrafterPlan:
    blocks = BlockPlan(begin_as=(0, 1), rank=8, anchors=80, **options)
    return DrafterPlan("dspark", layers=(1, 5), depth=4, num_layers=2, blocks=blocks)


def test_a_new_block_head_copies_as_far_ahead_as_its_block(tiny: Any):
    copying, _ = build_module(dspark(is_copying=True), tiny, None, repeating_texts())
    plain, _ = build_module(dspark(), tiny, None, repeating_texts())
    assert min(agreement(copying)) > 0.7
    assert max(agreement(plain)[1:]) < 0.2


@pytest.mark.parametrize(("begin_as", "layers"), [((), (1,)), ((1,), (1,)), ((0, 1), (0, 1))])
def test_a_head_that_cannot_copy_is_refused(begin_as: tuple[int, ...], layers: tuple[int, ...]):
    blocks = BlockPlan(begin_as=begin_as, is_copying=True, rank=4, mask_token_id=256)
    plan = DrafterPlan("dspark", layers=layers, num_layers=len(begin_as) or 2, blocks=blocks)
    texts = [Example(np.arange(40, dtype=np.int32), 5)]
    with pytest.raises(ConfigError, match="begins as two or more layers and reads first the state that enters"):
        build_module(plan, walking_target(), None, texts)
