"""On a CUDA device: kernels against float64, graphs against eager steps, strict numerics. `make test-gpu`.

None of them has run yet: there was no device.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.bench.gpu import FULL, run_gpu_bench
from specdec.bench.gpu_kernels import attention_batch
from specdec.bench.targets import random_target
from specdec.build import build_engine
from specdec.check.hostile import HostileDrafter
from specdec.kernels.node_laws import Law, NodeLaws
from specdec.kernels.strict_products import strict_matmul, strict_mean
from specdec.kernels.tree_attention import AttentionKind, tree_attention
from specdec.kernels.tree_attention_reference import tree_attention_reference
from specdec.kernels.verify import draw_tokens
from specdec.rng import gumbel
from specdec.tree_target import TreeTarget
from specdec.types import Request, SamplingParams

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SHAPE = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rules", [{}, {"window": 300}, {"chunk": 128}, {"softcap": 20.0}])
@pytest.mark.parametrize(
    ("heads", "nodes", "context"), [((8, 2, 128), 33, 1000), ((7, 1, 64), 1, 0), ((4, 4, 256), 70, 65)]
)
def test_tree_attention_is_as_near_to_float64_as_torch(dtype, rules, heads, nodes, context):
    num_heads, num_kv, width = heads
    batch, _ = attention_batch(3, nodes, context, CUDA)
    kind = AttentionKind(scale=width**-0.5, **rules)
    query = torch.randn(3 * nodes, num_heads, width, device=CUDA).to(dtype)
    keys, values = (torch.randn(3 * (context + nodes), num_kv, width, device=CUDA).to(dtype) for _ in range(2))
    exact = tree_attention_reference(query.double(), keys.double(), values.double(), batch, kind)
    error = (tree_attention_reference(query, keys, values, batch, kind).double() - exact).abs().max()
    atol = 1e-5 if dtype == torch.float32 else 4e-3
    for is_strict in (False, True):
        got = tree_attention(query, keys, values, batch, kind, is_strict=is_strict, backend="triton")
        assert (got.double() - exact).abs().max() <= 2 * error + atol


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_strict_products_are_right_and_do_not_depend_on_the_number_of_rows(dtype):
    x, weight = (torch.randn(n, 1000, device=CUDA).to(dtype) for n in (200, 300))
    exact = x.double() @ weight.double().t()
    products, means = strict_matmul(x, weight), strict_mean(x)
    error = ((x @ weight.t()).double() - exact).abs().max()
    assert (products.double() - exact).abs().max() <= 2 * error + 1e-3
    for row in (0, 63, 64, 199):
        assert torch.equal(strict_matmul(x[row : row + 1], weight)[0], products[row])
        assert strict_mean(x[row : row + 1])[0] == means[row]


def test_drawn_tokens_have_the_bits_of_the_cpu():
    logits = torch.randn(40, 32_003, device=CUDA) * 3
    seeds, positions = np.arange(40, dtype=np.uint64) * 2**58, np.arange(40) + 2**33
    noise = gumbel(seeds, positions, 32_003, device="cpu").to(CUDA)
    laws = NodeLaws([Law(int(seed)) for seed in seeds], [1] * 40, positions, 32_003, CUDA)
    found = draw_tokens(logits, laws)
    assert torch.equal(found.long(), (logits + noise).argmax(-1))


def decode(model, drafter, requests, **options):
    texts = {request.request_id: [] for request in requests}
    with build_engine(model, drafter, max_length=512, max_batch_size=4, kv_tokens=4096, **options) as engine:
        for output in engine.generate(requests):
            texts[output.request_id] += output.new_ids
        return texts, engine.target


@pytest.mark.parametrize("numerics", ["default", "strict"])
def test_graphs_and_eager_steps_and_torch_write_the_same_text(numerics):
    """In float32, where ties are rare; strict bfloat16 is held to equality by the test below."""
    model = random_target(SHAPE, dtype="float32", device="cuda").model
    rng = np.random.default_rng(0)
    requests = [
        Request(
            str(i),
            rng.integers(3, 1000, 30 * i + 9).astype(np.int32),
            SamplingParams(max_new_tokens=40, temperature=t, seed=i),
        )
        for i, t in enumerate((0.0, 1.0, 0.7))
    ]
    plain, _ = decode(model, "none", requests, budget=0, kernels="torch")
    hostile = HostileDrafter({key: [ids] for key, ids in plain.items()}, 1000)
    for graphs in (False, True):
        drafted, target = decode(model, hostile, requests, budget=9, kernels="triton", graphs=graphs, numerics=numerics)
        assert drafted == plain
        assert isinstance(target, TreeTarget)
        assert target.runner is not None
        assert (target.runner.num_replays > 0) == graphs


def test_strict_bfloat16_differs_nowhere():
    result = run_gpu_bench(FULL, CUDA, parts=["strict"])
    assert result["errors"] == {}
    assert result["bars"]["strict, differing requests"]["figure"] == 0
