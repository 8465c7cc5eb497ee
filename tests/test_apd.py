"""Adaptive Parallel Decoding: what it promises, which is not the text; self-speculation promises just that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from specdec.apd import ApdDecoder, match_probability
from specdec.cli import app
from specdec.drafters.masked_lm import MaskedLm, load_masked_lm
from specdec.errors import ConfigError, RequestError
from specdec.self_speculation import SelfSpeculation
from tests.drafters.masked_models import MASK_ID, write_masked_llama
from tests.tiny_models import save_tiny_llama, tiny_llama

PROMPT = [10, 20, 30, 40, 50]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masked_llama(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module", params=[False, True])
def target(path: Path, request: pytest.FixtureRequest) -> MaskedLm:
    return load_masked_lm(
        path, device=torch.device("cpu"), dtype=torch.float32, probe_ids=None, shift=int(request.param), trust=1
    )


def constant(model: Any, logits: torch.Tensor) -> Any:
    """The model with the same law everywhere, but for a trace of its input."""
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e-6)
        model.model.embed_tokens.weight[:, 0] += 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-6)
            layer.mlp.down_proj.weight.mul_(1e-6)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        width = model.config.hidden_size
        model.lm_head.weight[: len(logits), 0] = logits / width**0.5
        model.lm_head.weight[len(logits) :, 0] = -100.0
        model.lm_head.weight[:, 1] = 1e-3 * torch.randn(len(model.lm_head.weight))
    return model


def two_laws(path: Path, *, are_equal: bool) -> tuple[MaskedLm, LlamaForCausalLM, list[torch.Tensor]]:
    lm = load_masked_lm(path, device=torch.device("cpu"), dtype=torch.float32, probe_ids=None, shift=0, trust=1)
    torch.manual_seed(5)
    wide, narrow = 1.5 * torch.randn(8), 1.5 * torch.randn(8)
    laws = [wide, wide if are_equal else narrow]
    constant(lm.model, laws[0])
    return lm, constant(LlamaForCausalLM(tiny_llama().config).eval(), laws[1]), [law.softmax(0) for law in laws]


def test_with_one_token_per_step_and_no_window_it_is_plain_denoising(target: MaskedLm) -> None:
    done = ApdDecoder(target, None, tokens_per_step=1).generate(PROMPT, 12)
    text = list(PROMPT)
    while len(text) < len(PROMPT) + 12:
        masks = [MASK_ID] * (len(PROMPT) + 12 - len(text))
        with torch.no_grad():
            logits = target.model(torch.tensor([text + masks])).logits[0, len(text) - target.is_shifted]
        logits[MASK_ID] = -torch.inf
        text.append(int(logits.argmax()))
    assert done.token_ids == text[len(PROMPT) :]
    assert done.kept == [1] * 12
    assert done.lossless is False
    assert ApdDecoder.lossless is False


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_at_ratio_one_everything_is_accepted(target: MaskedLm, temperature: float) -> None:
    done = ApdDecoder(target, tiny_llama(), ratio=1.0, lookahead=4, temperature=temperature).generate(PROMPT, 12)
    assert done.kept == [4, 4, 4]
    less = ApdDecoder(target, tiny_llama(), ratio=0.0, lookahead=4, temperature=temperature).generate(PROMPT, 12)
    assert min(less.kept) == 1


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_equal_models_accept_everything_at_any_ratio(path: Path, ratio: float, temperature: float) -> None:
    lm, small, _ = two_laws(path, are_equal=True)
    done = ApdDecoder(lm, small, ratio=ratio, lookahead=5, temperature=temperature, seed=3).generate(PROMPT, 20)
    assert done.kept == [5, 5, 5, 5]


def test_tokens_match_as_often_as_the_formula_says(path: Path) -> None:
    lm, small, (p, q) = two_laws(path, are_equal=False)
    ratio, num_steps, matched = 0.4, 0, 0
    for seed in range(25):
        kept = ApdDecoder(lm, small, ratio=ratio, lookahead=2, temperature=1.0, seed=seed).generate(PROMPT, 40).kept
        num_steps, matched = num_steps + len(kept[:-1]), matched + sum(count == 2 for count in kept[:-1])
    mixture = (ratio * p.log() + (1 - ratio) * q.log()).softmax(0)
    expected = float(match_probability(p[None], mixture[None]))
    error = (expected * (1 - expected) / num_steps) ** 0.5
    assert 0.2 < expected < 0.9
    assert abs(matched / num_steps - expected) < 3.5 * error


def test_the_formula_counts_shared_draws() -> None:
    p, q = torch.tensor([[0.7, 0.3]]), torch.tensor([[0.5, 0.5]])
    # For two tokens the same draw fails only between the two thresholds of log-odds.
    assert float(match_probability(p, q)) == pytest.approx(1 / (1 + 1.0) + 1 / (1 + 7 / 3))
    assert float(match_probability(p, p)) == pytest.approx(1.0)
    assert float(match_probability(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))) == 0.0


def test_a_window_over_everything_is_no_window_and_a_small_one_reads_less(target: MaskedLm) -> None:
    whole = ApdDecoder(target, tiny_llama(), lookahead=4).generate(PROMPT, 16)
    wide = ApdDecoder(target, tiny_llama(), lookahead=4, window=100).generate(PROMPT, 16)
    assert wide == whole
    rows = []
    forward = target.forward
    try:
        target.forward = lambda ids, **given: rows.append(ids.shape[1]) or forward(ids, **given)  # type: ignore
        small = ApdDecoder(target, tiny_llama(), lookahead=4, window=2).generate(PROMPT, 16)
    finally:
        del target.forward  # type: ignore[misc]
    assert len(small.token_ids) == 16
    assert rows[0] == len(PROMPT) + 4
    newest = small.kept[:-1]
    assert all(size <= 2 + kept + 4 for size, kept in zip(rows[1:], newest, strict=True))


def test_it_ends_at_a_stop_token_and_refuses_what_makes_no_sense(target: MaskedLm) -> None:
    free = ApdDecoder(target, tiny_llama()).generate(PROMPT, 20)
    stop = free.token_ids[3]
    ended = ApdDecoder(target, tiny_llama(), stop_ids=[stop]).generate(PROMPT, 20)
    first = free.token_ids.index(stop)
    assert ended.token_ids == free.token_ids[: first + 1]
    for options, message in (
        ({"ratio": 1.5}, r"ratio must be in \[0, 1\], got 1.5"),
        ({"window": 0}, "window must be >= 1, got 0"),
        ({"lookahead": 0}, "lookahead must be >= 1, got 0"),
        ({"temperature": -1.0}, "temperature must be >= 0, got -1"),
        ({"tokens_per_step": 2}, "give one of the two"),
    ):
        with pytest.raises(ConfigError, match=message):
            ApdDecoder(target, tiny_llama(), **options)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="a prompt of one or more tokens"):
        ApdDecoder(target, tiny_llama()).generate([], 4)


@pytest.mark.parametrize("block", [4, 12])
@pytest.mark.parametrize("length", [1, 3, 8])
def test_self_speculation_writes_what_stepwise_decoding_writes(target: MaskedLm, length: int, block: int) -> None:
    stepwise = SelfSpeculation(target, length=0, block=block).generate(PROMPT, 12)
    assert stepwise.num_passes == 12
    text = list(PROMPT)
    while len(text) < len(PROMPT) + 12:
        first, ids = len(text), torch.tensor(text + [MASK_ID] * block)
        for _ in range(block):
            with torch.no_grad():
                logits = target.model(ids[None]).logits[0]
            logits[:, MASK_ID] = -torch.inf
            best = logits.softmax(-1).max(-1)
            open_ = [place for place in range(first, first + block) if ids[place] == MASK_ID]
            place = max(open_, key=lambda place: float(best.values[place - target.is_shifted]))
            ids[place] = best.indices[place - target.is_shifted]
        text = ids.tolist()
    assert stepwise.token_ids == text[len(PROMPT) :]
    faster = SelfSpeculation(target, length=length, block=block).generate(PROMPT, 12)
    assert faster.token_ids == stepwise.token_ids
    assert faster.num_passes < 12
    assert faster.lossless is True


def test_the_command_says_what_is_lossy(path: Path, tmp_path: Path) -> None:
    small = save_tiny_llama(tmp_path / "small")

    def said(*more: str) -> Any:
        given = ["apd", "--target", str(path), "--trust", "--prompt", "def f", "-n", "8", *more]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 0, result.exception
        return result

    lossy = json.loads(said("--json", "--small", str(small)).stdout)
    assert lossy["is_lossless"] is False
    assert lossy["num_output_tokens"] == len(lossy["token_ids"]) <= 8
    assert json.loads(said("--json", "--self-speculation", "3").stdout)["is_lossless"] is True
    assert "LOSSY: follows neither model's law" in said("--small", str(small)).stderr
