"""Every fenced block of the README is run, and what it shows as output is compared.

- ``python``: run as a script. A ``text`` block right after it is its output.
- ``bash``: every line is run. ``console``: lines with ``$`` are run, what follows each is its output.
- In outputs ``...`` stands for anything.
- ``make`` lines are not run (this test is part of one): the target must exist. ``pip install`` lines: the extras must.
- A block below ``<!-- not run: REASON -->`` is not run, but its ``specdec`` commands and options must exist.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
import typer.main

from specdec.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^>]+?) -->\n+)?"
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```$"
    r"(?:\n+```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


class Step(NamedTuple):
    """One thing to run, and what it should print (None: anything)."""

    line: int
    language: str
    code: str
    output: str | None
    is_run: bool


def steps() -> list[Step]:
    """The README as a list of things to run."""
    found = []
    for match in BLOCK.finditer(README):
        line = README.count("\n", 0, match.start("code")) + 1
        is_run, code = match["reason"] is None, match["code"].replace("\\\n", " ")
        if match["language"] == "python":
            found.append(Step(line, "python", match["code"], match["output"], is_run))
        elif match["language"] == "bash":
            commands = [text for text in code.splitlines() if text.strip() and not text.startswith("#")]
            found += [Step(line, "bash", text, None, is_run) for text in commands]
        elif match["language"] == "console":
            for part in re.split(r"^\$ ", code, flags=re.MULTILINE)[1:]:
                command, _, output = part.partition("\n")
                found.append(Step(line, "bash", command, output or None, is_run))
    return found


STEPS = steps()


def environment(directory: Path) -> dict[str, str]:
    """Ours, with a ``specdec`` and a ``python`` on the path that are the ones under test."""
    for name, command in {"specdec": f"{sys.executable} -m specdec", "python": sys.executable}.items():
        script = directory / name
        script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        script.chmod(0o755)
    path = f"{directory}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1"}


def check_make(words: list[str]) -> None:
    """Every target of a ``make`` line exists."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    wanted = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
    assert wanted <= targets, f"the Makefile has no {wanted - targets}"


def check_extras(words: list[str]) -> None:
    """Every extra of a ``pip install`` line exists."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for named in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        assert set(named.split(",")) <= set(extras), f"pyproject.toml has no extras {named}"


def check_options(words: list[str]) -> None:
    """The command of a ``specdec`` line and its options exist."""
    command = typer.main.get_command(app)
    while (subcommands := getattr(command, "commands", None)) and len(words) > 1 and not words[1].startswith("-"):
        assert words[1] in subcommands, f"specdec has no command {words[1]!r}: there are {sorted(subcommands)}"
        command, words = subcommands[words[1]], words[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known | {"--help"}]
    assert not unknown, f"no such options: {unknown}"


def matches(expected: str, printed: str) -> bool:
    """True if the output is as shown, ``...`` standing for anything."""
    pattern = ".*".join(map(re.escape, expected.strip().split("...")))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


@pytest.mark.parametrize("step", STEPS, ids=[f"line {step.line}: {step.code.split(chr(10))[0][:60]}" for step in STEPS])
def test_readme_block_does_what_it_shows(step: Step, tmp_path: Path):
    words = shlex.split(step.code, comments=True) if step.language == "bash" else []
    first = Path(words[0]).name if words else ""
    if first == "make":
        return check_make(words)
    if first == "pip" or "pip install" in step.code:
        return check_extras(words)
    if first == "specdec":
        check_options(words)
    if not step.is_run or first in ("git", "cd", "source"):
        return None
    command = [sys.executable, "-c", step.code] if step.language == "python" else ["bash", "-ec", step.code]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    if step.output is not None:
        assert matches(step.output, done.stdout), f"the README shows\n{step.output}\nbut it printed\n{done.stdout}"
    return None


def test_output_with_dots_matches_anything_there_and_nothing_else():
    assert matches("a ... c\n", "a b\nb c\n")
    assert not matches("a ... c\n", "a b d\n")
    assert not matches("2.5x", "2x5x")


def test_numbers_of_the_readme_are_those_of_the_committed_results():
    from specdec.bench.readme_tables import PAGES, render

    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert render(text, ROOT) == text
