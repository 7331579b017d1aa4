"""The example in the README runs, and prints what the README shows."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_readme_command_prints_the_output_that_the_readme_shows(tmp_path):
    text = (ROOT / "README.md").read_text()
    command, output = re.search(r"```bash\npython (-m probes .*?)\n```\n\n```\n(.*?)```", text, re.DOTALL).groups()
    arguments = [str(ROOT / part) if part.startswith("experiments/") else part for part in shlex.split(command)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace(f"{ROOT}/", "") == output
    assert (tmp_path / "attention.html").stat().st_size > 50_000


def test_readme_recipe_of_interventions_runs():
    code = re.search(r"```python\n(import torch\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]
    assert len(answers) == 7
    assert answers[0] != answers[-1] == "triangle"


def test_readme_and_guides_link_to_files_that_exist():
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("results/*/README.md"),
    ]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
