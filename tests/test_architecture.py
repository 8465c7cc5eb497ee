"""The import rules and the size limits, read from the source.

A module may import its own layer and the layers below it. A new module of an existing package needs nothing; any other
new module needs a line in ``LAYERS``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("specdec", "drafters", "suffix_tree", "verifier", "kernels", "online_training", "server", "bench")

LAYERS = [
    "specdec.errors specdec.placement specdec.memory specdec.threads specdec.philox specdec.rng specdec.suffix_tree.*"
    " specdec.kernels.*",
    "specdec.tree specdec.readings specdec.types specdec.device_work",
    "specdec.protocols specdec.config specdec.sampling specdec.processors.* specdec.stopping specdec.rope specdec.text"
    " specdec.cost_model specdec.cost_measure specdec.controller_floor specdec.draft_turns"
    " specdec.plain_probes specdec.token_worth specdec.step_budget",
    "specdec.verifier.* specdec.drafters.* specdec.mask_laws specdec.probe specdec.kv_slots specdec.kv_cache"
    " specdec.prefix_cache specdec.stand_ins specdec.fused_norm specdec.packed_linear"
    " specdec.query_layout specdec.strict_attention specdec.strict"
    " specdec.device_tables specdec.step_buffers specdec.kernel_attention specdec.kernel_runner"
    " specdec.prompt_attention specdec.split_attention"
    " specdec.strict_operations specdec.flat_batch specdec.ranks"
    " specdec.attention specdec.early_exit specdec.tree_target specdec.chain_target specdec.plain_target"
    " specdec.row_forward specdec.reference specdec.self_test specdec.routes specdec.controller specdec.trace"
    " specdec.hidden_taps specdec.controller_adaptive specdec.toy specdec.apd specdec.self_speculation",
    "specdec.scheduler specdec.step_events specdec.beside specdec.overlap specdec.overlap_costs specdec.engine",
    "specdec.online_training.*",
    "specdec.adaptive specdec.build",
    "specdec.hf specdec.check specdec.doctor specdec.demo specdec.server.* specdec.bench.*",
    "specdec specdec.commands.* specdec.cli specdec.__main__",
]
# The engine knows the protocols, never a class that implements one of these.
ENGINE = ("specdec.engine", "specdec.scheduler")
CONCRETE = ("specdec.drafters", "specdec.controller", "specdec.toy", "specdec.routes", "specdec.kv_cache")
# `suffix_tree` is usable without torch: servers of other projects load it.
BANNED = {"specdec.suffix_tree": ("torch", "transformers"), "specdec.types": ("transformers",)}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 100  # a Triton kernel cannot be cut into functions as freely
MAY_PRINT = ("specdec.commands", "specdec.cli", "specdec.bench")


def source_files() -> dict[str, Path]:
    """Module name -> file: each file once, although ``specdec/`` also links to the other packages."""
    files = {}
    for top in PACKAGES:
        for file in sorted((ROOT / top).rglob("*.py")):
            if file.resolve() == file:
                parts = file.relative_to(ROOT).with_suffix("").parts
                name = ".".join(parts if top == "specdec" else ("specdec", *parts))
                files[name.removesuffix(".__init__")] = file
    return files


FILES = source_files()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


def layer_of(module: str) -> int:
    """The index of the module's layer."""
    for index, names in enumerate(LAYERS):
        for name in names.split():
            name = name.removesuffix(".*")
            if module == name or (name != "specdec" and module.startswith(f"{name}.")):
                return index
    pytest.fail(f"{module} is in no layer: add it to LAYERS in tests/test_architecture.py, as low as its imports allow")


def imports_of(module: str) -> Iterator[str]:
    """The full names of all modules that a module imports, at the top or inside functions."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative imports hide what is imported"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full != "specdec.__version__":
                    yield full if full in FILES else str(node.module)


def within(module: str, packages: tuple[str, ...]) -> bool:
    """True if the module is one of the packages or inside one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_its_own_layer_or_lower(module: str):
    layer = layer_of(module)
    for target in imports_of(module):
        if within(target, ("specdec",)):
            assert layer_of(target) <= layer, f"{module} (layer {layer}) must not import {target}"
            assert not (module in ENGINE and within(target, CONCRETE)), f"{module} must not know {target}"
        for package, banned in BANNED.items():
            assert not (within(module, (package,)) and within(target, banned)), f"{module} must not import {target}"


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_are_short_and_keep_no_globals(module: str):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES, f"{FILES[module]} is too long"
    cap = MAX_KERNEL_LINES if within(module, ("specdec.kernels",)) else MAX_FUNCTION_LINES
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= cap, f"{module}.{node.name} has {length} lines, the limit is {cap}"
        assert not isinstance(node, ast.Global), (
            f"{module}:{getattr(node, 'lineno', 0)}: no `global`: state has an owner"
        )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert within(module, MAY_PRINT), f"{module}:{node.lineno}: print belongs to commands and reports"
