"""`save=FOLDER` in single runs and sweeps, and devices that a machine lacks."""

import json
from pathlib import Path

import pytest

from experiments.errors import MissingDeviceError
from experiments.models.saved_models import SaveError, is_saved
from experiments.sweeps.hydra_api import open_hydra
from experiments.sweeps.plan import expand_sweep
from experiments.sweeps.runner import run_if_needed
from experiments.sweeps.store import RecordStore


@pytest.fixture
def cells(tmp_path):
    """Return the cells of a sweep over the test's results folder."""
    from experiments.config.registry import register_configs

    register_configs()

    def expand(*overrides):
        small = (
            "model=tiny",
            "data.train_samples=8",
            "data.test_samples=2",
            "device=cpu",
            f"results={tmp_path / 'results'}",
        )
        with open_hydra() as hydra:
            return [job.cell for job in expand_sweep(hydra, [*small, *overrides])[1]]

    return expand


def test_run_if_needed_of_a_finished_cell_without_saved_model_saves_it(cells, tmp_path):
    (plain,) = cells()
    (saving,) = cells(f"save={tmp_path / 'model'}")
    assert saving.id == plain.id
    assert run_if_needed(plain, record_input_errors=False).state == "finished"
    path = RecordStore(plain.config.results).path(plain.id)
    first = json.loads(path.read_text())
    assert run_if_needed(saving, record_input_errors=False).state == "finished"
    assert is_saved(tmp_path / "model", saving.id)
    second = json.loads(path.read_text())
    assert {key for key in first if first[key] != second[key]} <= {"config", "provenance", "digest"}
    written = path.stat().st_mtime_ns
    run_if_needed(saving, record_input_errors=False)
    assert path.stat().st_mtime_ns == written  # saved now: nothing left to do


def test_run_if_needed_with_a_save_folder_of_others_raises_before_training(cells, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("mine")
    (cell,) = cells(f"save={tmp_path / 'model'}")
    monkeypatch.setattr("experiments.run_cell._build", lambda *_: pytest.fail("the model was built"))
    with pytest.raises(SaveError, match=r"thesis\.txt"):
        run_if_needed(cell, record_input_errors=True)
    assert RecordStore(cell.config.results).status(cell.id).state == "missing"


def test_commands_that_save_two_cells_to_one_folder_are_refused_from_the_second_on(cells, sweep, tmp_path):
    folder = tmp_path / "model"
    (first,) = cells(f"save={folder}")
    (second,) = cells(f"save={folder}", "seed=1")
    assert run_if_needed(first, record_input_errors=False).state == "finished"
    for attempt in (lambda: run_if_needed(second, record_input_errors=True), lambda: sweep("seed=1", f"save={folder}")):
        with pytest.raises(SaveError, match=rf"save: '{folder}' .*cell {first.id}"):
            attempt()
    assert is_saved(folder, first.id)
    assert RecordStore(second.config.results).status(second.id).state == "missing"


def test_run_if_needed_whose_save_fails_keeps_the_record(cells, tmp_path, monkeypatch):
    (cell,) = cells(f"save={tmp_path / 'model'}")

    def fail(*args):
        raise SaveError("save: full")

    monkeypatch.setattr("experiments.run_cell.save_model", fail)
    with pytest.raises(SaveError, match="full"):
        run_if_needed(cell, record_input_errors=True)
    assert RecordStore(cell.config.results).status(cell.id).state == "finished"


def test_sweep_whose_cells_share_a_save_folder_is_refused(sweep, tmp_path):
    with pytest.raises(ValueError, match=r"save: 2 cells .*models'.*\$\{seed\}"):
        sweep("seed=0,1", f"save={tmp_path / 'models'}")
    assert not (tmp_path / "records").exists()


def test_sweep_with_interpolated_save_folder_saves_every_cell(sweep, tmp_path):
    code, lines = sweep("seed=0,1", f"save={tmp_path}/models/${{seed}}", "data.seed=${seed}")
    assert (code, lines[-1]) == (0, "2 cells: 2 finished")
    seeds = {json.loads(path.read_text())["config"]["data"]["seed"] for path in (tmp_path / "records").iterdir()}
    assert seeds == {0, 1}
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["0", "1"]


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu", "mps"])
def test_run_if_needed_on_a_missing_device_raises_and_records_nothing(cells, device, monkeypatch):
    """The cell's identity does not depend on the device, so a record of failure would stop it on every machine."""
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (cell,) = cells(f"device={device}")
    with pytest.raises(MissingDeviceError, match=rf"device: .*'{device}'"):
        run_if_needed(cell, record_input_errors=True)
    assert RecordStore(cell.config.results).status(cell.id).state == "missing"
    assert not list(Path(cell.config.results).glob("records/*.json"))
