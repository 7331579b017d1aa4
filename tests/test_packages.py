"""What may import what, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"llava_mini", "probes", "experiments", "conf"}


def imported(source: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", ["llava_mini", "probes"])
def test_the_packages_below_know_nothing_of_the_others(package):
    for source in (ROOT / package).rglob("*.py"):
        assert not imported(source) & (OURS - {package}), source


@pytest.mark.parametrize("package", ["llava_mini", "probes"])
def test_import_needs_neither_hydra_nor_what_only_some_use(package):
    """lmms-eval cannot live beside Hydra, and the other libraries take seconds to import."""
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


def test_a_misspelt_key_costs_no_wait_for_torch():
    code = "import sys; import experiments.run, experiments.config.schema; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
