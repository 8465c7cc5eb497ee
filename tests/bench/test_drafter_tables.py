from __future__ import annotations

from specdec.bench.drafter_tables import (
    calibration_table,
    diffusion_lengths_table,
    diffusion_speed_table,
    draft_profile_table,
    model_drafters_table,
)


def test_speeds_stand_beside_plain_decoding_of_the_same_kind():
    shape = {"batch": 1, "text": "edits", "temperature": 0.0, "steps": 10}
    rows = [
        {"arm": "plain", "acceptance_length": 1.0, "tokens_per_cpu_second": 50.0, **shape},
        {"arm": "a", "acceptance_length": 3.0, "tokens_per_cpu_second": 75.0, **shape},
    ]
    table = model_drafters_table({"rows": rows})
    assert "| plain | 1 | 50 tokens/s |  |  |  | 1.00 |\n| a | 1 | 3.00, 1.50 x |  |  |  | 3.00 |" in table
    for row in rows:
        del row["tokens_per_cpu_second"]
    assert "| a | 1 | 3.00 |  |" in model_drafters_table({"rows": rows})
    rows.append(
        {**rows[1], "text": "free code", "acceptance_length": 1.0, "steps": 30}
    )  # 30 tokens each: 60 in 40 steps
    assert "| a | 1 | 3.00 |  | 1.00 |  | 1.50 |" in model_drafters_table({"rows": rows})


def test_a_profile_says_what_both_shares_make():
    row = {"head": "h", "dtype": "float32", "ms": 8.04, "matmuls_and_attention": 0.9}
    row["shares"] = {"matmuls": 0.8, "attention": 0.1, "norms": 0.02}
    assert "| h | float32 | 8.0 | 80% | 10% | 90% | 2% |" in draft_profile_table({"rows": [row]})


def test_heads_stand_side_by_side_with_their_difference():
    row = {"text": "code", "shape": "chain of 5", "first": 1.5, "second": 1.625, "difference": -0.125}
    result = {
        "parameters": {"first": 2_690_000, "second": 2_704_000},
        "prompts": 3,
        "new_tokens": 8,
    }
    table = diffusion_lengths_table({**result, "rows": [{**row, "interval_95": [-0.2, 0.05]}]})
    assert "| greedy | DSpark (2.69 M) | EAGLE-3 (2.70 M) |" in table
    assert "3 held-out texts of each kind, 8 new tokens each" in table
    assert "| code, chain of 5 | 1.50 | 1.62 | -0.12 (-0.20 to +0.05) |" in table


def test_reliability_stands_in_tenths_before_and_after():
    before = {"errors": [0.2, 0.125], "curves": [[(0.95, 0.5, 4)]]}
    after = {"errors": [0.02, 0.015], "curves": [[(0.55, 0.5, 4)]]}
    table = calibration_table({"calibration": {"temperatures": [2.0, 1.5], "before": before, "after": after}})
    assert "| before | 20.0% | 12.5% |\n| after | 2.0% | 1.5% |\n| temperature | 2.00 | 1.50 |" in table
    assert "| 50 to 60 % | – | 50% of 4 |" in table
    assert "| 90 to 100 % | 50% of 4 | – |" in table


def test_rules_stand_against_the_best_fixed_length():
    row = {"acceptance_length": 1.5, "drafted_per_step": 2.0, "tokens_per_second": 99.6}
    ratio = {"median": 1.01, "least": 0.99, "greatest": 1.2}
    found = {"arms": {"fixed 2": row, "ema": row}, "against_best_fixed": {"best_fixed": "fixed 2", "ema": ratio}}
    table = diffusion_speed_table({"clock": "wall", "batch": 1, "texts": {"code": found}})
    assert "| code, batch 1 | acceptance length | drafted a step | tokens/s | against fixed 2 (range) |" in table
    assert "| fixed 2 | 1.50 | 2.00 | 100 |  |\n| ema | 1.50 | 2.00 | 100 | 1.010 (0.990 to 1.200) |" in table
