"""Each cause of a low acceptance length is made on purpose and must be named; a good drafter has none."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from specdec.cli import app
from specdec.doctor import DrafterReport, examine_drafter
from specdec.doctor.drafting import _texts, quantisation_of
from specdec.drafters.eagle_files import read_files
from specdec.drafters.eagle_probe import Lesson
from specdec.errors import ConfigError
from tests.drafters.eagle_checkpoints import VOCAB_SIZE, eagle_target, write
from tests.drafters.eagle_training import edit_config, edit_weights, train
from tests.drafters.mtp_checkpoints import load_target
from tests.drafters.mtp_checkpoints import write as write_mtp
from tests.tiny_models import byte_tokenizer, tiny_llama

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}<|assistant|>"


def words(template: str | None = None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def target() -> Any:
    return eagle_target()


def trained(target: Any, path: Path, form: str, *, has_contrast: bool) -> Path:
    """A head that was trained on one form of the probe's text, and says rightly how it is to be read."""
    config = read_files(write("specforge", path)).head_config(target.config)
    wrong = (
        replace(config, hidden_layers=(3, 5, 6)),
        replace(config, norm_before_residual=True),
        replace(config, rope={**config.rope, "rope_theta": 10.0}),
    )
    lesson = Lesson.of(target, _texts(words(TEMPLATE))[form][:200])
    return train(path, target, config, lesson, wrong=wrong if has_contrast else (), steps=300)


@pytest.fixture(scope="module")
def good(target: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(target, tmp_path_factory.mktemp("heads") / "good", "plain", has_contrast=True)


@pytest.fixture
def head(good: Path, tmp_path: Path) -> Path:
    """A copy of it to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "head"))


def examine(target: Any, path: Path, template: str | None = None) -> DrafterReport:
    return examine_drafter(target, words(template), f"eagle:{path}")


def causes(report: DrafterReport) -> dict[str, str]:
    return {problem.area: problem.message for problem in report.problems if problem.severity == "warning"}


def test_a_good_head_has_no_cause(target: Any, good: Path):
    report = examine(target, good)
    assert causes(report) == {}
    assert [problem.area for problem in report.problems] == ["drafter"]
    assert report.drafter == "eagle:good"
    assert [(entry.text, entry.share > 0.8) for entry in report.agreement] == [("plain", True)]
    assert [entry.text for entry in report.acceptance] == ["plain"]
    assert all(entry.length >= 1 and entry.num_drafted for entry in report.acceptance)


def test_a_targets_own_layers_are_examined_without_a_path(tmp_path: Path):
    """MTP layers: measured on the target's text; there is no other checkpoint whose reading could be wrong."""
    own = load_target(write_mtp("glm-4.5", tmp_path / "target"))
    report = examine_drafter(own, words(), "mtp?top_k=2")
    assert report.drafter == "mtp?top_k=2"
    assert [entry.text for entry in report.acceptance] == ["plain"]
    assert all(entry.length >= 1 and entry.num_drafted for entry in report.acceptance)
    assert report.agreement == ()
    assert causes(report) == {}


def test_layers_counted_wrongly(target: Any, head: Path):
    edit_config(head, eagle_config={"eagle_aux_hidden_state_layer_ids": [2, 4, 5]})
    found = causes(examine(target, head))
    assert list(found) == ["layers"]
    assert "hidden_layers (2, 4, 5) in place of (3, 5, 6)" in found["layers"]


def test_a_norm_at_another_place(target: Any, head: Path):
    edit_config(head, norm_before_residual=True)
    found = causes(examine(target, head))
    assert list(found) == ["norm"]
    assert "norm_before_residual False in place of True" in found["norm"]


def test_another_rotary_base(target: Any, head: Path):
    edit_config(head, rope_theta=10.0)
    found = causes(examine(target, head))
    assert list(found) == ["rope"]
    assert "'rope_theta': 10000.0} in place of {'rope_type': 'default', 'rope_theta': 10.0}" in found["rope"]


def test_a_vocabulary_of_other_words(target: Any, head: Path):
    def forget(weights: dict[str, torch.Tensor]) -> None:
        kept = torch.arange(0, len(weights["d2t"]), 2)
        ids = (torch.arange(len(weights["d2t"])) + weights["d2t"])[kept]
        known = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        known[ids] = True
        weights |= {
            "d2t": ids - torch.arange(len(ids)),
            "t2d": known,
            "lm_head.weight": weights["lm_head.weight"][kept],
        }

    edit_weights(head, forget)
    edit_config(head, draft_vocab_size=60)
    found = causes(examine(target, head))
    assert list(found) == ["vocabulary"]
    assert "the draft vocabulary of 60 tokens holds" in found["vocabulary"]


@pytest.mark.slow  # a training of its own
def test_a_training_on_chats_alone(target: Any, tmp_path: Path):
    report = examine(target, trained(target, tmp_path / "chat", "chat", has_contrast=False), TEMPLATE)
    found = causes(report)
    assert "it was trained on chats" in found.pop("template")
    assert set(found) <= {"vocabulary"}  # its words were counted on the chat alone
    assert [entry.text for entry in report.acceptance] == ["plain", "chat"]


def test_another_template_than_that_of_the_training(target: Any, good: Path):
    found = causes(examine(target, good, TEMPLATE))
    assert "it was not trained with this template" in found.pop("template")
    assert set(found) <= {"vocabulary"}


def test_a_text_longer_than_those_of_the_training(target: Any, head: Path):
    edit_config(head, max_position_embeddings=160)
    found = causes(examine(target, head))
    assert list(found) == ["context"]
    assert "trained on texts of up to 160 tokens, the target takes 512" in found["context"]


class RoundedLinear(torch.nn.Module):
    """Weights of three bits and a scale per row, as weight-only quantisation keeps them."""

    def __init__(self, dense: torch.nn.Linear) -> None:
        super().__init__()
        scale = dense.weight.detach().abs().amax(1, keepdim=True) / 3
        self.register_buffer("weight", (dense.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.float() * self.scale)  # type: ignore[operator]


def test_a_quantised_target(target: Any, good: Path):
    model = copy.deepcopy(target)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(part, name, RoundedLinear(child))
    assert quantisation_of(target) is None
    assert quantisation_of(model) == "int8"
    report = examine(model, good)
    assert "the target's weights are quantised (int8)" in causes(report)["quantisation"]
    assert report.agreement[0].share < 0.5


def test_quantisation_is_told_from_the_configuration_too(target: Any):
    model = copy.copy(target)
    model.config = copy.deepcopy(target.config)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    assert quantisation_of(model) == "gptq"


def test_a_head_of_another_target_says_so(target: Any, tmp_path: Path):
    report = examine(target, write("speculators", tmp_path / "x"))
    notes = {problem.area: problem.message for problem in report.problems}
    assert "it was trained for 'target', this is 'model'" in notes["target"]


def test_draft_models_have_causes_too(target: Any, tmp_path: Path):
    same, foreign = tmp_path / "same", tmp_path / "foreign"
    target.save_pretrained(same)
    own = words("{{ messages[0]['content'] }}")
    own.save_pretrained(same)
    report = examine_drafter(target, words(TEMPLATE), f"lm:{same}")
    assert [entry.share for entry in report.agreement] == [1.0, 1.0]
    assert causes(report) == {
        "template": "the draft model's own chat template is another one: prompts look foreign to it"
    }
    tiny_llama().save_pretrained(foreign)
    other = byte_tokenizer()
    turned = {token: 255 - index if index < 256 else index for token, index in other.get_vocab().items()}
    spec = json.loads(other.backend_tokenizer.to_str())
    spec["model"]["vocab"] = turned
    other.save_pretrained(foreign)
    (foreign / "tokenizer.json").write_text(json.dumps(spec))
    report = examine_drafter(target, words(), f"lm:{foreign}")
    assert "another tokenizer" in causes(report)["vocabulary"]


def test_a_drafter_without_a_checkpoint_is_not_examined(target: Any):
    with pytest.raises(ConfigError, match=r"only drafters with a checkpoint .* got 'ngram'"):
        examine_drafter(target, words(), "ngram")
    with pytest.raises(ConfigError, match="the model has no tokenizer"):
        examine_drafter(target, None, "ngram")


def test_the_command_prints_them(target: Any, head: Path, tmp_path: Path):
    edit_config(head, norm_before_residual=True)
    model = tmp_path / "model"
    target.save_pretrained(model)
    words().save_pretrained(model)
    done = CliRunner().invoke(app, ["doctor", str(model), "--drafter", f"eagle:{head}", "--seconds", "0"])
    assert done.exit_code == 0, done.output
    for line in (
        "Drafter   eagle:head",
        "plain text: acceptance length",
        "warning: norm: the checkpoint is read better",
    ):
        assert line in done.stdout
    assert str(tmp_path) not in done.stdout.replace(str(model), "")
