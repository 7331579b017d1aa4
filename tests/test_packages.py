"""Import rules between the packages, and the cost of importing them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OWN_PACKAGES = {"llava_mini", "probes", "experiments", "conf"}


def imported_packages(source: Path) -> set[str]:
    """Return the top-level packages that a source file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", ["llava_mini", "probes"])
def test_library_package_imports_no_other_own_package(package):
    for source in (ROOT / package).rglob("*.py"):
        assert not imported_packages(source) & (OWN_PACKAGES - {package}), source


@pytest.mark.parametrize("package", ["llava_mini", "probes"])
def test_library_import_without_hydra_works_and_loads_no_optional_library(package):
    """lmms-eval cannot be installed beside Hydra, and the optional libraries take seconds to import."""
    code = f"""
import sys
for name in ("hydra", "omegaconf"):
    sys.modules[name] = None
import {package}
heavy = {{"transformer_lens", "nnsight", "matplotlib", "experiments"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def modules_after(code: str) -> set[str]:
    """Return the modules that a new process has imported after running this code."""
    code += "\nimport sys; print(*sys.modules, file=sys.__stdout__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_import_of_llava_mini_adds_few_modules_to_transformers():
    """Video decoding and the language models of other families take a third of a second."""
    transformers = "from transformers import LlavaForConditionalGeneration, LlavaProcessor, AutoProcessor"
    added = modules_after("import llava_mini") - modules_after(transformers)
    assert not {name for name in added if name.startswith("transformers.models.")}
    assert {name.split(".")[0] for name in added} <= {"llava_mini", "jaxtyping"}


def test_command_line_import_does_not_load_torch():
    """An error in a configuration key is reported before the seconds that torch takes to import."""
    code = "import sys; import experiments.run, experiments.config.schema; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
