from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import T5Config

from specdec.commands.loading import load_model
from specdec.errors import ConfigError, LoadError, UnsupportedError
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


def test_a_directory_gives_model_tokenizer_and_end_marks(model_dir: Path):
    loaded = load_model(str(model_dir))
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.tokenizer is not None
    assert loaded.eos_ids == (256,)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_dtype_is_what_was_asked_for(model_dir: Path, name: str):
    assert load_model(str(model_dir), dtype=name).model.dtype == getattr(torch, name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/place", "there is no directory '/no/such/place'"),
        ("./nor/here", "there is no directory './nor/here'"),
        ("nobody/nothing", "there is no directory 'nobody/nothing' either"),
    ],
)
def test_wrong_path_says_what_was_looked_for(name: str, message: str):
    with pytest.raises(LoadError, match=message):
        load_model(name)


def test_directory_without_a_model_says_what_it_holds(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(LoadError, match=r"looked for config\.json, found notes\.txt"):
        load_model(str(tmp_path))


def test_file_in_place_of_a_directory_is_refused(model_dir: Path):
    with pytest.raises(LoadError, match=r"a model is a directory with a config\.json, got the file"):
        load_model(str(model_dir / "config.json"))


def test_model_without_tokenizer_is_refused_unless_none_is_needed(tmp_path: Path):
    save_tiny_llama(tmp_path, has_tokenizer=False)
    with pytest.raises(LoadError, match=r"no usable tokenizer: looked for tokenizer\.json"):
        load_model(str(tmp_path))
    assert load_model(str(tmp_path), needs_tokenizer=False).tokenizer is None


def test_damaged_weights_and_configuration_are_named(tmp_path: Path):
    save_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(LoadError, match="cannot load the weights of"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(LoadError, match=r"cannot load the config\.json of .*nonsense"):
        load_model(str(tmp_path))


def test_encoder_decoder_model_is_refused(tmp_path: Path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="is an encoder-decoder model"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be auto, float32, bfloat16 or float16, got 'int8'"),
        ({"device": "quantum"}, "device must be auto, cpu, cuda or cuda:N, got 'quantum'"),
    ],
)
def test_wrong_option_names_value_and_rule(model_dir: Path, options: dict[str, str], message: str):
    with pytest.raises(ConfigError, match=message):
        load_model(str(model_dir), **options)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_missing_gpu_is_said_not_replaced(model_dir: Path):
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        load_model(str(model_dir), device="cuda")
