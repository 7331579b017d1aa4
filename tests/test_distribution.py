"""The wheel: its content, and its commands in an environment of its own, run from another folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["conf", "experiments", "hydra_plugins", "llava_mini", "probes"]


def run(*command: object, cwd: Path) -> str:
    """Run a command that finds neither this checkout nor a model hub, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a new environment that has the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile"]
    run(*pip, "--constraint", ROOT / "constraints.txt", wheel, cwd=folder)
    return folder / "bin"


def test_wheel_has_the_tracked_files_of_the_packages_and_no_others(wheel):
    tracked = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES, cwd=ROOT).splitlines()
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == {name for name in tracked if (ROOT / name).is_file()}
    assert {"conf/config.yaml", "experiments/assets/scene.png", "probes/py.typed"} <= packed


def test_wheel_commands_from_another_folder_run_a_cell_the_page_and_the_report(scripts, tmp_path):
    python = scripts / "python"
    where = run(python, "-c", "import experiments; print(experiments.__path__[0])", cwd=tmp_path)
    package = Path(where.strip())
    assert package.is_relative_to(scripts.parent)
    assets = package / "assets"
    question = ["--image", assets / "scene.png", "--question", "what shape is right of the green ring?"]
    assert "answer: triangle" in run(python, "-m", "probes", assets / "tiny", *question, cwd=tmp_path)
    assert (tmp_path / "attention.html").stat().st_size > 50_000

    cell = ["experiment=attention", "data.test_samples=8", "device=cpu", "results=records_here"]
    run(scripts / "llava-mini-run", *cell, cwd=tmp_path)
    assert len(list((tmp_path / "records_here" / "records").glob("*.json"))) == 1
    assert "attention" in run(scripts / "llava-mini-status", *cell, cwd=tmp_path)
    run(scripts / "llava-mini-report", "--results", "records_here", cwd=tmp_path)
    page = (tmp_path / "records_here" / "report" / "index.html").read_text()
    assert "attention" in page
