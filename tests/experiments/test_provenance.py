"""The code version: an edit that changes a computation changes it, and any other edit leaves it."""

import ast
import shutil
import subprocess

import pytest

from experiments import provenance as provenance_module
from experiments.data.lmms import PLUGIN
from experiments.provenance import RECORD_SOURCES, ROOT, code_version, provenance

# Modules that a cell imports and that cannot change the values in its record. Those of records state what one may hold.
WITHOUT_EFFECT = {
    "experiments/errors.py",
    "experiments/files.py",
    "experiments/markdown.py",
    "experiments/provenance.py",
    *(f"experiments/records/{name}.py" for name in ("benchmarks", "generated", "layer_parts", "part")),
}


@pytest.fixture
def sources(tmp_path):
    """A copy of all files that the code version covers."""
    for name in RECORD_SOURCES:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    return tmp_path


@pytest.fixture
def short_sources(tmp_path):
    """Files of one line at every path that the code version covers; a folder holds one below a folder of its own."""
    for name in RECORD_SOURCES:
        file = tmp_path / name / "inner" / "module.py" if (ROOT / name).is_dir() else tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("WIDTH = 3\n")
    return tmp_path


def test_code_version_of_a_copy_is_equal(sources):
    assert code_version(sources) == code_version()
    assert len(code_version()) == 16


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text + "\n# a comment\n",
        lambda text: text.replace('"""', '"""Reworded: ', 1),
        lambda text: "\n\n" + text,
    ],
    ids=["comment", "docstring", "blank lines"],
)
def test_code_version_of_reworded_sources_is_equal(sources, edit):
    for file in sources.rglob("*.py"):
        text = file.read_text()
        edited = edit(text)
        compile(edited, file, "exec")
        file.write_text(edited)
    assert code_version(sources) == code_version()


@pytest.mark.parametrize("name", RECORD_SOURCES)
def test_code_version_after_a_changed_computation_differs(short_sources, name):
    original = code_version(short_sources)
    source = short_sources / name
    file = source / "inner" / "module.py" if source.is_dir() else source
    versions = {original}
    for computation in ("1 + 1", "1 - 1"):
        file.write_text(f"WIDTH = 3\nLAYERS = {computation}\n")
        code_version.cache_clear()
        versions.add(code_version(short_sources))
    assert len(versions) == 3


def test_code_version_after_an_edited_string_value_differs(sources):
    """Only bare strings are left out. A string that the code uses counts."""
    file = next(file for file in sources.rglob("*.py") if '= "' in file.read_text())
    file.write_text(file.read_text().replace('= "', '= "x', 1))
    assert code_version(sources) != code_version()


def test_commit_is_that_of_the_project_and_none_inside_another_repository(monkeypatch, tmp_path):
    """A package installed in the folder of another project must not name that project's commit."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.invalid"]
    installed = tmp_path / "site-packages"
    installed.mkdir()
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "unrelated"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance_module, "ROOT", installed)
    assert provenance()["commit"] is None
    monkeypatch.setattr(provenance_module, "ROOT", tmp_path)
    assert len(provenance()["commit"]) == 40


def imported_files(file):
    """Yield the files of the project's own modules that a file imports, type-only imports included."""
    package = list(file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")]
            names = [base, *([*base, alias.name] for alias in node.names)]
        else:
            continue
        for parts in names:
            for path in (ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py")):
                if parts[0] in ("experiments", "probes", "llava_mini") and path.exists():
                    yield path


def test_record_sources_cover_every_module_that_a_cell_imports():
    """Follow every import from the function that runs a cell."""
    visited, to_visit = set(), [ROOT / "experiments" / "run_cell.py"]
    while to_visit:
        file = to_visit.pop()
        if file not in visited:
            visited.add(file)
            to_visit += imported_files(file)
    # An __init__.py of a few bytes holds a docstring only.
    with_code = [file for file in visited if file.name != "__init__.py" or file.stat().st_size > 200]
    names = {file.relative_to(ROOT).as_posix() for file in with_code}
    # The plug-in for benchmarks counts in the fingerprint of their data, so an edit renews no other cell.
    sources = (*RECORD_SOURCES, PLUGIN)
    covered = {name for name in names if any(name == s or name.startswith(f"{s}/") for s in sources)}
    assert names - covered == WITHOUT_EFFECT
