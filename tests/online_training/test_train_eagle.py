"""EAGLE-3 training: the unrolled pass is what drafting does, step by step, and what is exported drafts the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.drafters.eagle_files import read_files
from specdec.drafters.eagle_head import attend_causally
from specdec.drafters.eagle_loading import build_head
from specdec.online_training.data import Example, TrainBatch, collate
from specdec.online_training.features import TargetFeatures
from specdec.online_training.losses import row_losses
from specdec.online_training.train_eagle import EagleModule, EagleOptions
from specdec.online_training.train_start import new_head
from tests.drafters.eagle_checkpoints import NUM_LAYERS, VOCAB_SIZE, eagle_target

LAYERS = (0, 4, NUM_LAYERS)
STEPS = 3


def examples() -> list[Example]:
    rng = np.random.default_rng(5)
    sizes = ((14, 6), (9, 2), (5, 4))
    return [Example(rng.integers(0, 256, length).astype(np.int32), prompt) for length, prompt in sizes]


def module_of(target_ids: Tensor | None = None, target: LlamaForCausalLM | None = None, **options: bool) -> EagleModule:
    target = target or eagle_target()
    config, weights = new_head(target, layers=LAYERS, target_ids=target_ids, seed=2, **options)  # type: ignore[arg-type]
    features = TargetFeatures(target, LAYERS)
    return EagleModule(config, weights, features, target_ids=target_ids, options=EagleOptions(STEPS))


def drafted(module: EagleModule, batch: TrainBatch, row: int, place: int, steps: int) -> list[Tensor]:
    """The head's outputs [H] of so many steps from one place, one by one as a drafter makes them."""
    assert batch.states is not None
    head = module.head
    ids, states = batch.token_ids[row], head.fuse(batch.states[row, : place + 1])
    outputs: list[Tensor] = []
    for step in range(steps):
        inputs = torch.cat([states, *(head.feedback(out)[None] for out in outputs)])
        tokens = ids[1 : place + 2 + step]
        outputs.append(head.forward(tokens, inputs, torch.arange(len(tokens)), attend_causally)[-1])
    return outputs


@pytest.mark.parametrize("is_reduced", [False, True])
def test_the_loss_is_that_of_drafting_from_every_place_one_by_one(is_reduced: bool):
    target_ids = torch.arange(0, VOCAB_SIZE, 2) if is_reduced else None
    module = module_of(target_ids)
    batch = module.features.fill(collate(examples()))
    batch = TrainBatch(batch.token_ids, batch.weights * torch.rand_like(batch.weights), batch.states, batch.last)
    assert batch.last is not None
    loss, tried, accepted, starts = 0.0, torch.zeros(STEPS), 0, 0
    with torch.no_grad():
        found = module(batch)
        for row, example in enumerate(examples()):
            length = len(example.token_ids)
            for place in range(example.prompt_length - 2, length - 2):
                hits = []
                for step, output in enumerate(drafted(module, batch, row, place, min(STEPS, length - 2 - place))):
                    weight = float(batch.weights[row, place + 2 + step])
                    teacher = module.features.teacher_logits(batch.last[row, place + 1 + step][None])
                    wanted = int(teacher.argmax())
                    student = module.head.logits(output[None])
                    known = target_ids is None or wanted in target_ids.tolist()
                    if target_ids is not None:
                        teacher = teacher[:, target_ids]
                    guess = int(student.argmax())
                    hits.append(known and (guess if target_ids is None else int(target_ids[guess])) == wanted)
                    if known:
                        loss += 0.8**step * weight * float(row_losses(student, teacher, {"forward_kl": 1.0}))
                    tried[step] += weight
                if len(hits) == STEPS:
                    starts += 1
                    accepted += hits.index(False) if False in hits else STEPS
    assert float(found.loss) == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(found.tried, tried, rtol=1e-5, atol=1e-6)
    assert float(found.starts) == starts > 0
    assert float(found.accepted) == accepted


@pytest.mark.parametrize("is_normed", [False, True])
def test_what_is_exported_is_read_back_with_the_same_logits(is_normed: bool, tmp_path: Path):
    ids = torch.arange(1, VOCAB_SIZE, 2)
    module = module_of(ids, norm_before_residual=is_normed)
    rounded = {name: weight.detach().bfloat16().float() for name, weight in module.named_parameters()}
    module.load_state_dict(rounded)
    module.export(rounded, tmp_path / "head")
    files, target = read_files(tmp_path / "head"), module.features.target
    config = files.head_config(target.config)
    assert config.hidden_layers == LAYERS
    assert config.norm_before_residual == is_normed
    if is_normed:
        assert files.config["speculators_config"]["verifier"]["architectures"] == []
    else:
        assert files.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [layer - 1 for layer in LAYERS]
    head = build_head(files, target, config)
    token_ids, states = torch.arange(6), torch.randn(6, len(LAYERS) * config.target_hidden_size)
    with torch.no_grad():
        logits = [
            one.target_logits(one.forward(token_ids, one.fuse(states), torch.arange(6), attend_causally), VOCAB_SIZE)
            for one in (head, module.head)
        ]
    assert torch.equal(*logits)


def test_padding_and_prompts_change_nothing():
    module = module_of()
    batch = module.features.fill(collate(examples()))
    with torch.no_grad():
        together = module(batch)
        alone = [module(module.features.fill(collate([example]))) for example in examples()]
    assert float(together.loss) == pytest.approx(sum(float(one.loss) for one in alone), rel=1e-5)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_new_head_copies_what_followed_the_newest_token_before(is_tied: bool):
    shape = LlamaConfig(
        vocab_size=257, hidden_size=128, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        head_dim=64, max_position_embeddings=256, bos_token_id=None, eos_token_id=256,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    target = LlamaForCausalLM(shape).eval()
    read = target.get_input_embeddings().weight
    turn = torch.linalg.qr(torch.randn(len(read.T), len(read.T), generator=torch.Generator().manual_seed(0)))[0]
    target.lm_head.weight.data = read.detach().clone() if is_tied else read.detach() @ turn
    module = module_of(target=target)
    pattern = np.random.default_rng(1).permutation(256)[:20].astype(np.int32)
    batch = module.features.fill(collate([Example(np.tile(pattern, 3), 21)]))
    assert batch.states is not None
    with torch.no_grad():
        places = range(25, 50)
        outputs = [drafted(module, batch, 0, place, 1)[0] for place in places]
        said = module.head.logits(torch.stack(outputs)).argmax(-1)
    assert said.tolist() == [int(batch.token_ids[0, place + 2]) for place in places]
