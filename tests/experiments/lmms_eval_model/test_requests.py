"""Requests of lmms-eval as samples, generation options, and published prompts. They need no lmms-eval."""

import math

import pytest
from PIL import Image

from experiments.lmms_eval_model.generation_options import generate_arguments
from experiments.lmms_eval_model.published_prompts import mmbench_prompt, seedbench_image
from experiments.lmms_eval_model.request_samples import VideoSampling, request_sample

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


@pytest.fixture
def folder(tmp_path):
    """A folder of five frames."""
    for i in range(5):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def test_request_sample_puts_images_before_the_prompt_or_at_its_placeholders():
    assert request_sample("r", "which?", [RED, BLUE]).conversations[0]["value"] == "<image>\n<image>\nwhich?"
    assert request_sample("r", "<image> or <image>?", [RED, BLUE]).conversations[0]["value"] == "<image> or <image>?"
    assert request_sample("r", "which?", []).conversations == [{"from": "human", "value": "which?"}]


def test_request_sample_other_number_of_placeholders_raises_value_error():
    with pytest.raises(ValueError, match=r"r: .*<image>"):
        request_sample("r", "<image> or <image>?", [RED])


def test_request_sample_of_a_folder_is_a_video_or_its_frames_as_images(folder):
    video = request_sample("r", "what?", [str(folder)], VideoSampling(frames=3))
    assert video.placeholders == ["<video>"]
    assert len(video.visual_inputs[0]) == 3
    images = request_sample("r", "what?", [str(folder)], VideoSampling(max_frames=2, as_images=True))
    assert images.placeholders == ["<image>", "<image>"]
    file = request_sample("r", "what?", [str(folder / "4.png")])
    assert file.placeholders == ["<image>"]
    assert file.visual_inputs[0].getpixel((0, 0)) == (160, 0, 0)


def test_request_sample_of_sound_raises_value_error():
    with pytest.raises(ValueError, match=r"r: .*dict"):
        request_sample("r", "what?", [{"array": [0.0]}])


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0.2}, True),
        ({"temperature": 0.2, "do_sample": False}, False),
    ],
)
def test_generate_arguments_sample_only_at_a_temperature_above_0(options, sampling):
    arguments, stops = generate_arguments(options)
    assert arguments["do_sample"] is sampling
    assert ("temperature" in arguments) is sampling
    assert stops == []


def test_generate_arguments_wrong_stop_raises_value_error():
    with pytest.raises(ValueError, match=r"until.*3"):
        generate_arguments({"until": 3})


def test_mmbench_prompt_leaves_out_empty_cells():
    row = {"hint": "It is night.", "question": "what?", "A": "sun", "B": "moon", "C": math.nan, "D": None}
    assert mmbench_prompt(row).splitlines()[:-1] == ["It is night.", "what?", "A. sun", "B. moon"]


def test_seedbench_image_is_the_middle_frame_of_a_video():
    assert seedbench_image({"image": [RED, BLUE, RED]})[0].getpixel((0, 0)) == (0, 0, 255)
    assert seedbench_image({"image": [RED]})[0].getpixel((0, 0)) == (255, 0, 0)
