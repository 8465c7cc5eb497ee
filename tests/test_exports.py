"""Every module says what it offers: ``__all__`` is there and true, and what it names is documented.

That it is sorted is ruff's business (RUF022).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_architecture import FILES, TREES

PUBLIC = [name for name in FILES if not any(part.startswith("_") for part in name.split("."))]


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, those under ``if TYPE_CHECKING:`` and the like included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from statements([*node.body, *node.orelse])


def defined_names(module: str) -> dict[str, ast.stmt]:
    """What the module binds at its top level, with the statement that does it."""
    names: dict[str, ast.stmt] = {}
    for node in statements(TREES[module].body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id: node for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


@pytest.mark.parametrize("module", PUBLIC)
def test_module_names_its_exports_and_they_are_real_and_documented(module: str):
    names = defined_names(module)
    assert ast.get_docstring(TREES[module]), f"{module} needs a docstring: why it exists and what it does not do"
    if "__all__" not in names:
        own = {name for name, node in names.items() if not isinstance(node, ast.Import | ast.ImportFrom)}
        own = {name for name in own if not name.startswith("_") and name != "main"}  # a script is run, not imported
        assert not own, f"{module} needs an __all__: it defines {own}"
        return
    exports = ast.literal_eval(names["__all__"].value)  # type: ignore[attr-defined]
    assert not [name for name in exports if name not in names], f"{module}.__all__ names what is not there"
    for name in exports:
        if isinstance(names[name], ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            assert ast.get_docstring(names[name]), f"{module}.{name} is public and has no docstring"


def test_everything_specdec_exports_can_be_had():
    import specdec

    for name in specdec.__all__:
        assert getattr(specdec, name) is not None
