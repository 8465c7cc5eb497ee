"""Checkpoints by hub name, from a cache laid out as the hub library lays it out; the network is never touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest

from specdec.build import build_engine, name_drafter
from specdec.drafters.checkpoint import PendingDrafter
from specdec.drafters.hub import checkpoint_folder, is_hub_id
from specdec.errors import LoadError
from specdec.types import Request, SamplingParams
from tests.drafters.eagle_checkpoints import eagle_target, write

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, owner: str, name: str, folder: Path, *, branch: str = "main") -> Path:
    """Put a folder into the cache as a download would: blobs, links to them by commit, and the branch's commit."""
    home = cache / f"models--{owner}--{name}"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / branch).write_text(COMMIT)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = home / "blobs" / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "hub"
    path.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(path))
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # of tests/conftest.py
    return path


@pytest.mark.parametrize("layout", ["safeailab-3", "specforge"])  # a pickle, and safetensors
def test_a_cached_checkpoint_drafts_like_its_folder(cache: Path, tmp_path: Path, layout: str):
    cached(cache, "someone", "EAGLE3-code", write(layout, tmp_path / "local"))
    target: Any = eagle_target()

    def text(name: str) -> tuple[list[int], int, int]:
        request = Request("a", np.arange(40, 60, dtype=np.int32), SamplingParams(max_new_tokens=10))
        with build_engine(target, name, budget=5) as engine:
            state = [output.state for output in engine.generate([request])][-1]
        return state.output_ids.tolist(), state.num_drafted, state.num_accepted

    assert text("eagle:someone/EAGLE3-code?probe=0") == text(f"eagle:{tmp_path / 'local'}?probe=0")


def test_a_revision_is_asked_for_by_its_name(cache: Path, tmp_path: Path):
    snapshot = cached(cache, "a", "b", write("specforge", tmp_path / "local"), branch="v2")
    named = name_drafter("eagle:a/b?revision=v2&probe=0")
    assert isinstance(named, PendingDrafter)
    assert named.source == snapshot
    assert named.options == {"probe": 0}
    with pytest.raises(
        LoadError, match=r"'eagle:a/b': there is no directory 'a/b', and the hub does not give it \(HF_HUB_OFF"
    ):
        name_drafter("eagle:a/b")  # its main branch is not in the cache
    with pytest.raises(LoadError, match="revision=v2 is for names on the hub"):
        name_drafter(f"eagle:{tmp_path / 'local'}?revision=v2")


def test_a_directory_comes_before_the_hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cached(cache, "models", "head", write("specforge", tmp_path / "other"))
    local = write("safeailab-3", tmp_path / "models" / "head")
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("models/head").resolve() == local


def test_what_is_neither_is_said_in_one_sentence(cache: Path, tmp_path: Path):
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "README.md").write_text("nothing else")
    cached(cache, "a", "half", folder)
    for name, message in (
        ("a/absent", r"^there is no directory 'a/absent', and the hub does not give it \(HF_HUB_OFFLINE is set\): "),
        ("a/half", r"^'a/half' is no checkpoint: looked for config.json, found README.md$"),
        (str(folder), "is no checkpoint: looked for config.json, found README.md$"),
        ("/no/such/folder", "cannot be a name on the hub"),
    ):
        with pytest.raises(LoadError, match=message) as caught:
            checkpoint_folder(name)
        assert "\n" not in str(caught.value)


def test_names_of_the_hub():
    assert is_hub_id("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B")
    assert not any(map(is_hub_id, ("a/b/c", "/a/b", "./a", "~/a", "a", "", "../x")))


def test_a_cut_configuration_on_the_hub_is_an_error_of_the_drafter(cache: Path, tmp_path: Path):
    folder = write("specforge", tmp_path / "local")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config)[:50])
    cached(cache, "a", "b", folder)
    with pytest.raises(LoadError, match=r"cannot read .*config\.json"):
        build_engine(eagle_target(), "eagle:a/b")
