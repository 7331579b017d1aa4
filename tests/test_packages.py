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


def test_command_line_import_does_not_load_torch():
    """An error in a configuration key is reported before the seconds that torch takes to import."""
    code = "import sys; import experiments.run, experiments.config.schema; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
