"""Errors of the conversion: each names its cause, and no partial output remains."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_mini import checkpoint
from llava_mini.convert import check_official, convert_official, main
from tests.llava_mini.checkpoint_edits import to_half, without


def test_convert_official_lists_all_wrong_keys_in_one_error(official_checkpoint, tmp_path):
    def edit(weights):
        weights = without("model.norm.weight", "model.prefusion_layers.3.mlp.up_proj.weight")(weights)
        query = torch.zeros(4, 1024)
        return weights | {"model.compressor.query": query, "model.image_newline": torch.zeros(64)}

    with pytest.raises(ValueError, match=r"config\.json") as caught:
        convert_official(official_checkpoint(edit=edit), tmp_path / "ours")
    message = str(caught.value)
    assert "2 missing (model.norm.weight [64]; model.prefusion_layers.3.mlp.up_proj.weight [160, 64])" in message
    assert "1 unexpected (model.image_newline [64])" in message
    assert "1 misshapen (model.compressor.query [4, 1024], not [1, 1024])" in message
    assert "\n" not in message
    assert not (tmp_path / "ours").exists()


def test_check_official_lists_three_wrong_keys_at_most(official_checkpoint):
    with pytest.raises(ValueError, match=r"9 unexpected \([^;]*; [^;]*; [^;]*; \.\.\.\)"):
        check_official(official_checkpoint(edit=lambda w: w | {f"model.x{i}": torch.ones(1) for i in range(9)}))


def test_convert_official_drops_buffers_of_older_versions(official_checkpoint, tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    convert_official(official_checkpoint(edit=lambda weights: weights | extra), tmp_path / "ours")
    assert not any("inv_freq" in name for name in load_file(tmp_path / "ours" / "model.safetensors"))


def test_convert_official_with_an_int8_weight_raises(official_checkpoint, tmp_path):
    src = official_checkpoint(edit=lambda weights: weights | {"lm_head.weight": torch.zeros(128, 64, dtype=torch.int8)})
    with pytest.raises(ValueError, match=r"1 of another dtype \(lm_head\.weight in model\.safetensors\)"):
        convert_official(src, tmp_path / "ours")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("length", [0, 5, 100_000])
def test_main_with_a_truncated_file_prints_one_line(official_checkpoint, tmp_path, capsys, suffix, length):
    src = official_checkpoint(suffix, edit=to_half)
    file = next(src.glob(f"*.{suffix}"))
    file.write_bytes(file.read_bytes()[:length])
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main([str(src), str(tmp_path / "ours")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{file} cannot be read" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_convert_official_that_fails_while_writing_leaves_no_files(official_checkpoint, tmp_path, monkeypatch):
    def raise_no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    src = official_checkpoint(edit=to_half)
    monkeypatch.setattr(checkpoint, "save_file", raise_no_space)
    with pytest.raises(OSError, match="No space left"):
        convert_official(src, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["official"]


def test_main_with_an_existing_folder_does_not_overwrite_it(official_checkpoint, tmp_path, capsys):
    src = official_checkpoint(edit=to_half)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").touch()
    assert main([str(src), str(tmp_path / "ours")]) == 1
    assert f"{tmp_path / 'ours'} exists" in capsys.readouterr().err
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
def test_convert_official_with_a_missing_file_names_it(official_checkpoint, tmp_path, absent, message):
    src = official_checkpoint(edit=to_half)
    shutil.rmtree(src) if absent == "." else (src / absent).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        convert_official(src, tmp_path / "ours")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_main_with_a_broken_file_names_it(official_checkpoint, tmp_path, capsys, name):
    src = official_checkpoint(shards=2, edit=to_half)
    (src / name).write_text("{")
    assert main([str(src), str(tmp_path / "ours")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "tokenizer" in error if name == "tokenizer.json" else str(src / name) in error
    assert not (tmp_path / "ours").exists()


def test_convert_official_with_a_missing_shard_names_it(official_checkpoint, tmp_path):
    src = official_checkpoint(shards=2, edit=to_half)
    (src / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names 1 .*model-00002-of-00002"):
        convert_official(src, tmp_path / "ours")
    check_official(src)  # the index names its weights


# Dry run and command line


def test_main_with_dry_run_checks_and_writes_nothing(official_checkpoint, tmp_path, capsys):
    src = official_checkpoint(edit=to_half)
    assert main([str(src), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "compressor" in printed
    assert "4,204,544" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["official"]
    weights = load_file(src / "model.safetensors")
    save_file({name: w for name, w in weights.items() if name != "lm_head.weight"}, src / "model.safetensors")
    assert main([str(src), "--dry-run"]) == 1
    assert "1 missing (lm_head.weight [128, 64])" in capsys.readouterr().err


def test_check_official_without_shards_reads_the_names_from_the_index(official_checkpoint):
    src = official_checkpoint(shards=2, edit=lambda weights: to_half(without("model.norm.weight")(weights)))
    for file in src.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"1 missing \(model\.norm\.weight \[64\]\)"):
        check_official(src)


def test_main_without_a_destination_exits(official_checkpoint, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["somewhere"])
    assert caught.value.code == 2
    assert "DST" in capsys.readouterr().err
