from __future__ import annotations

from specdec.bench.drafter_tables import draft_profile_table, model_drafters_table


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
