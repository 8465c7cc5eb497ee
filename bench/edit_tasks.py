"""Code-edit tasks made from real Python source: prompt = instruction + file, answer = the edited file.

Training data, the demo, the benchmarks and the tests all draw from here. Files are split by a hash of their
path, so what is held out never depends on the order of a directory listing. Pure Python, no torch; every random
choice comes from a ``random.Random`` that the caller seeds. The edits themselves live in ``edit_kinds``.
"""

from __future__ import annotations

import ast
import os
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from specdec.bench.edit_kinds import EDITS, MakeEdit
from specdec.errors import ConfigError, LoadError

__all__ = [
    "EDIT_KINDS",
    "EditTask",
    "SourceFile",
    "heldout_files",
    "heldout_snippets",
    "heldout_tasks",
    "is_heldout",
    "make_task",
    "snippets",
    "source_files",
    "stdlib_root",
]

EDIT_KINDS: tuple[str, ...] = tuple(EDITS)
HELDOUT_ONE_IN = 20  # 5 % of the files: enough for a few hundred tasks, and little training data lost
_EXCLUDED_DIRS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "lib2to3"})
_MAX_LINE = 160  # characters; longer lines are tables and blobs, not code that anyone edits by hand
_TRIES = 20


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One source file: ``path`` relative to its root with forward slashes, and its text."""

    path: str
    text: str


@dataclass(frozen=True, slots=True)
class EditTask:
    """One edit: ``user`` is the message to send, ``answer`` the reply that carries it out exactly."""

    kind: str
    path: str
    instruction: str
    source: str
    target: str

    @property
    def user(self) -> str:
        """The user message: the instruction, then the file in a fence."""
        return f"{self.instruction}\n```python\n{self.source}```"

    @property
    def answer(self) -> str:
        """The reference reply: the whole edited file in a fence."""
        return f"```python\n{self.target}```"


def stdlib_root() -> Path:
    """Return the directory of the running interpreter's standard library sources."""
    return Path(sysconfig.get_path("stdlib"))


def is_heldout(path: str) -> bool:
    """Return whether the file at this relative path is kept out of training."""
    return int.from_bytes(blake2b(path.encode(), digest_size=4).digest(), "big") % HELDOUT_ONE_IN == 0


def source_files(root: Path, *, heldout: bool) -> Iterator[SourceFile]:
    """Yield the UTF-8 Python files below ``root`` of one side of the split, sorted by path.

    Raises:
        LoadError: ``root`` is not a directory.
    """
    if not root.is_dir():
        raise LoadError(f"source root must be a directory, got {root}")
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _EXCLUDED_DIRS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    for file in sorted(found):
        relative = file.relative_to(root)
        if is_heldout(relative.as_posix()) != heldout:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the standard library's tests hold deliberately broken files
        if text.strip():
            yield SourceFile(relative.as_posix(), text)


def heldout_files(root: Path | None = None) -> list[SourceFile]:
    """Return the held-out files, without test suites (not every installation ships those)."""
    files = source_files(root or stdlib_root(), heldout=True)
    return [file for file in files if not {"test", "tests", "idlelib"}.intersection(file.path.split("/"))]


def snippets(text: str, *, min_lines: int, max_lines: int) -> list[str]:
    """Return the functions and classes of a module that have a fitting length, dedented, ending in a newline."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return []
    lines = text.splitlines()
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.end_lineno is None:
            continue
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        body = lines[first : node.end_lineno]
        if min_lines <= len(body) <= max_lines and max(map(len, body)) <= _MAX_LINE:
            snippet = textwrap.dedent("\n".join(line.rstrip() for line in body)) + "\n"
            if "```" not in snippet and "\t" not in snippet and "\f" not in snippet:
                found.append(snippet)
    return found


def make_task(rng: random.Random, path: str, snippet: str, *, kinds: Sequence[str] = EDIT_KINDS) -> EditTask | None:
    """Return an edit of one snippet, or None when no kind that was tried applies to it.

    Raises:
        ConfigError: a kind is unknown.
    """
    unknown = [kind for kind in kinds if kind not in EDITS]
    if unknown or not kinds:
        raise ConfigError(f"edit kinds must be among {', '.join(EDIT_KINDS)}, got {list(kinds)}")
    for kind in rng.sample(list(kinds), len(kinds)):
        make: MakeEdit = EDITS[kind]
        made = make(rng, snippet)
        if made is not None and made[1] != snippet:
            return EditTask(kind, path, made[0], snippet, made[1])
    return None


def heldout_snippets(*, root: Path | None = None, min_lines: int = 20, max_lines: int = 120) -> list[tuple[str, str]]:
    """Return ``(path, snippet)`` for every fitting function and class of the held-out files, in path order."""
    return [
        (file.path, snippet)
        for file in heldout_files(root)
        for snippet in snippets(file.text, min_lines=min_lines, max_lines=max_lines)
    ]


def heldout_tasks(
    count: int,
    *,
    seed: int = 0,
    kinds: Sequence[str] = EDIT_KINDS,
    min_lines: int = 20,
    max_lines: int = 60,
    root: Path | None = None,
) -> list[EditTask]:
    """Return ``count`` edit tasks on held-out files, the kinds in turn; the same arguments give the same tasks.

    Args:
        count: how many, at least 1.
        seed: picks snippets and edits.
        kinds: the kinds to use, in turn, see ``EDIT_KINDS``.
        min_lines: shortest file to edit, in lines.
        max_lines: longest file to edit, in lines; 60 lines are about 700 tokens of the bundled tokenizer.
        root: where the sources are; the running interpreter's standard library when None.

    Raises:
        ConfigError: ``count`` < 1, an unknown kind, or a length range that no held-out file meets.
    """
    if count < 1:
        raise ConfigError(f"count must be at least 1, got {count}")
    pool = heldout_snippets(root=root, min_lines=min_lines, max_lines=max_lines)
    if not pool:
        raise ConfigError(f"no held-out snippet has between {min_lines} and {max_lines} lines")
    rng = random.Random(f"edit-tasks-{seed}")
    tasks: list[EditTask] = []
    for index in range(count):
        kind = kinds[index % len(kinds)]
        for _ in range(_TRIES * 10):
            task = make_task(rng, *rng.choice(pool), kinds=[kind])
            if task is not None:
                tasks.append(task)
                break
        else:
            raise ConfigError(f"no held-out snippet of {min_lines} to {max_lines} lines allows the edit {kind!r}")
    return tasks
