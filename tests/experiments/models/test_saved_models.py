"""Saving a trained model: nothing of others is touched, and a folder is whole or not there."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from experiments.models.build import load_checkpoint
from experiments.models.saved_models import MARKER, SaveError, check_save_folder, is_saved, save_model
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor


@pytest.fixture
def save(llava, processor, tmp_path):
    """Save the fixture model; the default is a new folder."""

    def to(folder=tmp_path / "model", cell_id="a" * 16, adapter=tmp_path / "no adapter"):
        save_model(llava, processor, adapter, folder, cell_id)
        return folder

    return to


def test_save_model_writes_what_transformers_loads(save, llava, tmp_path):
    folder = save(tmp_path / "new" / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)
    expected = llava.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert is_saved(folder, "a" * 16)
    assert not is_saved(folder, "b" * 16)
    assert not is_saved(tmp_path / "none", "a" * 16)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_save_model_again_replaces_what_it_wrote(save, llava, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    folder = save(adapter=adapter)
    assert (folder / "adapter" / "adapter_config.json").exists()
    llava.lm_head.weight.data.fill_(2.0)
    save()
    assert is_saved(folder, "a" * 16)
    assert AutoModelForImageTextToText.from_pretrained(folder).lm_head.weight.eq(2).all()
    assert not (folder / "adapter").exists()


def test_save_model_to_the_folder_of_another_cell_raises_and_keeps_it(save, llava):
    folder = save()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    check_save_folder(folder, "a" * 16)
    llava.lm_head.weight.data.fill_(2.0)
    for attempt in (lambda: check_save_folder(folder, "b" * 16), lambda: save(cell_id="b" * 16)):
        with pytest.raises(SaveError, match=r"save: '.*model' .*cell a{16}.* cell b{16}") as error:
            attempt()
        assert "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("where", ["a foreign folder", "a saved model"])
def test_save_model_beside_other_files_raises_and_keeps_them(save, tmp_path, where):
    folder = tmp_path / "model"
    if where == "a saved model":
        save()
    folder.mkdir(exist_ok=True)
    (folder / "thesis.txt").write_text("mine")
    for attempt in (lambda: check_save_folder(folder, "a" * 16), save):
        with pytest.raises(SaveError, match=r"save: .*model' .*thesis\.txt"):
            attempt()
    assert (folder / "thesis.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".model*"))


def test_check_save_folder_accepts_a_new_and_an_empty_folder(tmp_path):
    check_save_folder(tmp_path / "new" / "model", "a" * 16)
    check_save_folder(tmp_path, "a" * 16)
    assert not (tmp_path / "new" / "model").exists()


def test_check_save_folder_of_a_file_or_below_a_file_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"save: .*file'"):
        check_save_folder(tmp_path / "file", "a" * 16)
    with pytest.raises(SaveError, match=r"save: .*file/model'"):
        check_save_folder(tmp_path / "file" / "model", "a" * 16)


def test_save_model_on_a_full_disk_keeps_the_earlier_model(save, monkeypatch):
    folder = save()

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(SaveError, match="No space left"):
        save(cell_id="b" * 16)
    assert is_saved(folder, "a" * 16)
    assert json.loads((folder / MARKER).read_text())["files"]
    assert not list(folder.parent.glob(".model*"))


def test_model_with_pre_fusion_inside_is_refused_as_a_checkpoint(llava, processor, tmp_path):
    """Its files hold no number of layers, so it would be evaluated with patches and tokens in all layers."""
    mini = LlavaMiniForConditionalGeneration.from_llava(
        llava, compressor="average", compressor_size=2, prefusion_layers=0, keep_patches=True
    )
    save_model(
        mini, LlavaMiniProcessor.from_llava(processor, mini.config), tmp_path / "none", tmp_path / "model", "a" * 16
    )
    with pytest.raises(ValueError, match=r"^model.path: .*model.*prefusion.location=inside"):
        load_checkpoint(str(tmp_path / "model"), torch.float32, "sdpa")
