"""`python -m llava_mini.chat` and transformers' pipeline, on a model saved with its processor."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPVisionModel, pipeline

from llava_mini import LlavaMiniProcessor, chat
from llava_mini.video import Video


@pytest.fixture
def saved_model(request, tiny_mini, llava_processor, tmp_path):
    model = tiny_mini(**getattr(request, "param", {}))
    model.generation_config.suppress_tokens = [0, 1, 2, 3, 99]  # the answer's text then contains every token
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    LlavaMiniProcessor.from_llava(llava_processor, model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    return str(path)


def expected_answer(model, processor, messages, new=5) -> str:
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(ids, skip_special_tokens=True)


def user_message(*content) -> dict:
    return {"role": "user", "content": [{"type": kind, kind: value} for kind, value in content]}


def test_main_with_a_query_prints_one_answer(saved_model, image_file, capsys):
    folder, model = saved_model
    arguments = [
        str(folder),
        "--image",
        image_file,
        "--query",
        "what is this",
        "--max-new-tokens",
        "5",
        "--device",
        "cpu",
    ]
    assert chat.main(arguments) == 0
    processor = LlavaMiniProcessor.from_pretrained(folder)
    answer = expected_answer(model, processor, [user_message(("image", image_file), ("text", "what is this"))])
    assert capsys.readouterr().out.split() == answer.split()


@pytest.mark.parametrize(
    "saved_model", [{}, {"compressor": "llama_vid"}], ids=["encoded once", "encoded every turn"], indirect=True
)
def test_main_without_a_query_answers_turn_by_turn(saved_model, image_file, capsys, monkeypatch):
    """The second answer depends on the whole chat. Its first turn contains the image."""
    folder, model = saved_model
    monkeypatch.setattr("sys.stdin", io.StringIO("what is\nis this\n"))
    assert chat.main([str(folder), "--image", image_file, "--max-new-tokens", "5", "--device", "cpu"]) == 0
    processor = LlavaMiniProcessor.from_pretrained(folder)
    messages = [user_message(("image", image_file), ("text", "what is"))]
    first = expected_answer(model, processor, messages)
    messages += [{"role": "assistant", "content": [{"type": "text", "text": first}]}, user_message(("text", "is this"))]
    second = expected_answer(model, processor, messages)
    assert capsys.readouterr().out.replace("> ", "").split() == [*first.split(), *second.split()]


def test_main_with_a_plain_llava_answers_turn_by_turn(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("is there a red ring?\nis there a red ring?\n"))
    arguments = ["experiments/assets/tiny", "--image", "experiments/assets/scene.png", "--max-new-tokens", "2"]
    assert chat.main([*arguments, "--device", "cpu"]) == 0
    assert {*capsys.readouterr().out.replace("> ", "").split()} <= {"yes", "no"}


def test_main_without_a_query_encodes_an_image_once(saved_model, image_file, monkeypatch):
    vision_tower_runs = []
    run = CLIPVisionModel.forward
    monkeypatch.setattr(CLIPVisionModel, "forward", lambda *args, **kw: vision_tower_runs.append(1) or run(*args, **kw))
    monkeypatch.setattr("sys.stdin", io.StringIO("what is\nis this\nwhat\n"))
    assert chat.main([str(saved_model[0]), "--image", image_file, "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert len(vision_tower_runs) == 1
    monkeypatch.setattr(chat, "ENCODED_IMAGES_BYTES", 0)
    monkeypatch.setattr("sys.stdin", io.StringIO("what is\nis this\n"))
    assert chat.main([str(saved_model[0]), "--image", image_file, "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert len(vision_tower_runs) == 1 + 1 + 2  # one run exceeds the limit, then there is one a turn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "none.png"], "there is no image file at none.png"),
        (["--video", "none.mp4"], "none.mp4"),
        (["--dtype", "floaty"], "no dtype 'floaty'"),
        (["--video", "none.mp4", "--fps", "2", "--num-frames", "8"], "--fps 2 and --num-frames 8"),
        (["--fps", "2", "--num-frames", "8"], "--fps 2 and --num-frames 8"),
        (["--fps", "0.5"], "--fps 0.5 has no effect without --video"),
        (["--num-frames", "8"], "--num-frames 8 has no effect without --video"),
        (["--video", "none.mp4", "--fps", "0"], "--fps must be a positive number; got 0"),
        (["--video", "none.mp4", "--fps", "nan"], "got nan"),
        (["--video", "none.mp4", "--num-frames", "-1"], "--num-frames must be at least 1; got -1"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1; got 0"),
        (["--query", "what \udce9"], "--query has the surrogate U+DCE9 at character 5"),
        (["--image", "."], "there is no image file at ."),
        (["--device", "toaster"], "--device: 'toaster'"),
        (["--device", "cuda:99"], "--device: 'cuda:99'"),
    ],
)
def test_main_with_a_wrong_argument_prints_one_line(saved_model, capsys, arguments, message):
    assert chat.main([str(saved_model[0]), "--query", "what", "--device", "cpu", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("options", "frames"), [([], 3), (["--fps", "2"], 6), (["--num-frames", "2"], 2)])
def test_main_with_an_animation_samples_its_frames(saved_model, tmp_path, capsys, options, frames):
    path = tmp_path / "a.gif"
    images = [Image.new("RGB", (24, 24), (20 * i, 0, 0)) for i in range(12)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=[100] * 6 + [400] * 6)
    folder, model = saved_model
    arguments = [str(folder), "--video", str(path), "--query", "what", "--max-new-tokens", "5", "--device", "cpu"]
    assert chat.main([*arguments, *options]) == 0
    sampled = Video(path, **({"frames": 2} if "--num-frames" in options else {"fps": frames / 3}))
    assert len(sampled) == frames
    messages = [user_message(("video", Video(list(sampled))), ("text", "what"))]
    answer = expected_answer(model, LlavaMiniProcessor.from_pretrained(folder), messages)
    assert capsys.readouterr().out.split() == answer.split()


def test_main_with_a_folder_of_frames_takes_all(saved_model, tmp_path, capsys):
    frames = tmp_path / "frames"
    frames.mkdir()
    images = [Image.new("RGB", (24, 24), (20 * i, 0, 0)) for i in range(12)]
    for i, image in enumerate(images):
        image.save(frames / f"frame{i}.png")
    folder, model = saved_model
    arguments = [str(folder), "--video", str(frames), "--query", "what", "--max-new-tokens", "5", "--device", "cpu"]
    assert chat.main(arguments) == 0
    messages = [user_message(("video", Video(images)), ("text", "what"))]
    answer = expected_answer(model, LlavaMiniProcessor.from_pretrained(folder), messages)
    assert capsys.readouterr().out.split() == answer.split()
    assert chat.main([*arguments, "--fps", "2"]) == 1
    assert f"frame rate of {frames} is unknown" in capsys.readouterr().err


def test_main_without_the_model_prints_one_line(tmp_path, capsys):
    assert chat.main([str(tmp_path / "none"), "--query", "what", "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_pipeline_answers_as_generate(saved_model, image_file):
    folder, model = saved_model
    run = pipeline("image-text-to-text", model=str(folder), device="cpu")
    assert type(run.model) is type(model)
    messages = [user_message(("image", image_file), ("text", "what is"))]
    answer = run(text=messages, max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert answer.split() == expected_answer(model, run.processor, messages).split()
