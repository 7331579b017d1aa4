"""Damaged files of a checkpoint end in one line that names the file; fields that old processors lack are completed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaProcessor, SiglipImageProcessorPil

from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor, chat

READERS = {
    "config.json": [LlavaMiniForConditionalGeneration, LlavaMiniProcessor],
    "generation_config.json": [LlavaMiniForConditionalGeneration, AutoModelForImageTextToText],
    "model.safetensors": [LlavaMiniForConditionalGeneration, AutoModelForImageTextToText],
    "processor_config.json": [LlavaMiniProcessor],
    "tokenizer.json": [LlavaMiniProcessor, AutoProcessor],
    "tokenizer_config.json": [LlavaMiniProcessor, AutoProcessor],
    "chat_template.jinja": [LlavaMiniProcessor],
}
DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "null": lambda content: b"null",
    "a list": lambda content: b"[1, 2]",
    "a number": lambda content: b"3",
    "a page": lambda content: b"<html>404</html>",
    "a Git LFS pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "binary": lambda content: b"\xff\xfe\x00" + content,
    "two objects": lambda content: b"{} {}",
}
TEXT = ("truncated", "empty", "null", "a list", "a number", "a page", "a Git LFS pointer", "two objects")


@pytest.fixture
def checkpoint(tiny_mini, llava_processor, tmp_path):
    """Save a model and its processor, and return the folder."""
    model = tiny_mini()
    model.save_pretrained(tmp_path / "model")
    LlavaMiniProcessor.from_llava(llava_processor, model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_one_line(error: BaseException, *words: str) -> None:
    assert isinstance(error, ValueError)
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize("file", READERS)
def test_from_pretrained_of_a_damaged_file_names_it(checkpoint, file, capsys):
    content = (checkpoint / file).read_bytes()
    for name, damage in DAMAGES.items():
        if file == "chat_template.jinja" and name in TEXT:
            continue  # a template may be any text
        (checkpoint / file).write_bytes(damage(content))
        for reader in READERS[file]:
            with pytest.raises(ValueError, match=file) as caught:
                reader.from_pretrained(checkpoint)
            assert_one_line(caught.value, str(checkpoint / file))
        assert chat.main([str(checkpoint), "--query", "what", "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert str(checkpoint / file) in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        ("config.json", lambda v: v.update(compressor_size="two"), ["compressor_size", "'two'"]),
        ("config.json", lambda v: v.update(compressor_size=-1), ["compressor_size", "-1"]),
        ("config.json", lambda v: v.update(compressor="foo"), ["compressor", "'foo'"]),
        ("config.json", lambda v: v.update(text_config=[1]), ["text_config", "[1]"]),
        ("config.json", lambda v: v["text_config"].update(num_hidden_layers="two"), ["num_hidden_layers", "'two'"]),
        ("config.json", lambda v: v["text_config"].update(model_type="foo"), ["foo"]),
        ("generation_config.json", lambda v: v.update(max_new_tokens=-4), ["max_new_tokens", "-4"]),
        ("tokenizer.json", lambda v: v.clear(), []),
        ("tokenizer.json", lambda v: v.pop("model"), []),
        ("tokenizer.json", lambda v: v["model"].update(type="Foo"), []),
        ("tokenizer.json", lambda v: v["model"].update(vocab=3), []),
        ("processor_config.json", lambda v: v["image_processor"].update(size="x"), ["size", "x"]),
    ],
)
def test_from_pretrained_of_a_wrong_value_names_the_file(checkpoint, file, edit, words, capsys):
    values = json.loads((checkpoint / file).read_text())
    edit(values)
    (checkpoint / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=file) as caught:
        READERS[file][0].from_pretrained(checkpoint)
    assert_one_line(caught.value, str(checkpoint / file), *words)
    capsys.readouterr()  # reading the weights shows a progress bar, whose line may end
    assert chat.main([str(checkpoint), "--query", "what", "--device", "cpu"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_from_pretrained_with_a_wrong_argument_does_not_blame_a_file(checkpoint):
    with pytest.raises(ValueError, match="compressor_size") as caught:
        LlavaMiniForConditionalGeneration.from_pretrained(checkpoint, compressor_size=-1)
    assert "config.json" not in str(caught.value)


def test_from_pretrained_of_a_subfolder_names_the_damaged_file(checkpoint):
    shutil.copytree(checkpoint, checkpoint / "part")
    (checkpoint / "part" / "tokenizer.json").write_text("{")
    LlavaMiniProcessor.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"part/tokenizer\.json is not valid JSON"):
        LlavaMiniProcessor.from_pretrained(checkpoint, subfolder="part")


# Fields of processor_config.json by the version of transformers that saved it.
OLDER = {
    "no file": None,
    "no fields": ["patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"],
    "no patch_size": ["patch_size", "num_additional_image_tokens"],
    "no strategy": ["vision_feature_select_strategy", "num_additional_image_tokens"],
    "no additional tokens": ["num_additional_image_tokens"],
    "patch_size alone": ["patch_size"],
}


@torch.no_grad()
@pytest.mark.parametrize("vision", ["clip", "dinov2", "siglip"])
@pytest.mark.parametrize("lacks", OLDER)
def test_from_pretrained_of_an_older_processor_reads_the_config(tiny_mini, llava_processor, tmp_path, vision, lacks):
    """The model itself counts the patches: it raises unless each has a placeholder."""
    model = tiny_mini(vision=vision, compressor="none", prefusion_layers=0)
    if vision == "siglip":
        llava_processor.image_processor = SiglipImageProcessorPil(size={"height": 24, "width": 24})
        llava_processor.num_additional_image_tokens = 0
        llava_processor.vision_feature_select_strategy = "full"
    model.save_pretrained(tmp_path)
    complete = LlavaMiniProcessor.from_llava(llava_processor, model.config)
    complete.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    values = json.loads(file.read_text())
    if OLDER[lacks] is None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values["image_processor"]))
        file.unlink()
    else:
        file.write_text(json.dumps({key: value for key, value in values.items() if key not in OLDER[lacks]}))
    image = Image.new("RGB", (24, 24), "red")
    arguments = {"text": "<image> what", "images": image, "return_tensors": "pt"}
    older = LlavaProcessor.from_pretrained(tmp_path)  # what a caller may have loaded already
    for processor in (
        LlavaMiniProcessor.from_pretrained(tmp_path),
        LlavaMiniProcessor.from_llava(older, model.config),
    ):
        for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
            assert getattr(processor, name) == getattr(complete, name)
        batch = processor(**arguments)
        assert torch.equal(batch["input_ids"], complete(**arguments)["input_ids"])
        assert torch.equal(model(**batch).logits, model(**complete(**arguments)).logits)


def test_processor_without_patch_size_and_config_raises(llava_processor, tiny_mini, tmp_path):
    processor = LlavaMiniProcessor.from_llava(llava_processor, tiny_mini(compressor="none").config)
    processor.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "processor_config.json").read_text())
    del values["patch_size"]
    (tmp_path / "processor_config.json").write_text(json.dumps(values))
    loaded = LlavaMiniProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"patch_size.*None"):
        loaded(text="<image>", images=Image.new("RGB", (24, 24)))
