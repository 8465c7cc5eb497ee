"""Block-diffusion heads in training: what a block may see, what its loss is, what comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specdec.build import build_engine
from specdec.drafters.block_training import attend_by_mask, attend_by_products, forward_blocks, teacher_forced
from specdec.drafters.diffusion_export import new_weights
from specdec.drafters.diffusion_head import DiffusionConfig
from specdec.errors import ConfigError
from specdec.online_training import train_blocks
from specdec.online_training.data import Example, TrainBatch, collate
from specdec.online_training.losses import confidence_losses, dpace_weights
from specdec.online_training.train_blocks import BlockModule, BlockOptions
from specdec.online_training.train_setup import BlockPlan, DrafterPlan, build_module
from specdec.types import Request, SamplingParams
from tests.online_training.test_train_loop import walking_target

RNG = np.random.default_rng(5)
TEXTS = [Example(RNG.integers(0, 250, size).astype(np.int32), prompt) for size, prompt in ((19, 4), (13, 6), (24, 11))]
MASK = 256


def plan_of(kind: str = "dspark", **options: Any) -> DrafterPlan:
    own = {"rank": 6, "mask_token_id": MASK, "anchors": 9, **options}
    return DrafterPlan(kind, layers=(0, 1), depth=4, num_layers=2, max_length=64, blocks=BlockPlan(**own))  # type: ignore[arg-type]


def module_of(kind: str = "dspark", **options: Any) -> BlockModule:
    module, _ = build_module(plan_of(kind, **options), walking_target(), None, TEXTS)
    assert isinstance(module, BlockModule)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in module.parameters():  # laws that differ between tokens, places and rows
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


@pytest.mark.filterwarnings("ignore:flex_attention called without")  # compiled on GPUs alone
@pytest.mark.parametrize(("windows", "causal"), [((0,), (False,)), ((5,), (False,)), ((3,), (True,)), ((0,), (True,))])
def test_flex_attention_and_plain_products_see_the_same(windows: tuple[int, ...], causal: tuple[bool, ...]):
    config = DiffusionConfig(
        hidden_size=32, target_hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=16, eps=1e-6, hidden_layers=(1,),
        rope={"rope_type": "default", "rope_theta": 1e4}, max_length=64, block_size=5, mask_token_id=0,
        guesses_next=True, windows=windows, causal=causal,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 2, 17, 16, generator=generator)
    anchors = torch.tensor([[1, 4, 16], [2, 9, 11]])
    query, key, value = (torch.randn(1, heads, 30, 16, generator=generator) for heads in (4, 2, 2))
    plain, masked = (
        build(config, keys, values, anchors)(0, query, key, value) for build in (attend_by_products, attend_by_mask)
    )
    assert plain.shape == (1, 30, 4, 16)
    torch.testing.assert_close(masked, plain, atol=1e-5, rtol=1e-5)


def test_a_block_sees_states_strictly_before_its_anchor_and_its_own_text_alone():
    module = module_of()
    batch = module.features.fill(collate(TEXTS))
    anchors = torch.tensor([[5, 9], [7, 8], [12, 20]])
    assert batch.states is not None

    def outputs(states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return forward_blocks(module.head, states, ids, anchors)

    plain = outputs(batch.states, batch.token_ids)
    changed, ids = batch.states.clone(), batch.token_ids.clone()
    changed[:, 9:], ids[:, 10:] = 7.0, 3
    found = outputs(changed, ids)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])
    assert not torch.allclose(found[2], plain[2])
    changed[0, 8] = 7.0
    found = outputs(changed, ids)
    assert not torch.allclose(found[0, 1], plain[0, 1])  # the token before the anchor is seen
    assert torch.equal(found[0, 0], plain[0, 0])
    assert torch.equal(found[1], plain[1])


@pytest.mark.parametrize("slot_weights", ["decay", "dpace"])
@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_the_loss_is_the_sum_over_anchors_written_out(kind: str, slot_weights: str):
    module = module_of(kind, slot_weights=slot_weights, anchors=512)
    batch = module.features.fill(collate(TEXTS))
    batch = TrainBatch(
        batch.token_ids, batch.weights * torch.rand(batch.weights.shape).add(0.5), batch.states, batch.last
    )
    with torch.no_grad():
        sums = module(batch)
    loss, weight, accepted, starts, hits = 0.0, 0.0, 0, 0, torch.zeros(4, dtype=torch.float64)
    guesses = module.config.num_guesses
    for row, text in enumerate(TEXTS):
        ids, size = batch.token_ids[row : row + 1], len(text.token_ids)
        for anchor in range(text.prompt_length, size - 1):
            states = batch.states[row : row + 1]  # type: ignore[index]
            here = torch.tensor([[anchor]])
            with torch.no_grad():
                rows = module.head.guessing_rows(forward_blocks(module.head, states, ids, here))
                laws, sure = teacher_forced(module.head, rows, ids, here)
            count = min(guesses, size - 1 - anchor)
            laws = laws[0, 0, :count].double()
            labels = ids[0, anchor + 1 : anchor + 1 + count]
            student = laws.softmax(-1)
            teacher = module.features.teacher_logits(batch.last[row, anchor : anchor + count]).double().softmax(-1)  # type: ignore[index]
            overlap = torch.minimum(student, teacher).sum(-1)
            of_label = student[torch.arange(count), labels]
            part = -of_label.log()
            if kind == "dspark":
                assert sure is not None
                chance = sure[0, 0, :count].double().sigmoid()
                part = 0.1 * part + 1.8 * (1 - overlap)
                part = part - (overlap * chance.log() + (1 - overlap) * (1 - chance).log())
            share = torch.exp(-torch.arange(count) / 4.0) if slot_weights == "decay" else dpace_weights(of_label)
            weights = batch.weights[row, anchor + 1 : anchor + 1 + count].double()
            loss += float((part * share * weights).sum())
            weight += float((share * weights).sum())
            hit = student.argmax(-1) == teacher.argmax(-1)
            hits[:count] += hit * weights
            if count == guesses:
                starts += 1
                accepted += int(hit.long().cumprod(0).sum())
    assert float(sums.loss) == pytest.approx(loss, rel=1e-5)
    assert float(sums.weight) == pytest.approx(weight, rel=1e-5)
    assert (float(sums.accepted), float(sums.starts)) == (accepted, starts)
    torch.testing.assert_close(sums.hits.double(), hits, rtol=1e-5, atol=1e-5)


def test_anchors_follow_from_the_seed_and_are_answered_tokens_before_answered_tokens():
    module = module_of(anchors=5)
    batch = collate(TEXTS, seed=3)
    anchors, weights = module._blocks(batch)
    again, _ = module._blocks(batch)
    others, _ = module._blocks(replace(batch, seed=4))
    assert torch.equal(anchors, again)
    assert not torch.equal(anchors, others)
    assert anchors.shape == (3, 5)
    for text, row, weight in zip(TEXTS, anchors.tolist(), weights, strict=True):
        assert row == sorted(set(row))
        assert text.prompt_length <= row[0] <= row[-1] < len(text.token_ids) - 1
        left = [len(text.token_ids) - 1 - anchor for anchor in row]
        assert weight.sum(-1).tolist() == [min(4, count) for count in left]
    nobody = replace(batch, weights=torch.zeros_like(batch.weights))
    sums = module(module.features.fill(nobody))
    sums.loss.backward()
    assert float(sums.loss.detach()) == float(sums.weight) == float(sums.starts) == 0


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_an_exported_head_drafts_what_the_trainer_judged(kind: str, tmp_path: Path):
    module = module_of(kind)
    module.export({name: weight.detach() for name, weight in module.named_parameters()}, tmp_path / "head")
    target = walking_target()
    again, _ = build_module(DrafterPlan(kind, init=tmp_path / "head", blocks=BlockPlan(anchors=9)), target, None, TEXTS)  # type: ignore[arg-type]
    assert isinstance(again, BlockModule)
    assert replace(again.config, max_length=64) == replace(module.config, max_length=64)
    for name, weight in again.named_parameters():
        assert torch.equal(weight, module.get_parameter(name).bfloat16().float())
    with build_engine(target, f"diffusion:{tmp_path / 'head'}?probe=0", budget=4) as engine:
        request = Request("r", TEXTS[0].token_ids, SamplingParams(max_new_tokens=30))
        last = list(engine.generate([request]))[-1].state
    text = Example(last.token_ids.astype(np.int32), last.num_prompt_tokens)
    sums = again(again.features.fill(replace(collate([text]), weights=torch.ones(1, len(text.token_ids)))))
    assert float(sums.starts) > 0
    assert last.num_drafted > 0


def test_a_head_may_begin_as_layers_of_its_target():
    target = walking_target()
    made, _ = build_module(plan_of(begin_as=(1, 0)), target, None, TEXTS)
    drawn = new_weights(made.config, vocab_size=257, inner_size=64)  # type: ignore[arg-type]
    assert "layers.0.self_attn.q_norm.weight" in drawn
    state = target.model.layers[1].state_dict()
    for name, weight in state.items():
        assert torch.equal(made.get_parameter(f"layers.0.{name}"), weight.float())
    assert not [name for name, _ in made.named_parameters() if "q_norm" in name]
    assert not made.get_parameter("fc.weight")[:, 32:].any()
    pair = made.get_parameter("markov_head.markov_w1.weight") @ made.get_parameter("markov_head.markov_w2.weight").T
    pair, text = pair.detach(), TEXTS[0].token_ids
    assert float(pair[int(text[0]), int(text[1])]) > float(pair.mean()) + 3 * float(pair.std())


def test_narrow_copies_keep_the_loudest_units_of_an_mlp():
    target = walking_target()
    mlp = target.model.layers[1].mlp
    with torch.no_grad():
        mlp.down_proj.weight[:, 5:] *= 1e-3
    made, _ = build_module(plan_of(begin_as=(1, 0), inner_size=5), target, None, TEXTS)
    for part in ("gate", "up"):
        assert torch.equal(
            made.get_parameter(f"layers.0.mlp.{part}_proj.weight"), getattr(mlp, f"{part}_proj").weight[:5]
        )
    assert torch.equal(made.get_parameter("layers.0.mlp.down_proj.weight"), mlp.down_proj.weight[:, :5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_size": 65}, "inner_size must be at most the target's 64, got 65"),
        ({"mask_token_id": 257}, "a token of the target's that no text holds, got 257"),
        ({"begin_as": (0,)}, "one layer for each of 2"),
        ({"begin_as": (0, 9)}, "begin_as must be in 0..1"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        build_module(plan_of(**options), walking_target(), None, TEXTS)


def test_options_outside_their_rules_are_refused():
    for options in ({"num_anchors": 0}, {"decay": 0.0}, {"confidence": -1.0}):
        with pytest.raises(ConfigError, match=r"num_anchors must be >= 1"):
            BlockOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="belong to dflash and dspark, not to eagle3"):
        DrafterPlan("eagle3", blocks=BlockPlan(anchors=3))
    with pytest.raises(ConfigError, match="has its shape: leave num_layers"):
        DrafterPlan("dspark", init=Path("head"), blocks=BlockPlan(begin_as=(1,)))


def test_slots_outside_the_text_weigh_nothing_under_dpace():
    probs = torch.tensor([[0.5, 0.25, 0.9]])
    counts = torch.tensor([[True, True, False]])
    found = dpace_weights(probs, counts=counts)
    torch.testing.assert_close(found[:, :2], dpace_weights(probs[:, :2]))
    assert found[0, 2] == 0


def test_confidences_learn_that_the_likeliest_tokens_agree():
    """The label is 0 or 1 by the two laws' likeliest tokens, however much of their mass overlaps."""
    modules = {name: module_of(confidence_of=name) for name in ("likeliest", "drawn")}
    asked: dict[str, torch.Tensor] = {}
    for name, module in modules.items():

        def note(logits: torch.Tensor, rates: torch.Tensor, name: str = name) -> torch.Tensor:
            asked[name] = rates
            return confidence_losses(logits, rates)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_blocks, "confidence_losses", note)
            sums = module(module.features.fill(collate(TEXTS)))
        if name == "likeliest":
            assert 0 < float(sums.hits.sum()) < float(sums.tried.sum()), "some agree and some do not"
            assert float(asked[name].sum()) == float(sums.hits.sum())
    assert set(asked["likeliest"].unique().tolist()) == {0.0, 1.0}
    assert ((asked["drawn"] > 0) & (asked["drawn"] < 1)).all()
