"""Models whose weights are not ordinary tensors: shared out among processes, or quantised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specdec.build import build_engine
from specdec.check import CheckOptions, check_model
from specdec.types import Request, SamplingParams
from tests.parallel_worker import requests

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "bench" / "tiny"


def save_model(folder: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=96, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=4, max_position_embeddings=256, eos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)


def decode(model, drafter, budget: int, wanted: list[Request]) -> dict[str, list[int]]:
    texts: dict[str, list[int]] = {request.request_id: [] for request in wanted}
    with build_engine(model, drafter, budget=budget, max_length=128, max_batch_size=2, kv_tokens=600) as engine:
        for output in engine.generate(wanted):
            texts[output.request_id] += output.new_ids
    return texts


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_write_the_text_of_one_process(tmp_path, dtype):
    save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
    plain = decode(model, "none", 0, requests())
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    run = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "tests.parallel_worker",
            str(tmp_path), dtype,
        ],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["num_drafted"] > 20
    if dtype == "float32":  # sums over two halves round otherwise: in bfloat16 that may turn a tie
        assert found[0]["texts"] == plain


def quantisers():
    def torchao8():
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        return TorchAoConfig(quantization.Int8WeightOnlyConfig())

    def torchao4():
        quantization = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        return TorchAoConfig(quantization.IntxWeightOnlyConfig(torch.int4))

    def quanto8():
        pytest.importorskip("optimum.quanto")
        from transformers import QuantoConfig

        return QuantoConfig(weights="int8")

    def bitsandbytes4():
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True)

    def bitsandbytes8():
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_8bit=True)

    return [torchao8, torchao4, quanto8, bitsandbytes4, bitsandbytes8]


@pytest.mark.slow
@pytest.mark.parametrize("quantiser", quantisers(), ids=lambda make: make.__name__)
def test_quantised_models_draft_without_changing_a_token(tmp_path, quantiser):
    config = quantiser()
    save_model(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).eval()
    ids = np.arange(3, 20, dtype=np.int32)
    wanted = [Request("a", ids, SamplingParams(max_new_tokens=16))]
    expected = model.generate(torch.from_numpy(ids)[None].long(), do_sample=False, max_new_tokens=16)
    assert decode(model, "ngram", 4, wanted)["a"] == expected[0, len(ids) :].tolist()
    model = AutoModelForCausalLM.from_pretrained(
        TINY, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    options = CheckOptions(
        drafters=("ngram", "random-tree"), max_new_tokens=12, num_seeds=1, num_samples=0, has_controls=False
    )
    report = check_model(model.eval(), AutoTokenizer.from_pretrained(TINY), options=options)
    assert report.is_lossless, report
    # The self-test leaves what bitsandbytes computes on a CPU to the chain path.
    assert report.path == ("chain" if "bitsandbytes" in quantiser.__name__ else "tree")
