"""``docs/help.md`` is what ``--help`` says. ``make docs`` writes it; here it is compared."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from specdec.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "help.md"
HEAD = "# The `specdec` command\n\nWritten by `make docs` from the commands' own `--help`; a test keeps it true.\n"


def command_names() -> list[str]:
    """All commands, in the order in which ``--help`` lists them."""
    return list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def help_page() -> str:
    """The page as it should be: plain text, a fixed width, no colours."""
    style, app.rich_markup_mode = app.rich_markup_mode, None
    try:
        parts = [HEAD]
        for name in (None, *command_names()):
            words = [name] if name else []
            done = CliRunner().invoke(app, [*words, "--help"], prog_name="specdec", terminal_width=100)
            assert done.exit_code == 0, done.output
            title = " ".join(["specdec", *words])
            parts.append(f"## `{title}`\n\n```text\n{done.output.rstrip()}\n```\n")
    finally:
        app.rich_markup_mode = style
    return "\n".join(re.sub(r"[ \t]+$", "", part, flags=re.MULTILINE) for part in parts)


def test_help_page_is_what_the_commands_say():
    pinned = re.search(r"^typer==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    if version("typer") != pinned[1]:
        pytest.skip(f"the layout of --help belongs to typer {pinned[1]}, this is {version('typer')}")
    assert PAGE.read_text(encoding="utf-8") == help_page(), "docs/help.md is stale: run `make docs`"


@pytest.mark.parametrize("command", [None, *command_names()])
def test_help_loads_nothing_heavy(command: str | None):
    code = f"""
import sys
from specdec.cli import app
try:
    app({[*([command] if command else []), "--help"]!r})
except SystemExit as end:
    assert not end.code
print("loaded:", *(name for name in ("torch", "numba", "transformers", "fastapi") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(help_page(), encoding="utf-8")
