"""What people install: the wheel, the sdist and the editable install, each used from a directory that is not ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.test_architecture import PACKAGES, ROOT

IGNORED = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "*.log")
SUB_PACKAGES = [f"specdec.{name}" for name in PACKAGES if name != "specdec" and list((ROOT / name).rglob("*.py"))]
NOT_SHIPPED = ("bench/results/",)
HEAVY = ("torch", "numba", "transformers", "triton", "fastapi", "pydantic", "typer", "rich")

# Imports what it is told to, then says where everything came from and what else became importable by our names.
PROBE = """
import importlib, importlib.util, json, sys
where = {}
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    where[name] = module.__file__ or list(module.__path__)[0]
bare = {}
for name in ("drafters", "suffix_tree", "verifier", "kernels", "online_training", "server", "bench", "tests"):
    spec = importlib.util.find_spec(name)
    bare[name] = spec and (spec.origin or list(spec.submodule_search_locations)[0])
print(json.dumps({"where": where, "bare": bare}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command as a user would, outside our environment; returns what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, f"{command}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, links kept as links, so that no build leaves traces in the real one."""
    copy = tmp_path_factory.mktemp("source") / "specdec-checkout"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=IGNORED)
    return copy


@pytest.fixture(scope="module")
def archives(source: Path) -> dict[str, Path]:
    """The sdist, and the wheel that is built from it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", source / "dist", cwd=source)
    return {"wheel": next((source / "dist").glob("*.whl")), "sdist": next((source / "dist").glob("*.tar.gz"))}


def install(archive: Path, directory: Path) -> Path:
    """A fresh environment with nothing but the archive, then the dependencies of this one by reference.

    The dependencies come last: pip must not see an editable specdec that may be among them.
    """
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", archive, cwd=directory)
    site_packages = next((directory / "lib").glob("python*/site-packages"))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


@pytest.fixture(scope="module")
def wheel_python(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(archives["wheel"], tmp_path_factory.mktemp("wheel") / "env")


@pytest.fixture(scope="module")
def editable_python(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pip install -e`` installs: the build backend's editable wheel."""
    out = tmp_path_factory.mktemp("editable")
    build = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"
    run(sys.executable, "-c", build, out, cwd=source)
    return install(next(out.glob("*.whl")), out / "env")


def shipped_files() -> set[str]:
    """What a wheel must hold of our directories: all of them but results and notes, under one name."""
    files = (file for top in PACKAGES for file in (ROOT / top).rglob("*") if file.is_file() and file.resolve() == file)
    names = {file.relative_to(ROOT).as_posix() for file in files if "__pycache__" not in file.parts}
    names = {name for name in names if not name.endswith(".gitkeep") and not name.startswith(NOT_SHIPPED)}
    return {name if name.startswith("specdec/") else f"specdec/{name}" for name in names}


def test_wheel_holds_every_module_and_the_bundled_models_and_nothing_else(archives: dict[str, Path]):
    names = {name for name in zipfile.ZipFile(archives["wheel"]).namelist() if ".dist-info/" not in name}
    assert names == shipped_files()


def test_sdist_holds_files_not_links(archives: dict[str, Path]):
    with tarfile.open(archives["sdist"]) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    names = {member.name.partition("/")[2] for member in members}
    assert shipped_files() | {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith("tests/")], "a part of the tests is no use to anybody"


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed_package_imports_from_any_directory_and_shows_no_bare_names(
    kind: str, source: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    python = request.getfixturevalue(f"{kind}_python")
    home = (source if kind == "editable" else python.parent.parent).resolve()
    for cwd in (tmp_path, source):
        found = json.loads(run(python, "-c", PROBE, "specdec", *SUB_PACKAGES, cwd=cwd))
        strange = {k: v for k, v in found["where"].items() if not Path(v).resolve().is_relative_to(home)}
        assert kind == "wheel" and cwd == source or not strange, strange
        if cwd == tmp_path:
            ours = {name: at for name, at in found["bare"].items() if at and Path(at).is_relative_to(home)}
            assert not ours, f"the install put these on everybody's path: {ours}"


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed_command_says_its_version(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    import specdec

    command = request.getfixturevalue(f"{kind}_python").parent / "specdec"
    assert run(command, "--version", cwd=tmp_path).strip() == f"specdec {specdec.__version__}"


def test_import_transformers_from_the_repository_root_is_unharmed():
    """transformers looks for a package called ``kernels`` and imports it: ours must stay invisible to it."""
    code = """
import sys, transformers
from transformers import LlamaForCausalLM
module = sys.modules.get("kernels")
print("absent" if module is None else "namespace" if module.__file__ is None else module.__file__)
"""
    answer = run(sys.executable, "-c", code, cwd=ROOT).strip()
    assert answer in ("absent", "namespace") or not Path(answer).is_relative_to(ROOT / "kernels"), answer
    assert not [name for name in ("kernels", "bench") if (ROOT / name / "__init__.py").exists()]


def test_import_specdec_loads_nothing_heavy():
    code = f"import sys, specdec; print(*(name for name in {HEAVY} if name in sys.modules))"
    assert run(sys.executable, "-c", code, cwd=ROOT).split() == []
