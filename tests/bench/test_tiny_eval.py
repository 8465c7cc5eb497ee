from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from specdec.bench.tiny_eval import copied_lines, distinct_ngrams, evaluate, generate
from specdec.errors import ConfigError

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("ids", "ratio"),
    [([1, 2, 3, 4, 5], 1.0), ([1, 2] * 8, 2 / 13), ([7] * 9, 1 / 6), ([1, 2], 1.0), ([], 1.0)],
)
def test_distinct_ngrams_counts_different_ones(ids, ratio):
    assert distinct_ngrams(ids) == pytest.approx(ratio)


def test_copied_lines_counts_reference_lines_in_order():
    assert copied_lines("a\nb\nc", "a\nb\nc") == 1.0
    assert copied_lines("a\nX\nc", "a\nb\nc") == pytest.approx(2 / 3)
    assert copied_lines("", "a\nb") == 0.0
    assert copied_lines("c\nb\na", "a\nb\nc") == pytest.approx(1 / 3)


def test_batched_generation_equals_one_prompt_at_a_time():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = Qwen3ForCausalLM(config).eval()
    prompts = [[5, 6, 7], [8] * 9, [10, 11]]
    together = generate(model, prompts, [6, 4, 5], batch=3)
    alone = [generate(model, [p], [n])[0] for p, n in zip(prompts, [6, 4, 5], strict=True)]
    assert together == alone
    assert [len(ids) for ids in together] <= [6, 4, 5]


def test_no_tasks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="tasks must be at least 1, got 0"):
        evaluate(tmp_path, tasks=0)
