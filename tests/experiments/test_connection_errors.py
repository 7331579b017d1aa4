"""Errors of the network, the model hub and the saving of a model are no failures of a cell."""

import httpx
import pytest
import requests
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError

from experiments.errors import HubError, is_connection_error
from experiments.models.saved_models import SaveError
from experiments.sweeps.runner import run_if_needed
from experiments.sweeps.store import RecordStore
from tests.experiments.sweeps.run_sweep import tiny_cell


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionError("refused"), True),
        (TimeoutError("slow"), True),
        (httpx.ConnectError("no name"), True),
        (requests.exceptions.ReadTimeout("slow"), True),
        (LocalEntryNotFoundError("not in the cache"), True),
        (OSError("no space"), False),
        (FileNotFoundError("model.path"), False),
        (ValueError("shapes differ"), False),
    ],
    ids=repr,
)
def test_is_connection_error_counts_the_error_and_its_cause(error, expected):
    assert is_connection_error(error) == expected
    wrapped = ValueError("model.path: no model")
    wrapped.__cause__ = error
    assert is_connection_error(wrapped) == expected


@pytest.mark.parametrize(("model", "setting"), [("checkpoint", "model.path"), ("smol", "model.language")])
def test_run_if_needed_without_the_hub_names_the_setting_and_records_nothing(tmp_path, monkeypatch, model, setting):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cell = tiny_cell(tmp_path, f"model={model}", f"{setting}=nobody/no-such-model")
    with pytest.raises(HubError, match=rf"^{setting}: .*'?nobody/no-such-model'"):
        run_if_needed(cell, record_input_errors=True)
    assert RecordStore(tmp_path).status(cell.id).state == "missing"


@pytest.mark.parametrize("error", [SafetensorError("No such file"), RuntimeError("anything")], ids=repr)
def test_run_if_needed_whose_save_fails_raises_save_error_and_keeps_the_record(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    cell = tiny_cell(tmp_path / "results", f"save={tmp_path / 'model'}")
    with pytest.raises(SaveError, match=f"save: .*{error}"):
        run_if_needed(cell, record_input_errors=True)
    assert RecordStore(tmp_path / "results").status(cell.id).state == "finished"
    assert not (tmp_path / "model").exists()
