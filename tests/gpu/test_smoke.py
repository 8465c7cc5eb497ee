"""The code of the GPU tests at toy sizes, on a CPU in Triton's interpreter: a mistake shows before a GPU is there."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import test_gpu as suite


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(suite, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(suite, "DRAWN", (4, 101))
    monkeypatch.setattr(suite, "PRODUCTS", (5, 7, 40))
    monkeypatch.setattr(suite, "GRAPHS", (False,))
    monkeypatch.setattr(suite, "PROMPTS", (3, 6, 4))
    monkeypatch.setattr(suite, "NUM_NEW", 4)
    shape = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(suite, "SHAPE", {**suite.SHAPE, **shape, **heads})


def test_the_kernels_tests_run(fixed_order_products):
    suite.test_tree_attention_is_as_near_to_float64_as_torch(torch.float32, {"window": 9}, (2, 1, 16), 3, 12)
    suite.test_flash_attention_of_a_prompt_chunk_is_as_near_to_float64_as_torch(torch.bfloat16, (2, 1, 16), 5, 3)
    suite.test_strict_products_are_right_and_do_not_depend_on_the_number_of_rows(torch.float32)
    suite.test_drawn_tokens_have_the_bits_of_the_cpu()
    suite.test_fused_processors_draw_the_tokens_of_torch_s_operations()


@pytest.mark.slow
@pytest.mark.parametrize("numerics", ["default", "strict"])
def test_the_engine_s_tests_run(numerics, fixed_order_products):
    suite.test_graphs_and_eager_steps_and_torch_write_the_same_text(numerics)


@pytest.mark.slow
def test_the_strict_test_runs(fixed_order_products):
    suite.test_strict_bfloat16_differs_nowhere()
