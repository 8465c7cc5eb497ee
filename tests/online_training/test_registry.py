"""Versions on disk: whole or not there; who is current is decided once, and what was wrong is never served again."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from specdec.errors import ConfigError, LoadError
from specdec.online_training.registry import Manifest, Registry
from tests.online_training.versions import publish


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_versions_are_numbered_and_say_where_they_come_from(registry: Registry) -> None:
    assert registry.numbers() == []
    first = publish(registry, 1)
    second = publish(registry, 2, step=40, window=("shard-1",), tenants=("abc",), acceptance_length=1.5)
    assert registry.numbers() == [first, second] == [1, 2]
    manifest = registry.check(second)
    assert (manifest.step, manifest.window, manifest.acceptance_length) == (40, ("shard-1",), 1.5)
    assert set(manifest.sha256) == {"model.safetensors"}
    for path in registry.path(second).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_failed_export_leaves_nothing(registry: Registry) -> None:
    def export(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("x")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        registry.publish(export, Manifest(version=0, parent=0, kind="lm", target="t"))
    assert list(registry.root.iterdir()) == []


def test_promotion_trial_and_rollback(registry: Registry) -> None:
    for depth in (1, 2, 3):
        publish(registry, depth)
    registry.promote(1, "first")
    assert (registry.state().current, registry.state().pinned) == (1, 1)
    registry.try_out(2, "newest")
    registry.promote(2, "better")
    assert (registry.state().current, registry.state().canary) == (2, 0)
    registry.promote(3, "by hand")
    assert registry.rollback("worse") == 2
    with pytest.raises(ConfigError, match="version 3 must not be served: worse"):
        registry.promote(3, "again")
    assert registry.rollback("worse still") == 1
    with pytest.raises(ConfigError, match="no sound version before 1"):
        registry.rollback("worst")
    assert [event["what"] for event in registry.state().events] == [
        "promote", "canary", "promote", "promote", "rollback", "rollback",
    ]  # fmt: skip


def test_a_rejected_canary_is_not_tried_again(registry: Registry) -> None:
    publish(registry, 1)
    publish(registry, 2)
    registry.promote(1, "first")
    registry.try_out(2, "newest")
    registry.end_trial("slower")
    assert registry.state().canary == 0
    with pytest.raises(ConfigError, match="must not be served: slower"):
        registry.try_out(2, "again")


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_version_is_never_made_current(registry: Registry, damage: str) -> None:
    publish(registry, 1)
    publish(registry, 2)
    registry.promote(1, "first")
    file = registry.path(2) / "model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        data[-1] ^= 1
        file.write_bytes(data[:-4] if damage == "cut" else data)
    with pytest.raises(LoadError, match="version 2"):
        registry.promote(2, "newest")
    assert registry.state().current == 1


def test_old_versions_are_deleted_but_not_those_in_use(registry: Registry) -> None:
    for depth in range(8):
        publish(registry, depth)
    registry.promote(1, "first")
    registry.promote(3, "better")
    assert registry.prune(keep=3) == [2, 4, 5]
    assert registry.numbers() == [1, 3, 6, 7, 8]
    assert publish(registry, 1) == 9


def test_what_learned_from_forgotten_text_is_marked_with_its_descendants(registry: Registry) -> None:
    publish(registry, 1)
    publish(registry, 2, tenants=("x", "y"))
    third = registry.publish(
        lambda folder: (folder.mkdir(), (folder / "w").write_text("x")),  # type: ignore[arg-type,func-returns-value]
        Manifest(version=0, parent=2, kind="lm", target="t", tenants=("y",)),
    )
    publish(registry, 4, tenants=("z",))
    assert registry.mark_tenant("x", "a tenant was forgotten") == [2, third.version]
    assert set(registry.state().marks) == {2, 3}


def test_a_missing_or_broken_state_is_said(registry: Registry) -> None:
    with pytest.raises(LoadError, match="cannot read version 7"):
        registry.check(7)
    (registry.root / "state.json").write_text("{")
    with pytest.raises(LoadError, match="cannot read the state"):
        registry.state()
