"""Diffusion checkpoints that lie about themselves are read as they were trained; those of no use are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from specdec.build import build_engine
from specdec.drafters.block_training import forward_blocks, teacher_forced
from specdec.drafters.diffusion_export import new_weights, published_form
from specdec.drafters.diffusion_files import read_diffusion_files
from specdec.drafters.diffusion_head import DiffusionConfig
from specdec.drafters.diffusion_loading import build_diffusion_head, load_diffusion
from specdec.drafters.probing import probe_ids
from specdec.errors import ConfigError, LoadError
from tests.drafters.diffusion_checkpoints import write
from tests.drafters.eagle_checkpoints import VOCAB_SIZE, eagle_target
from tests.drafters.eagle_training import edit_weights
from tests.tiny_models import byte_tokenizer


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


def change_config(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def trained_as(truth: Callable[[DiffusionConfig], DiffusionConfig], target: Any, path: Path) -> Path:
    """Train a checkpoint on the probe's text in another reading than the one that it states."""
    files = read_diffusion_files(path)
    head = build_diffusion_head(files, target, truth(files.head_config(target.config)))
    ids = torch.tensor(probe_ids(byte_tokenizer()))
    anchors = torch.arange(1, len(ids) - 1, 4)
    with torch.no_grad():
        out = target(ids[None], output_hidden_states=True)
    states = torch.cat([out.hidden_states[layer][0] for layer in head.config.hidden_layers], -1)
    wanted = out.logits[0, anchors].argmax(-1)
    names = [name for name in head.weights if name not in ("embed_tokens.weight", "lm_head.weight")]
    optimiser = torch.optim.Adam([head.weights[name].requires_grad_(True) for name in names], lr=5e-3)
    with torch.enable_grad():
        for _ in range(120):
            rows = head.guessing_rows(forward_blocks(head, states[None], ids[None], anchors[None]))
            logits, _ = teacher_forced(head, rows[:, :, :1], ids[None], anchors[None])
            loss = torch.nn.functional.cross_entropy(logits[0, :, 0], wanted)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert all(head.weights[name].grad is not None for name in names if not name.startswith("confidence"))
    plain = {"windows": (0, 0), "causal": (False, False), "is_interleaved": False, "embedding_scale": 1.0}
    sayable = replace(head.config, **plain, output_scale=1.0, softcap=0.0)
    edit_weights(path, lambda w: w.update(published_form(sayable, head.weights, vocab_size=VOCAB_SIZE)[1]))
    return path


@pytest.mark.parametrize(
    ("dialect", "lie", "told"),
    [
        ("zlab", {"hidden_layers": (1, 3, 5)}, "hidden_layers (1, 3, 5) in place of (2, 4, 6)"),
        ("deepspec-dspark", {"is_interleaved": True}, "is_interleaved True in place of False"),
        ("zlab-later", {"causal": (False, True)}, "causal (False, True) in place of (True, True)"),
        ("deepspec-rnn", {}, ""),
    ],
)
def test_a_checkpoint_is_read_as_it_was_trained(
    target: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, dialect: str, lie: dict[str, Any], told: str
) -> None:
    path = trained_as(lambda stated: replace(stated, **lie), target, write(dialect, tmp_path))
    drafter: Any = load_diffusion(path, target, byte_tokenizer(), None)
    stated = read_diffusion_files(path).head_config(target.config)
    assert drafter.head.config == replace(stated, **lie)
    assert told in caplog.text
    assert bool(caplog.records) == bool(lie)
    trusting: Any = load_diffusion(path, target, byte_tokenizer(), None, probe=0)
    assert trusting.head.config == stated


def test_a_biased_projection_and_a_prefix_are_read(target: Any, tmp_path: Path) -> None:
    plain, biased = write("zlab", tmp_path / "plain"), write("zlab", tmp_path / "biased")

    def add(weights: dict[str, Any]) -> None:
        for layer in range(2):
            for part in "qkv":
                name = f"layers.{layer}.self_attn.{part}_proj"
                weights[f"{name}.bias"] = torch.zeros(len(weights[f"{name}.weight"]))
        for name in list(weights):
            weights[f"model.{name}"] = weights.pop(name)

    edit_weights(biased, add)
    ids, anchors = torch.arange(20), torch.tensor([3, 9])
    found = []
    for path in (plain, biased):
        files = read_diffusion_files(path)
        head = build_diffusion_head(files, target, files.head_config(target.config))
        assert ("kv_proj.bias" in head.weights) == (path is biased)
        with torch.no_grad():
            found.append(forward_blocks(head, torch.ones(1, 20, 96), ids[None], anchors[None]))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"markov": "vanilla"},
        {"markov": "rnn", "has_confidence": True, "confidence_reads_markov": True},
        {"markov": "gated", "has_confidence": True},
        {"guesses_next": False},
    ],
)
def test_a_new_head_comes_back_as_it_was_written(target: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    config = DiffusionConfig(
        hidden_size=32, target_hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, eps=1e-5, hidden_layers=(0, 4),
        rope={"rope_type": "default", "rope_theta": 5e5}, max_length=99, block_size=4, mask_token_id=3,
        **{"guesses_next": True, "windows": (0, 0), "causal": (False, False), **change},
    )  # fmt: skip
    weights = new_weights(config, vocab_size=VOCAB_SIZE, inner_size=24, rank=5)
    said, published = published_form(config, weights, vocab_size=VOCAB_SIZE)
    (tmp_path / "config.json").write_text(json.dumps(said))
    save_file(published, tmp_path / "model.safetensors")
    files = read_diffusion_files(tmp_path)
    assert files.head_config(target.config) == config
    head = build_diffusion_head(files, target, config)
    assert head.weights.keys() == weights.keys()
    assert all(torch.equal(head.weights[name], weight) for name, weight in weights.items())
    with pytest.raises(ConfigError, match="are read, not written"):
        published_form(replace(config, windows=(0, 9)), weights, vocab_size=VOCAB_SIZE)


def nested(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["dflash_config"].update(changes)


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    return lambda weights: weights.update({new: weights.pop(old)})


@pytest.mark.parametrize(
    ("dialect", "config", "weights", "message"),
    [
        ("zlab", nested(target_layer_ids=[1, 3]), None, "fc reads 96 numbers, but 2 states of the target make 64"),
        ("zlab", nested(target_layer_ids=[1, 3, 7]), None, r"reads states \(2, 4, 8\), the target has 0 to 7"),
        ("zlab", nested(mask_token_id=300), None, r"mask_token_id must be in \[0, 257\), got 300"),
        ("zlab", nested(mask_token_id=None), None, "config.json does not say mask_token_id"),
        ("zlab", nested(attention_sink_bias=True), None, "attention_sink_bias=True is not covered"),
        ("zlab", lambda config: config.update(block_size=1), None, "block_size must be >= 2, got 1"),
        (
            "zlab",
            lambda config: config.update(layer_types=["linear_attention"] * 2),
            None,
            "layer_types must name full",
        ),
        ("zlab", lambda config: config.update(num_hidden_layers=3), None, "layer_types must name full or sliding"),
        ("zlab", None, renamed("fc.weight", "conv.weight"), "fc.weight missing"),
        ("zlab", None, lambda w: w.update({"selector.weight": torch.ones(2)}), "holds selector.weight, which no head"),
        ("zlab", None, lambda w: w["norm.weight"].fill_(torch.nan), "norm.weight holds a value that is not finite"),
        ("deepspec-dspark", lambda c: c.update(markov_head_type="fir"), None, "must be one of vanilla, gated, rnn"),
        ("deepspec-gated", lambda c: c.update(markov_head_type="rnn"), None, "markov_head.joint_proj.weight missing"),
        ("deepspec-dflash", lambda c: c.update(markov_rank=6), None, "markov_rank is 6, but markov_head"),
        (
            "speculators-dspark",
            lambda c: c.update(draft_vocab_size=99),
            None,
            "draft_vocab_size is 99, but lm_head has",
        ),
        ("speculators-dflash", None, lambda w: w.pop("d2t"), "has no d2t to say which"),
    ],
)
def test_a_checkpoint_of_no_use_is_refused(
    target: Any, tmp_path: Path, dialect: str, config: Any, weights: Any, message: str
) -> None:
    path = write(dialect, tmp_path)
    if config is not None:
        change_config(path, config)
    if weights is not None:
        edit_weights(path, weights)
    with pytest.raises(LoadError, match=message):
        load_diffusion(path, target, None, None)


def test_an_unknown_option_is_named(target: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wide"):
        build_engine(target, f"diffusion:{write('zlab', tmp_path)}?wide=3")
