"""The whole check: what is right passes, what is broken is called a bug, and what is rounding is called a tie."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from specdec.check import CheckOptions, CheckReport, check_drafters, check_model
from specdec.engine import Engine
from specdec.errors import ConfigError, UnsupportedError
from tests.check import broken
from tests.tiny_kinds import headless_model, hybrid_model
from tests.tiny_models import byte_tokenizer, tiny_llama

TEXTS = {"repeats": "abcabcabcab", "short": "x", "words": "the cat sat on the mat"}
QUICK = CheckOptions(max_new_tokens=16, num_seeds=1, num_samples=0, has_controls=False, batch_size=2)

GREEDY_ONLY = replace(QUICK, num_seeds=0)


def run(model: PreTrainedModel, options: CheckOptions = QUICK, **more: object) -> CheckReport:
    torch.set_num_threads(1)
    return check_model(model, byte_tokenizer(), texts=TEXTS, options=options, **more)  # type: ignore[arg-type]


def broken_run(breaking: Callable[[Engine], None], options: CheckOptions = QUICK) -> CheckReport:
    return run(tiny_llama(), options, engine_factory=broken.factory(breaking))


def test_a_sound_engine_is_found_lossless_by_all_comparisons():
    options = CheckOptions(max_new_tokens=16, num_samples=150)
    told: list[tuple[str, int, int]] = []
    report = run(tiny_llama(), options, on_progress=lambda *event: told.append(event))
    assert report.is_lossless
    assert (report.dtype, report.path) == ("float32", "tree")
    compared = {(c.setting, c.decoder, c.against) for c in report.comparisons}
    assert {
        ("greedy", "plain", "generate"),
        ("greedy", "ngram", "generate"),
        ("greedy", "random-tree", "plain"),
    } <= compared
    assert len({setting for setting, _, _ in compared}) == 3
    assert all(c.num_tokens == 16 * c.num_requests for c in report.comparisons)
    hostile = [c.acceptance_length for c in report.comparisons if c.decoder == "random-tree"]
    assert all(length is not None and length > 1.5 for length in hostile)
    assert [control.is_caught for control in report.controls] == [True, True]
    assert told[-1][1] == told[-1][2]


@pytest.mark.parametrize("breaking", [broken.accept_a_wrong_child, broken.keep_a_wrong_node])
def test_a_broken_verifier_or_cache_is_a_bug_under_greedy_decoding(breaking: Callable[[Engine], None]):
    report = broken_run(breaking, GREEDY_ONLY)
    by_decoder = {(c.decoder, c.against): c for c in report.comparisons}
    assert not report.is_lossless
    found = by_decoder["random-tree", "plain"]
    assert found.num_bugs > 0
    assert by_decoder["plain", "generate"].num_bugs == 0  # without drafts there is nothing to break
    difference = found.differences[0]
    assert difference.verdict == "bug"
    assert difference.expected.token_id != difference.got.token_id
    assert difference.top2_margin is not None
    assert difference.contested_margin is not None
    assert difference.contested_margin >= difference.top2_margin


def test_noise_keyed_by_node_instead_of_position_is_a_bug_under_sampling_only():
    report = broken_run(broken.key_noise_by_node)
    assert all(c.num_bugs == 0 for c in report.comparisons if c.setting == "greedy")
    assert any(c.num_bugs for c in report.comparisons if c.setting != "greedy" and c.decoder == "random-tree")


def test_a_law_that_is_wrong_for_every_drafter_alike_is_found_by_the_two_samples():
    options = CheckOptions(max_new_tokens=8, num_seeds=1, num_samples=300, has_controls=False)
    model = tiny_llama()
    model.lm_head.weight.data *= 20  # a random model has no preferences that a wrong temperature could sharpen
    report = run(model, options, engine_factory=broken.factory(broken.draw_from_another_law))
    assert all(c.num_bugs == 0 for c in report.comparisons)
    assert any(test.is_bug for test in report.two_samples)
    assert not report.is_lossless


def near_ties() -> LlamaForCausalLM:
    """A bfloat16 model whose two favourite tokens have nearly equal output rows."""
    model = tiny_llama().to(torch.bfloat16)
    rows = model.lm_head.weight.data
    rows[65] *= 16
    rows[66] = rows[65]
    rows[66, ::5] *= 1 + 2**-7
    rows[67], rows[68] = -rows[65], -rows[66]
    return model


def test_a_near_tie_of_bfloat16_is_a_tie_and_not_a_bug():
    report = run(near_ties(), GREEDY_ONLY, engine_factory=broken.factory(broken.round_otherwise))
    differences = [d for c in report.comparisons for d in c.differences]
    assert differences, "the rounding should have turned some tokens"
    assert all(d.verdict == "tie" and d.wide_agrees and d.wide_dtype == "float32" for d in differences)
    assert {d.got.token_id for d in differences} <= {65, 66, 67, 68}
    assert all(d.contested_margin is not None and d.contested_margin <= (d.resolution or 0) for d in differences)
    assert any(c.ties_per_1000_tokens > 0 for c in report.comparisons)
    assert report.num_bugs == 0
    assert any("copy of the model in float32" in note for note in report.notes)


def test_strict_numerics_excuse_no_difference_from_plain_decoding():
    strict = replace(GREEDY_ONLY, is_strict=True)
    report = run(near_ties(), strict, engine_factory=broken.factory(broken.round_otherwise))
    of_plain = [d for c in report.comparisons if c.against == "plain" for d in c.differences]
    assert of_plain, "the rounding should have turned some tokens"
    assert all(d.verdict == "bug" and "promise the same bits" in d.reason for d in of_plain)
    assert all(d.verdict == "tie" for c in report.comparisons if c.against == "generate" for d in c.differences)


def test_a_sound_strict_engine_makes_no_difference_even_at_near_ties():
    report = run(near_ties(), replace(GREEDY_ONLY, is_strict=True))
    assert [c.differences for c in report.comparisons if c.against == "plain" and c.differences] == []
    assert report.num_bugs == 0


def test_a_near_tie_that_also_differs_in_float32_is_a_bug():
    report = run(near_ties(), GREEDY_ONLY, engine_factory=broken.factory(broken.round_coarsely))
    differences = [d for c in report.comparisons for d in c.differences]
    assert any(d.wide_agrees is False and d.verdict == "bug" and "in float32 too" in d.reason for d in differences)
    assert report.num_bugs > 0


def test_a_hybrid_model_is_checked_on_the_chain_path():
    report = run(hybrid_model())
    assert report.path == "chain"
    assert report.is_lossless
    assert any("chain path" in note for note in report.notes)
    assert all((c.acceptance_length or 0) > 1.2 for c in report.comparisons if c.decoder == "random-tree")


def test_what_cannot_be_served_cannot_be_checked():
    with pytest.raises(UnsupportedError, match="BertModel cannot be checked"):
        run(headless_model())


def test_the_report_is_json_without_infinities():
    text = json.dumps(broken_run(broken.accept_a_wrong_child, GREEDY_ONLY).as_json(), allow_nan=False)
    report = json.loads(text)
    assert report["is_lossless"] is False
    assert report["num_bugs"] == sum(c["num_bugs"] for c in report["comparisons"])


def test_unknown_drafters_are_named():
    with pytest.raises(ConfigError, match="drafter must be one of .*random-tree.*, got 'nonsense'"):
        check_drafters(["ngram", "nonsense"])


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_new_tokens", 7), ("budget", 0), ("batch_size", 0), ("num_seeds", -1), ("num_samples", 5)],
)
def test_options_outside_their_rules_are_refused(option: str, value: int):
    with pytest.raises(ConfigError, match=f"{option} must be .*got {value}"):
        CheckOptions(**{option: value})


def test_outputs_that_leave_no_room_for_a_prompt_are_refused():
    with pytest.raises(ConfigError, match="max_new_tokens must leave room for a prompt in the context of 256"):
        run(tiny_llama(), CheckOptions(max_new_tokens=256))
