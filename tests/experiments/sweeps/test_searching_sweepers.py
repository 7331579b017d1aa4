"""Sweepers that search: the accuracy of a cell is their objective, and a cell without accuracy raises."""

import json
import os
import subprocess
import sys

import pytest

from tests.experiments.sweeps.run_sweep import ROOT, TINY_CELL

SWEEPER = '''
import json
from pathlib import Path
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


class Search(Sweeper):
    """Run two jobs, one after the other, and write their objectives."""

    def __init__(self, **_):
        pass

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.folder = Path(config.results)

    def sweep(self, arguments):
        jobs = [[*arguments, f"seed={seed}"] for seed in (0, 1)]
        objectives = [self.launcher.launch([job], initial_job_idx=0)[0].return_value for job in jobs]
        (self.folder / "objectives.json").write_text(json.dumps(objectives))
'''


def search(tmp_path, *overrides):
    """Return the ended process of a sweep with the sweeper above, or with another that `overrides` names."""
    plugins = tmp_path / "plugins" / "hydra_plugins"
    plugins.mkdir(parents=True)
    (plugins / "search.py").write_text(SWEEPER)
    path = os.pathsep.join([str(plugins.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "experiments.run", "-m", *TINY_CELL, *overrides, f"results={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def recorded_accuracies(results):
    """Return the share of right answers of each finished record, by seed."""
    records = [json.loads(path.read_text()) for path in (results / "records").glob("*.json")]
    finished = {r["config"]["seed"]: r["accuracy"]["image"] for r in records if r["status"] == "finished"}
    return {seed: digits.count("1") / len(digits) for seed, digits in finished.items()}


def test_searching_sweeper_gets_the_accuracy_of_each_cell(tmp_path):
    ended = search(tmp_path, "hydra.sweeper._target_=hydra_plugins.search.Search")
    assert ended.returncode == 0, ended.stderr
    accuracies = recorded_accuracies(tmp_path)
    assert json.loads((tmp_path / "objectives.json").read_text()) == [accuracies[0], accuracies[1]]


def test_searching_sweeper_with_failed_cell_ends_with_one_line(tmp_path):
    ended = search(tmp_path, "hydra.sweeper._target_=hydra_plugins.search.Search", "compressor.name=nope")
    assert ended.returncode == 1
    *_, last = ended.stderr.strip().splitlines()
    assert last.startswith("error: ")
    assert "'nope'" in last
    assert "Traceback" not in ended.stderr


def test_search_in_several_processes_is_refused(sweep, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"hydra\.sweeper\._target_: .*Search.*WORLD_SIZE=2"):
        sweep("hydra.sweeper._target_=hydra_plugins.search.Search")


@pytest.mark.parametrize("sweeper", ["ax", "nevergrad"])
def test_sweeper_that_is_not_installed_ends_with_one_line_and_pip_command(tmp_path, sweeper):
    ended = search(tmp_path, f"hydra/sweeper={sweeper}")
    assert ended.returncode == 1
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f"pip install hydra-{sweeper}-sweeper")


def test_optuna_maximises_the_accuracy(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    options = ("hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=4")
    ended = search(tmp_path, *options, "seed=choice(0,1)", "compressor.name=none")
    assert ended.returncode == 0, ended.stderr
    best = (tmp_path / "sweep" / "optimization_results.yaml").read_text()
    assert f"best_value: {max(recorded_accuracies(tmp_path).values())}" in best
