"""On a CUDA device: kernels against float64, graphs against eager steps, strict numerics. `make test-gpu`.

None of them has run on a device yet: there was none. ``tests/gpu/test_smoke.py`` runs their code on a CPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specdec.bench.gpu import FULL, TINY, run_gpu_bench
from specdec.bench.gpu_kernels import attention_batch
from specdec.bench.targets import random_target
from specdec.build import build_engine
from specdec.check.hostile import HostileDrafter
from specdec.kernels.node_laws import Law, NodeLaws
from specdec.kernels.strict_products import strict_matmul, strict_mean
from specdec.kernels.tree_attention import AttentionKind, tree_attention
from specdec.kernels.tree_attention_reference import tree_attention_reference
from specdec.kernels.verify import draw_tokens
from specdec.prompt_attention import causal_attention
from specdec.rng import gumbel
from specdec.tree_target import TreeTarget
from specdec.types import Request, SamplingParams

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
DRAWN = 40, 32_003  # rows and vocabulary of drawn tokens
PRODUCTS = 200, 300, 1000  # rows, columns and inner width of strict products
GRAPHS = (False, True)
PROMPTS, NUM_NEW = (9, 39, 69), 40
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "tokens", "context"), [((8, 2, 128), 100, 0), ((7, 1, 64), 64, 1000)])
def test_flash_attention_of_a_prompt_chunk_is_as_near_to_float64_as_torch(dtype, heads, tokens, context):
    num_heads, num_kv, width = heads
    batch, _ = attention_batch(1, tokens, context, CUDA, reach=1)
    kind, num_keys = AttentionKind(scale=width**-0.5), context + tokens
    query = torch.randn(tokens, num_heads, width, device=CUDA).to(dtype)
    keys, values = (torch.randn(num_keys, num_kv, width, device=CUDA).to(dtype) for _ in range(2))
    exact = tree_attention_reference(query.double(), keys.double(), values.double(), batch, kind)
    error = (tree_attention_reference(query, keys, values, batch, kind).double() - exact).abs().max()
    got = causal_attention(query, keys, values, batch.slots[0].long(), kind.scale)
    assert (got.double() - exact).abs().max() <= 2 * error + 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_strict_products_are_right_and_do_not_depend_on_the_number_of_rows(dtype):
    x, weight = (torch.randn(n, PRODUCTS[2], device=CUDA).to(dtype) for n in PRODUCTS[:2])
    exact = x.double() @ weight.double().t()
    products, means = strict_matmul(x, weight, backend="triton"), strict_mean(x, backend="triton")
    error = ((x @ weight.t()).double() - exact).abs().max()
    assert (products.double() - exact).abs().max() <= 2 * error + 1e-3
    for row in (0, PRODUCTS[0] // 3, PRODUCTS[0] - 1):
        assert torch.equal(strict_matmul(x[row : row + 1], weight, backend="triton")[0], products[row])
        assert strict_mean(x[row : row + 1], backend="triton")[0] == means[row]


def test_drawn_tokens_have_the_bits_of_the_cpu():
    rows, vocab_size = DRAWN
    logits = torch.randn(rows, vocab_size, device=CUDA) * 3
    seeds, positions = np.arange(rows, dtype=np.uint64) * 2**58, np.arange(rows) + 2**33
    noise = gumbel(seeds, positions, vocab_size, device="cpu").to(CUDA)
    laws = NodeLaws([Law(int(seed)) for seed in seeds], [1] * rows, positions, vocab_size, CUDA)
    found = draw_tokens(logits, laws, backend="triton")
    assert torch.equal(found.long(), (logits + noise).argmax(-1))


def test_fused_processors_draw_the_tokens_of_torch_s_operations():
    rows, vocab_size = DRAWN
    logits = torch.randn(rows, vocab_size, device=CUDA) * 3
    seen = torch.rand(vocab_size, device=CUDA) < 0.1
    ids, parents = np.arange(rows) % 9, np.arange(rows) // 2 - 1
    for law in (
        Law(3, temperature=1.1, top_k=20, tail=0.1, min_p=0.01),
        Law(4, repetition=1.2, frequency=0.3, presence=0.2, seen=seen, counts=seen * 2.0, bias=seen * 0.5),
    ):
        laws = NodeLaws([law], [rows], np.arange(rows), vocab_size, CUDA, token_ids=ids, parents=parents)
        found, wanted = (draw_tokens(logits, laws, backend=backend) for backend in ("triton", "torch"))
        assert torch.equal(found, wanted)


def decode(model, drafter, requests, **options):
    texts = {request.request_id: [] for request in requests}
    with build_engine(model, drafter, max_length=512, max_batch_size=4, kv_tokens=4096, **options) as engine:
        for output in engine.generate(requests):
            texts[output.request_id] += output.new_ids
        return texts, engine.target


@pytest.mark.parametrize("numerics", ["default", "strict"])
def test_graphs_and_eager_steps_and_torch_write_the_same_text(numerics):
    """In float32, where ties are rare; strict bfloat16 is held to equality by the test below."""
    model = random_target(SHAPE, dtype="float32", device=str(CUDA)).model
    rng = np.random.default_rng(0)
    requests = [
        Request(
            str(i),
            rng.integers(3, SHAPE["vocab_size"], PROMPTS[i]).astype(np.int32),
            SamplingParams(max_new_tokens=NUM_NEW, temperature=t, seed=i),
        )
        for i, t in enumerate((0.0, 1.0, 0.7))
    ]
    plain, _ = decode(model, "none", requests, budget=0, kernels="torch")
    hostile = HostileDrafter({key: [ids] for key, ids in plain.items()}, SHAPE["vocab_size"])
    for graphs in GRAPHS:
        drafted, target = decode(model, hostile, requests, budget=9, kernels="triton", graphs=graphs, numerics=numerics)
        assert drafted == plain
        assert isinstance(target, TreeTarget)
        assert target.runner is not None
        assert (target.runner.num_replays > 0) == graphs


def test_strict_bfloat16_differs_nowhere():
    result = run_gpu_bench(FULL if CUDA.type == "cuda" else TINY, CUDA, parts=["strict"])
    assert result["errors"] == {}
    assert result["bars"]["strict, differing requests"]["figure"] == 0
