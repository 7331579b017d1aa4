"""The program `python -m llava_mini.chat`, and transformers' pipeline, on a model saved with its processor."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPVisionModel, pipeline

from llava_mini import LlavaMiniProcessor, chat


@pytest.fixture
def saved(request, tiny_mini, llava_processor, tmp_path):
    model = tiny_mini(**getattr(request, "param", {}))
    model.generation_config.suppress_tokens = [0, 1, 2, 3, 99]  # so that what is said can be read back
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    LlavaMiniProcessor.from_llava(llava_processor, model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    return str(path)


def expected(model, processor, messages, new=5) -> str:
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True)


def user(*content) -> dict:
    return {"role": "user", "content": [{"type": kind, kind: value} for kind, value in content]}


def test_one_question(saved, picture, capsys):
    folder, model = saved
    arguments = [str(folder), "--image", picture, "--query", "what is this", "--max-new-tokens", "5", "--device", "cpu"]
    assert chat.main(arguments) == 0
    processor = LlavaMiniProcessor.from_pretrained(folder)
    said = expected(model, processor, [user(("image", picture), ("text", "what is this"))])
    assert capsys.readouterr().out.split() == said.split()


@pytest.mark.parametrize("saved", [{}, {"compressor": "llama_vid"}], ids=["kept", "asked anew"], indirect=True)
def test_turn_by_turn(saved, picture, capsys, monkeypatch):
    """The second answer follows from the whole chat; the picture stands in its first turn."""
    folder, model = saved
    monkeypatch.setattr("sys.stdin", io.StringIO("what is\nis this\n"))
    assert chat.main([str(folder), "--image", picture, "--max-new-tokens", "5", "--device", "cpu"]) == 0
    processor = LlavaMiniProcessor.from_pretrained(folder)
    messages = [user(("image", picture), ("text", "what is"))]
    first = expected(model, processor, messages)
    messages += [{"role": "assistant", "content": [{"type": "text", "text": first}]}, user(("text", "is this"))]
    second = expected(model, processor, messages)
    assert capsys.readouterr().out.replace("> ", "").split() == [*first.split(), *second.split()]


def test_a_picture_is_encoded_once_for_all_turns(saved, picture, monkeypatch):
    towers = []
    run = CLIPVisionModel.forward
    monkeypatch.setattr(CLIPVisionModel, "forward", lambda *args, **kw: towers.append(1) or run(*args, **kw))
    monkeypatch.setattr("sys.stdin", io.StringIO("what is\nis this\nwhat\n"))
    assert chat.main([str(saved[0]), "--image", picture, "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert len(towers) == 1
    monkeypatch.setattr(chat, "ENCODED_IMAGES_BYTES", 0)
    monkeypatch.setattr("sys.stdin", io.StringIO("what is\nis this\n"))
    assert chat.main([str(saved[0]), "--image", picture, "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert len(towers) == 1 + 1 + 2  # found too large, and then once a turn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "none.png"], "there is no image file at none.png"),
        (["--video", "none.mp4"], "none.mp4"),
        (["--dtype", "floaty"], "no dtype 'floaty'"),
    ],
)
def test_what_is_wrong_is_one_line(saved, capsys, arguments, message):
    assert chat.main([str(saved[0]), "--query", "what", "--device", "cpu", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_no_model(tmp_path, capsys):
    assert chat.main([str(tmp_path / "none"), "--query", "what", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_pipeline(saved, picture):
    folder, model = saved
    run = pipeline("image-text-to-text", model=str(folder), device="cpu")
    assert type(run.model) is type(model)
    messages = [user(("image", picture), ("text", "what is"))]
    said = run(text=messages, max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert said.split() == expected(model, run.processor, messages).split()
