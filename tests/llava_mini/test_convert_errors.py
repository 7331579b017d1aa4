"""Faults of an official checkpoint: each is named, and nothing half-written is left."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_mini import checkpoint
from llava_mini.convert import check_official, convert_official, main
from tests.llava_mini.edits import half, without


def test_keys_that_do_not_fit_are_listed_together(official_checkpoint, tmp_path):
    def edit(weights):
        weights = without("model.norm.weight", "model.prefusion_layers.3.mlp.up_proj.weight")(weights)
        query = torch.zeros(4, 1024)
        return weights | {"model.compressor.query": query, "model.image_newline": torch.zeros(64)}

    with pytest.raises(ValueError, match="are not those of its config") as caught:
        convert_official(official_checkpoint(edit=edit), tmp_path / "ours")
    message = str(caught.value)
    assert "2 missing (model.norm.weight [64]; model.prefusion_layers.3.mlp.up_proj.weight [160, 64])" in message
    assert "1 unexpected (model.image_newline [64])" in message
    assert "1 misshapen (model.compressor.query [4, 1024], not [1, 1024])" in message
    assert "\n" not in message
    assert not (tmp_path / "ours").exists()


def test_long_lists_are_cut(official_checkpoint):
    with pytest.raises(ValueError, match=r"9 unexpected \([^;]*; [^;]*; [^;]*; \.\.\.\)"):
        check_official(official_checkpoint(edit=lambda w: w | {f"model.x{i}": torch.ones(1) for i in range(9)}))


def test_buffers_of_older_versions_are_dropped(official_checkpoint, tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    convert_official(official_checkpoint(edit=lambda weights: weights | extra), tmp_path / "ours")
    assert not any("inv_freq" in name for name in load_file(tmp_path / "ours" / "model.safetensors"))


def test_another_dtype_is_refused(official_checkpoint, tmp_path):
    src = official_checkpoint(edit=lambda weights: weights | {"lm_head.weight": torch.zeros(128, 64, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"1 of another dtype \(lm_head\.weight in model\.safetensors\)"):
        convert_official(src, tmp_path / "ours")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("left", [0, 5, 100_000])
def test_a_truncated_file_is_one_line(official_checkpoint, tmp_path, capsys, suffix, left):
    src = official_checkpoint(suffix, edit=half)
    file = next(src.glob(f"*.{suffix}"))
    file.write_bytes(file.read_bytes()[:left])
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main([str(src), str(tmp_path / "ours")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{file} cannot be read" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_fails_while_writing_leaves_nothing(official_checkpoint, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    src = official_checkpoint(edit=half)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        convert_official(src, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["official"]


def test_an_existing_folder_is_not_written_over(official_checkpoint, tmp_path, capsys):
    src = official_checkpoint(edit=half)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").touch()
    assert main([str(src), str(tmp_path / "ours")]) == 1
    assert "exists and is no empty folder" in capsys.readouterr().err
    (tmp_path / "ours" / "precious").unlink()
    assert main([str(src), str(tmp_path / "ours")]) == 0


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("config.json", "config.json does not exist"),
        ("model.safetensors", "holds no model.safetensors or pytorch_model.bin"),
        (".", "config.json does not exist"),
    ],
)
def test_what_is_not_there_is_named(official_checkpoint, tmp_path, absent, message):
    src = official_checkpoint(edit=half)
    shutil.rmtree(src) if absent == "." else (src / absent).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        convert_official(src, tmp_path / "ours")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_broken_files_are_named(official_checkpoint, tmp_path, capsys, name):
    src = official_checkpoint(shards=2, edit=half)
    (src / name).write_text("{")
    assert main([str(src), str(tmp_path / "ours")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "tokenizer" in error if name == "tokenizer.json" else str(src / name) in error
    assert not (tmp_path / "ours").exists()


def test_a_shard_that_is_not_there(official_checkpoint, tmp_path):
    src = official_checkpoint(shards=2, edit=half)
    (src / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names 1 files that do not exist, the first model-00002-of-00002"):
        convert_official(src, tmp_path / "ours")
    check_official(src)  # the index says what would be in it


# Dry run and command line


def test_a_dry_run_checks_and_writes_nothing(official_checkpoint, tmp_path, capsys):
    src = official_checkpoint(edit=half)
    assert main([str(src), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "compressor" in printed
    assert "4,204,544" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["official"]
    weights = load_file(src / "model.safetensors")
    save_file({name: w for name, w in weights.items() if name != "lm_head.weight"}, src / "model.safetensors")
    assert main([str(src), "--dry-run"]) == 1
    assert "1 missing (lm_head.weight [128, 64])" in capsys.readouterr().err


def test_a_dry_run_reads_the_names_from_an_index_alone(official_checkpoint):
    src = official_checkpoint(shards=2, edit=lambda weights: half(without("model.norm.weight")(weights)))
    for file in src.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"1 missing \(model\.norm\.weight \[64\]\)"):
        check_official(src)


def test_a_destination_is_needed(official_checkpoint, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["somewhere"])
    assert caught.value.code == 2
    assert "DST" in capsys.readouterr().err
