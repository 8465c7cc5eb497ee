from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import specdec
from specdec import cli
from specdec.errors import ConfigError, InternalError, LoadError

ROOT = Path(cli.__file__).resolve().parent.parent


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch):
    """A command line whose only command raises what it is given."""

    def install(error: BaseException) -> None:
        broken = typer.Typer()

        @broken.command()
        def command() -> None:
            raise error

        monkeypatch.setattr(cli, "app", broken)
        monkeypatch.setattr(sys, "argv", ["specdec"])

    return install


def test_version_is_the_packages():
    done = CliRunner().invoke(cli.app, ["--version"])
    assert done.stdout == f"specdec {specdec.__version__}\n"


def test_no_command_shows_the_help():
    assert "Usage" in CliRunner().invoke(cli.app, []).output


@pytest.mark.parametrize(
    "error", [ConfigError("budget must be >= 0,\n got -1"), LoadError("budget must be >= 0, got -1")]
)
def test_errors_on_purpose_are_one_line_on_stderr_and_status_2(raising, error: Exception, capsys):
    raising(error)
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    printed = capsys.readouterr()
    assert (exit_info.value.code, printed.out) == (2, "")
    assert printed.err == "error: budget must be >= 0, got -1\n"


def test_error_text_is_never_read_as_markup(raising, capsys):
    raising(ConfigError("kind must be [red] or [/blue], got '[bold]'"))
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "error: kind must be [red] or [/blue], got '[bold]'\n"


def test_our_own_bugs_keep_their_traceback(raising):
    raising(InternalError("slot 3 was freed twice"))
    with pytest.raises(InternalError, match="slot 3"):
        cli.main()


def test_interrupt_ends_with_the_status_that_shells_know(raising):
    raising(KeyboardInterrupt())
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 130


def test_unknown_command_is_named():
    done = CliRunner().invoke(cli.app, ["fly"])
    assert done.exit_code == 2
    assert "fly" in done.output


def specdec_completes(what: str, **variables: str) -> str:
    """What the shell gets when it asks the command itself."""
    env = os.environ | {"_SPECDEC_COMPLETE": what} | variables
    done = subprocess.run(
        [sys.executable, "-m", "specdec"], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_can_be_taught_to_complete(shell: str):
    assert "_SPECDEC_COMPLETE=complete_" in specdec_completes(f"source_{shell}")


def test_options_complete():
    assert specdec_completes("complete_bash", COMP_WORDS="specdec --ver", COMP_CWORD="1").split() == ["--version"]
