"""The edits that a task can ask for: each takes a snippet and returns (instruction, edited snippet) or None.

All edits are exact text operations, so that the instruction determines the answer; none needs the code to run.
"""

from __future__ import annotations

import difflib
import keyword
import random
import re
from collections import Counter
from collections.abc import Callable

__all__ = ["EDITS", "MakeEdit"]

Edit = tuple[str, str]  # instruction, edited snippet
MakeEdit = Callable[[random.Random, str], "Edit | None"]

_WORD_LIST = (
    "active array batch block body buffer cache child chunk client code config context count current data default "
    "delay depth entry error event extra field file filter final flag format frame group handle header hint index "
    "info inner input item key kind label last left length level limit line list local lock main map mark match "
    "message method mode name new next node number object offset old option order outer output owner packet page "
    "parent part path pattern payload prefix query queue range raw record region remote reply request result right "
    "root row rule sample scope section seed shape size slot source span stack start state status step stream "
    "strict suffix table target task text timeout token total trace type unit update user value verbose weight width"
)
_WORDS = _WORD_LIST.split()
_VERBS = ("Return", "Build", "Check", "Compute", "Parse", "Read", "Write", "Update", "Find", "Load", "Store", "Create")
_DEFAULTS = ("None", "True", "False", "0", "1", "10", "''", "()", "-1", "0.5")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{2,}")
_DEF = re.compile(r"^( *)(?:async )?def ([A-Za-z_]\w*)\(", re.M)


def _new_name(rng: random.Random, taken: str) -> str:
    """Return an identifier of one or two common words that the snippet does not hold."""
    while True:
        name = "_".join(rng.sample(_WORDS, rng.choice((1, 2, 2))))
        if name not in taken and not keyword.iskeyword(name):
            return name


def _sentence(rng: random.Random) -> str:
    first, second = rng.sample(_WORDS, 2)
    return f"{rng.choice(_VERBS)} the {first} {rng.choice(('of', 'for', 'from', 'and'))} the {second}."


def _unique_lines(lines: list[str], minimum: int = 6) -> list[int]:
    """Return the indices of lines that name themselves: long enough and different from all others once stripped."""
    counts = Counter(line.strip() for line in lines)
    return [i for i, line in enumerate(lines) if len(line.strip()) >= minimum and counts[line.strip()] == 1]


def _rename(rng: random.Random, text: str) -> Edit | None:
    counts = Counter(name for name in _IDENTIFIER.findall(text) if not keyword.iskeyword(name) and name != "self")
    names = sorted(name for name, count in counts.items() if count >= 2)
    if not names:
        return None
    old, new = rng.choice(names), _new_name(rng, text)
    edited = re.sub(rf"\b{re.escape(old)}\b", new, text)
    return f"{rng.choice(('Rename', 'Rename the identifier', 'Replace'))} `{old}` with `{new}`.", edited


def _close(text: str, start: int) -> int | None:
    """Return the index of the parenthesis that closes the one opened just before ``start``."""
    depth = 1
    for index in range(start, len(text)):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return None


def _add_parameter(rng: random.Random, text: str) -> Edit | None:
    heads = list(_DEF.finditer(text))
    if not heads:
        return None
    name = rng.choice(heads).group(2)
    parameter, default = _new_name(rng, text), rng.choice(_DEFAULTS)
    pieces, position = [], 0
    for head in re.finditer(rf"(\bdef )?(?<![\w'\"]){re.escape(name)}\(", text):
        end = _close(text, head.end())
        if end is None or head.end() < position:
            return None
        arguments = text[head.end() : end]
        if "**" in arguments or arguments.rstrip().endswith(",") or "#" in arguments:
            return None
        added = f"{parameter}={default if head.group(1) else parameter}"
        pieces.append(text[position:end] + (", " if arguments.strip() else "") + added)
        position = end
    edited = "".join(pieces) + text[position:]
    return f"Add the parameter `{parameter}={default}` to `{name}` and pass it in all calls.", edited


def _remove_parameter(rng: random.Random, text: str) -> Edit | None:
    heads = [h for h in _DEF.finditer(text) if len(re.findall(rf"\b{re.escape(h.group(2))}\(", text)) == 1]
    if not heads:
        return None
    head = rng.choice(heads)
    end = _close(text, head.end())
    if end is None:
        return None
    parameters = text[head.end() : end].split(", ")
    plain = [i for i, p in enumerate(parameters) if re.fullmatch(r"[A-Za-z_]\w*(=[\w.'\"-]+)?", p) and p != "self"]
    if not plain:
        return None
    gone = rng.choice(plain)
    kept = ", ".join(p for i, p in enumerate(parameters) if i != gone)
    if kept.endswith("*"):
        return None  # a bare star needs a keyword-only parameter after it
    name = parameters[gone].split("=")[0]
    return f"Remove the parameter `{name}` from `{head.group(2)}`.", text[: head.end()] + kept + text[end:]


def _rename_parameter(rng: random.Random, text: str) -> Edit | None:
    heads = list(_DEF.finditer(text))
    if not heads:
        return None
    head = rng.choice(heads)
    end = _close(text, head.end())
    names = re.findall(r"(?:^|, ?)([A-Za-z_]\w+)", text[head.end() : end]) if end is not None else []
    names = [name for name in names if name != "self"]
    if not names:
        return None
    old, new = rng.choice(names), _new_name(rng, text)
    edited = re.sub(rf"\b{re.escape(old)}\b", new, text)
    return f"Rename the parameter `{old}` of `{head.group(2)}` to `{new}`.", edited


def _constant(rng: random.Random, text: str) -> Edit | None:
    counts = Counter(re.findall(r"(?<![\w.'\"])\d+(?![\w.'\"])|'[A-Za-z_][\w ]{2,20}'|\"[A-Za-z_][\w ]{2,20}\"", text))
    once = sorted(value for value, count in counts.items() if count == 1 and text.count(value) == 1)
    if not once:
        return None
    old = rng.choice(once)
    if old[0].isdigit():
        new = str(rng.choice((int(old) + rng.randint(1, 9), rng.randint(2, 999))))
    else:
        new = f"{old[0]}{_new_name(rng, text)}{old[0]}"
    return f"Change the constant `{old}` to `{new}`.", text.replace(old, new)


def _docstring(rng: random.Random, text: str) -> Edit | None:
    lines = text.splitlines(keepends=True)
    places = [
        (i, head)
        for i, line in enumerate(lines[:-1])
        if (head := _DEF.match(line)) and line.rstrip().endswith(":") and '"""' not in lines[i + 1]
    ]
    if not places:
        return None
    index, head = rng.choice(places)
    words = f'"""{_sentence(rng)}"""'
    lines.insert(index + 1, f"{head.group(1)}    {words}\n")
    return f"Add the docstring `{words}` to `{head.group(2)}`.", "".join(lines)


def _comment(rng: random.Random, text: str) -> Edit | None:
    lines = text.splitlines(keepends=True)
    places = _unique_lines(lines)
    if not places:
        return None
    index = rng.choice(places)
    line = lines[index]
    words = f"# {_sentence(rng)}"
    lines.insert(index, line[: len(line) - len(line.lstrip())] + words + "\n")
    return f"Add the comment `{words}` above the line `{line.strip()}`.", "".join(lines)


def _swap(rng: random.Random, text: str) -> Edit | None:
    lines = text.splitlines(keepends=True)
    unique = set(_unique_lines(lines))

    def indent(i: int) -> int:
        return len(lines[i]) - len(lines[i].lstrip())

    places = [i for i in sorted(unique) if i + 1 in unique and indent(i) == indent(i + 1)]
    if not places:
        return None
    i = rng.choice(places)
    asked = f"Swap the lines `{lines[i].strip()}` and `{lines[i + 1].strip()}`."
    lines[i], lines[i + 1] = lines[i + 1], lines[i]
    return asked, "".join(lines)


def _delete(rng: random.Random, text: str) -> Edit | None:
    lines = text.splitlines(keepends=True)
    places = [i for i in _unique_lines(lines) if i > 0]
    if not places:
        return None
    line = lines.pop(rng.choice(places))
    return f"Delete the line `{line.strip()}`.", "".join(lines)


def _change_lines(rng: random.Random, lines: list[str]) -> None:
    """Change one line in place: delete it, repeat another above it, or rename one of its words."""
    index = rng.randrange(1, len(lines))
    names = _IDENTIFIER.findall(lines[index])
    choice = rng.random()
    if choice < 0.25:
        del lines[index]
    elif choice < 0.5 or not names:
        indent = lines[index][: len(lines[index]) - len(lines[index].lstrip())].rstrip("\n")
        name, value = rng.sample(_WORDS, 2)
        added = rng.choice((f"{name} = {value}", f"# {_sentence(rng)}", f"{name}.{value}()", f"self.{name} = None"))
        lines.insert(index, f"{indent}{added}\n")
    else:
        lines[index] = re.sub(rf"\b{rng.choice(names)}\b", _new_name(rng, lines[index]), lines[index], count=1)


def _patch(rng: random.Random, text: str) -> Edit | None:
    before = text.splitlines(keepends=True)
    if len(before) < 4:
        return None
    after = list(before)
    for _ in range(rng.choice((1, 1, 2))):
        _change_lines(rng, after)
    diff = "".join(difflib.unified_diff(before, after, "a.py", "b.py", n=rng.choice((1, 2, 3))))
    return f"Apply this patch.\n```diff\n{diff}```", "".join(after)


EDITS: dict[str, MakeEdit] = {
    "rename": _rename,
    "add-parameter": _add_parameter,
    "remove-parameter": _remove_parameter,
    "rename-parameter": _rename_parameter,
    "patch": _patch,
    "docstring": _docstring,
    "comment": _comment,
    "constant": _constant,
    "swap-lines": _swap,
    "delete-line": _delete,
}
