"""``specdec drafters list|promote|rollback|pin|forget`` as typed: what they print, change and refuse."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from specdec import cli
from specdec.online_training.privacy import KeyedHash
from specdec.online_training.registry import Registry
from specdec.online_training.spool import Spool
from tests.online_training.traces import record
from tests.online_training.versions import publish

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(tmp_path / "registry")
    for depth in (1, 2, 3):
        publish(made, depth, step=10 * depth, acceptance_length=1.0 + depth)
    made.promote(1, "the first one")
    return made


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """(exit status, stdout, stderr) of ``specdec drafters ...``."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["specdec", "drafters", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def _rows(printed: str) -> dict[int, str]:
    return {int(line.split()[0]): line for line in printed.splitlines()[1:]}


def test_the_installed_command_lists_versions(registry: Registry) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "specdec", "drafters", "list", str(registry.root)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = _rows(done.stdout)
    assert rows[1].split() == ["1", "0", "10", "2.00", "current,", "pinned"]
    assert rows[3].split() == ["3", "0", "30", "4.00"]


def test_a_promoted_version_serves_and_a_rolled_back_one_never_again(registry: Registry, typed: Typed) -> None:
    code, _, said = typed("promote", registry.root, 2)
    assert (code, registry.state().current) == (0, 2)
    assert "version 2 is current" in said
    code, _, said = typed("rollback", registry.root)
    assert (code, registry.state().current) == (0, 1)
    assert "version 1 is current again" in said
    _, listed, _ = typed("list", registry.root)
    assert "not served: by hand" in _rows(listed)[2]
    code, _, said = typed("promote", registry.root, 2)
    assert (code, registry.state().current) == (2, 1)
    assert "version 2 must not be served: by hand" in said
    assert [event["what"] for event in registry.state().events] == ["promote", "promote", "rollback"]


def test_a_pinned_version_is_the_baseline_that_a_rollback_falls_back_to(registry: Registry, typed: Typed) -> None:
    typed("promote", registry.root, 2)
    code, _, said = typed("pin", registry.root, 3)
    assert (code, registry.state().pinned) == (0, 3)
    assert "version 3 is the baseline" in said
    _, listed, _ = typed("list", registry.root)
    assert _rows(listed)[3].endswith("pinned")
    assert _rows(listed)[2].endswith("current")


def test_what_cannot_be_done_is_one_line_and_changes_nothing(registry: Registry, typed: Typed, tmp_path: Path) -> None:
    before = registry.state()
    (registry.path(3) / "model.safetensors").write_bytes(b"damaged")
    for arguments, why in (
        (("promote", registry.root, 9), "cannot read version 9"),
        (("pin", registry.root, 3), "differs from its checksum"),
        (("promote", registry.root, 3), "differs from its checksum"),
        (("rollback", registry.root), "no sound version before 1"),
        (("list", tmp_path / "nowhere"), "there is no registry"),
    ):
        code, printed, said = typed(*arguments)
        assert (code, printed, said.count("\n")) == (2, "", 1), arguments
        assert why in said
    assert registry.state() == before


def test_forgetting_a_tenant_deletes_its_shards_and_marks_what_learned_from_them(tmp_path: Path, typed: Typed) -> None:
    folder = tmp_path / "spool"
    spool = Spool(folder)
    hashes = KeyedHash.of_file(folder / "key")
    spool.put([record(tenant="south")])
    spool.put([replace(record(), tenant=hashes.text("north"))])
    made = Registry(tmp_path / "registry")
    publish(made, 1)
    publish(made, 2, tenants=(hashes.text("north"),))
    made.promote(1, "the first one")
    code, _, said = typed("forget", "north", "--spool", folder, "--registry", made.root)
    assert code == 0
    assert "1 shards deleted, 1 versions marked" in said
    assert made.state().marks == {2: "it learned from a forgotten tenant"}
    assert spool.stats().num_ready == 1
