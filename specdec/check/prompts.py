"""The texts that a check continues: built-in ones of several kinds, or a user's own file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from specdec.errors import ConfigError, LoadError
from specdec.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BUILTIN_PROMPTS", "Prompt", "encode", "read_prompts"]

_SEPARATOR: Final = "---"


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A named text as token ids [P] int32, P >= 1."""

    name: str
    token_ids: IntArray


# Of different lengths, so that a batch of them is ragged; some repeat themselves, so that retrieval has something to
# find, and some do not.
BUILTIN_PROMPTS: Final[dict[str, str]] = {
    "code edit": (
        "def area(width, height):\n    return width * height\n\n\n"
        "def perimeter(width, height):\n    return 2 * (width + height)\n\n\n"
        "# The same two functions with `width` renamed to `w` and `height` renamed to `h`:\n"
        "def area(w, h):\n    return w * h\n\n\ndef perimeter("
    ),
    "code": (
        "import argparse\n\n\ndef main() -> None:\n    parser = argparse.ArgumentParser()\n    parser.add_argument("
    ),
    "class": (
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
        "        self.items.append(item)\n\n    def pop(self):\n"
    ),
    "prose": (
        "The harbour was quiet that morning. Two boats had come in before dawn, and their crews were asleep in the "
        "shade of the fish market, so nobody saw the third one until it"
    ),
    "list": "Things to pack for a week in the mountains:\n- a warm jacket\n- a pair of boots\n- a map\n- a",
    "table": "name,year,grams\nanna,1990,120\nbruno,1991,135\nclara,1992,118\ndavid,1993,",
    "json": '[{"id": 1, "name": "bolt", "count": 40}, {"id": 2, "name": "nut", "count": 38}, {"id": 3, "name": "',
    "question": "Question: Why is the sky blue during the day and red in the evening?\nAnswer:",
    "numbers": "1, 1, 2, 3, 5, 8, 13, 21, 34,",
    "german": "Am Anfang war das Haus leer, doch am Abend kamen die Kinder, und am Morgen",
    "one word": "The",
}


def read_prompts(path: str | Path) -> dict[str, str]:
    """Name -> text of the prompts in a file.

    Args:
        path: ``.jsonl``: one JSON string, or one object with the key ``prompt``, per line. Any other file is text, and
            lines of three dashes separate its prompts.

    Raises:
        LoadError: the file cannot be read.
        ConfigError: a line is not what it must be, or there is no prompt.
    """
    file = Path(path)
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"cannot read the prompts in {str(path)!r}: {error}") from error
    texts = _from_json_lines(file, content) if file.suffix == ".jsonl" else _from_text(content)
    found = {name: text for name, text in texts.items() if text.strip()}
    if not found:
        raise ConfigError(f"a file of prompts must hold at least one, got {str(path)!r} with none")
    return found


def _from_text(content: str) -> dict[str, str]:
    pieces: list[list[str]] = [[]]
    for line in content.splitlines(keepends=True):
        if line.strip() == _SEPARATOR:
            pieces.append([])
        else:
            pieces[-1].append(line)
    return {f"prompt {number}": "".join(lines).rstrip("\n") for number, lines in enumerate(pieces, start=1)}


def _from_json_lines(file: Path, content: str) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file} line {number} must be JSON: {error}") from None
        text = entry.get("prompt") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise ConfigError(f'{file} line {number} must be a string or an object with a string "prompt"')
        texts[f"line {number}"] = text
    return texts


def encode(
    texts: dict[str, str], tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, max_tokens: int
) -> tuple[Sequence[Prompt], Sequence[str]]:
    """Token ids of every text, and one note per text that had to be cut or left out.

    Args:
        texts: name -> text.
        tokenizer: the model's.
        vocab_size: tokens with a larger id cannot be given to the model.
        max_tokens: longer prompts lose their beginning, so that the output fits the context.

    Raises:
        ConfigError: no prompt is left.
    """
    prompts: list[Prompt] = []
    notes: list[str] = []
    for name, text in texts.items():
        ids = np.asarray(tokenizer(text)["input_ids"], dtype=np.int32)
        if len(ids) == 0 or int(ids.max()) >= vocab_size:
            why = "it has no tokens" if len(ids) == 0 else f"token {ids.max()} is not in the vocabulary of {vocab_size}"
            notes.append(f"prompt {name!r} is left out: {why}")
            continue
        if len(ids) > max_tokens:
            notes.append(f"prompt {name!r} is cut to its last {max_tokens} of {len(ids)} tokens to fit the context")
            ids = ids[-max_tokens:]
        prompts.append(Prompt(name, ids))
    if not prompts:
        raise ConfigError(f"at least one prompt must be usable: {'; '.join(notes)}")
    return prompts, notes
