from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest

from specdec.bench.edit_tasks import (
    EDIT_KINDS,
    heldout_files,
    heldout_tasks,
    is_heldout,
    make_task,
    snippets,
    source_files,
)
from specdec.errors import ConfigError, LoadError

SNIPPET = """def scale(self, values, factor=2, *, clip=True):
    total = 0
    for value in values:
        total += value * factor
        if clip and total > 255:
            break
    label = 'brightness'
    self.note(label)
    return total
"""


def tree_of(root: Path, count: int = 200) -> Path:
    for index in range(count):
        folder = root / f"pkg{index % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"part{index}.py").write_text(SNIPPET.replace("scale", f"scale{index}"))
    return root


def test_the_same_seed_gives_the_same_tasks_and_another_seed_others():
    assert heldout_tasks(20, seed=3) == heldout_tasks(20, seed=3)
    assert heldout_tasks(20, seed=3) != heldout_tasks(20, seed=4)


def test_heldout_files_and_training_files_never_overlap_and_cover_everything(tmp_path):
    root = tree_of(tmp_path)
    train = {file.path for file in source_files(root, heldout=False)}
    held = {file.path for file in source_files(root, heldout=True)}
    assert not train & held
    assert len(train | held) == 200
    assert 0 < len(held) < 20
    assert all(is_heldout(path) for path in held)


def test_every_task_comes_from_a_heldout_file():
    paths = {file.path for file in heldout_files()}
    assert {task.path for task in heldout_tasks(40)} <= paths


def test_excluded_and_unreadable_files_are_left_out(tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "x.py").write_text(SNIPPET)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    (tmp_path / "empty.py").write_text("\n")
    assert [*source_files(tmp_path, heldout=True), *source_files(tmp_path, heldout=False)] == []


def test_kinds_take_turns_and_one_can_be_asked_for_alone():
    assert [task.kind for task in heldout_tasks(len(EDIT_KINDS))] == list(EDIT_KINDS)
    assert [task.kind for task in heldout_tasks(2, kinds=["patch"])] == ["patch", "patch"]


def test_prompts_hold_the_whole_file_and_answers_the_whole_edited_file():
    for task in heldout_tasks(30, min_lines=20, max_lines=40):
        assert task.source in task.user
        assert task.instruction in task.user
        assert task.target in task.answer
        assert task.target != task.source
        assert 20 <= task.source.count("\n") <= 40


def test_edits_keep_most_of_the_file():
    for task in heldout_tasks(50):
        before, after = task.source.splitlines(), task.target.splitlines()
        assert abs(len(before) - len(after)) <= 2
        assert len(set(before) & set(after)) >= len(set(before)) // 3


@pytest.mark.parametrize("kind", [k for k in EDIT_KINDS if k not in ("patch", "delete-line", "swap-lines")])
def test_structured_edits_of_valid_code_give_valid_code(kind):
    for seed in range(10):
        task = make_task(random.Random(seed), "x.py", SNIPPET, kinds=[kind])
        if task is None:  # this draw would have left a bare star behind
            assert kind == "remove-parameter"
            continue
        ast.parse(task.target)


def test_rename_replaces_whole_words_everywhere():
    task = make_task(random.Random(1), "x.py", "def f(item):\n    items = item\n    return item\n", kinds=["rename"])
    assert task is not None
    new = task.instruction.split("`")[3]
    assert task.target == f"def f({new}):\n    items = {new}\n    return {new}\n"


def test_add_parameter_changes_definition_and_calls():
    source = "def walk(node, depth):\n    for child in node:\n        walk(child, (depth, 1))\n"
    task = make_task(random.Random(0), "x.py", source, kinds=["add-parameter"])
    assert task is not None
    added = task.instruction.split("`")[1]
    name = added.split("=")[0]
    assert f"def walk(node, depth, {added}):" in task.target
    assert f"walk(child, (depth, 1), {name}={name})" in task.target


def test_an_edit_that_does_not_apply_gives_none():
    assert make_task(random.Random(0), "x.py", "x = y\n", kinds=["add-parameter"]) is None


def test_snippets_are_dedented_functions_of_the_wanted_length():
    module = "class A:\n    def long(self):\n" + "        x = 1\n" * 8 + "\n    def short(self):\n        pass\n"
    found = snippets(module, min_lines=5, max_lines=10)
    assert found == ["def long(self):\n" + "    x = 1\n" * 8]


def test_snippets_of_broken_source_are_none():
    assert snippets("def (", min_lines=1, max_lines=9) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 1, "kinds": ["dance"]}, "edit kinds must be among .*'dance'"),
        ({"count": 1, "min_lines": 10_000, "max_lines": 10_001}, "between 10000 and 10001 lines"),
    ],
)
def test_bad_arguments_get_one_clear_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        heldout_tasks(**arguments)


def test_a_missing_source_root_is_named(tmp_path):
    with pytest.raises(LoadError, match="source root must be a directory"):
        list(source_files(tmp_path / "nowhere", heldout=True))
