"""When rounding explains a difference: literal logits, one rule at a time."""

from __future__ import annotations

import pytest
import torch

from specdec.check.rounding import ULPS, can_take, measured_rounding, resolution, tie_rule, upcast
from specdec.check.settings import GREEDY, Setting
from specdec.errors import UnsupportedError
from tests.tiny_models import tiny_llama

PREFIX = torch.tensor([1, 2, 3])
TOP_P = Setting("top-p", temperature=1.0, top_p=0.6)
TOP_K = Setting("top-k", temperature=1.0, top_k=2)


def reaches(setting: Setting, logits: list[float], token_id: int, width: float, seed: int = 0) -> bool:
    return can_take(setting, PREFIX, torch.tensor(logits), token_id, seed=seed, resolution=width)


def test_resolution_follows_the_precision_and_the_largest_logit():
    logits = torch.tensor([-20.0, 3.0, float("-inf")])
    assert resolution(logits, torch.bfloat16) == pytest.approx(ULPS[torch.bfloat16] * 2**-7 * 20)
    assert resolution(logits, torch.float32) < 1e-4 * resolution(logits, torch.bfloat16)


@pytest.mark.parametrize(("gap", "is_close"), [(0.0, True), (0.09, True), (0.11, False), (5.0, False)])
def test_greedy_tokens_are_within_reach_if_their_gap_is_below_the_resolution(gap: float, is_close: bool):
    assert reaches(GREEDY, [1.0, 7.0, 7.0 - gap], 2, 0.1) is is_close
    assert reaches(GREEDY, [1.0, 7.0, 7.0 - gap], 1, 0.1)
    assert not reaches(GREEDY, [1.0, 7.0, 7.0 - gap], 0, 0.1)


def test_a_third_token_in_between_does_not_hide_a_tie():
    assert reaches(GREEDY, [7.0, 6.99, 6.92], 2, 0.1)


def test_noise_decides_who_is_close_when_sampling():
    drawn = [int(Setting("t", 1.0).keyed_scores(PREFIX, torch.zeros(8), seed=s).argmax()) for s in range(20)]
    assert len(set(drawn)) > 3
    for seed, token_id in enumerate(drawn):
        assert reaches(Setting("t", 1.0), [0.0] * 8, token_id, 1e-3, seed)
    others = [reaches(Setting("t", 1.0), [0.0] * 8, (token_id + 1) % 8, 1e-3, s) for s, token_id in enumerate(drawn)]
    assert sum(others) <= 1  # equal logits, but the noise keeps them apart


@pytest.mark.parametrize("setting", [TOP_P, TOP_K])
def test_a_token_at_the_border_of_a_filter_is_within_reach_and_one_far_outside_is_not(setting: Setting):
    # Probabilities 0.4, 0.3001, 0.2999: the filters keep the first two, by a hair.
    logits = torch.tensor([0.4, 0.3001, 0.2999]).log()
    draws = [int((setting.keyed_scores(PREFIX, logits, seed=s)).argmax()) for s in range(200)]
    assert 2 not in draws
    # Seeds whose noise favours the last token so much that it wins as soon as it is let in.
    wide = [s for s in range(200) if int(Setting("t", 1.0).keyed_scores(PREFIX, logits, seed=s).argmax()) == 2]
    assert all(reaches(TOP_K, logits.tolist(), 2, 0.01, s) for s in wide)
    far = torch.tensor([0.4, 0.4, 0.2]).log().tolist()
    assert not any(reaches(setting, far, 2, 0.01, s) for s in wide)


@pytest.mark.parametrize(
    ("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)]
)
def test_a_copy_in_the_wider_precision_leaves_the_model_alone(dtype: torch.dtype, wide: torch.dtype):
    model = tiny_llama().to(dtype)
    copied = upcast(model)
    assert copied.dtype == wide
    assert model.dtype == dtype
    assert copied.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()


def test_there_is_nothing_wider_than_float64():
    with pytest.raises(UnsupportedError, match="no precision wider than float64"):
        upcast(tiny_llama().double())


def test_the_rule_is_stated_with_its_numbers():
    rule = tie_rule(torch.bfloat16)
    assert "4 x 0.00781" in rule
    assert "float32" in rule
    assert "anything else is a bug" in rule


def test_measured_rounding_is_twice_what_the_precision_costs_this_model():
    model = tiny_llama().to(torch.bfloat16)
    prefix = torch.arange(20)
    wide = upcast(model)
    measured = measured_rounding(model, wide, prefix)
    with torch.no_grad():
        error = (model(input_ids=prefix[None]).logits.float() - wide(input_ids=prefix[None]).logits).abs().max()
    assert measured == pytest.approx(2 * float(error))
    assert 0 < measured < 0.1
    assert measured_rounding(model, model, prefix) == 0
