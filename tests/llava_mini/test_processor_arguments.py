"""Arguments of the processor's call and of its chat template: which reach the tokenizer, and which are refused."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from llava_mini import LlavaMiniConfig, LlavaMiniProcessor
from tests.llava_mini.test_processing import CHAT, IMAGE_TOKEN, SETTINGS

CONTINUED = [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": "what"}]}]


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


@pytest.fixture
def processor(llava_processor):
    return LlavaMiniProcessor.from_llava(llava_processor, LlavaMiniConfig(compressor_size=2))


def test_processor_takes_the_tokenizers_arguments_in_groups_or_alone(processor):
    rows = ["what is this", "what"]
    alone = processor(text=rows, padding=True, pad_to_multiple_of=4, return_tensors="pt")
    grouped = processor(
        text=rows, text_kwargs={"padding": True, "pad_to_multiple_of": 4}, common_kwargs={"return_tensors": "pt"}
    )
    assert alone["input_ids"].shape == (2, 4)
    assert torch.equal(grouped["input_ids"], alone["input_ids"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"do_normalize": False}, "do_normalize=False"),
        ({"images_kwargs": {"do_resize": False}}, "do_resize=False"),
        ({"padding_sid": "left"}, "padding_sid='left'"),
        ({"tiles": 2}, "tiles=2"),
    ],
)
def test_processor_with_an_argument_that_the_tokenizer_does_not_know_raises(processor, image, arguments, message):
    with pytest.raises(TypeError, match=message):
        processor(text="<image> what", images=image, **arguments)


def test_processor_that_would_truncate_placeholders_raises(processor, image):
    with pytest.raises(ValueError, match=r"ids=\[3\] and text=\[4\]"):
        processor(text="<image> what", images=image, truncation=True, max_length=3)


def test_apply_chat_template_passes_the_tokenizers_arguments_on(processor):
    batch = processor.apply_chat_template(CHAT[:1], **SETTINGS, padding=True, pad_to_multiple_of=16)
    assert batch["input_ids"].shape == (1, 16)


@pytest.mark.parametrize("name", ["return_assistant_tokens_mask", "sanitize_control_tokens"])
def test_apply_chat_template_with_an_option_that_it_lacks_raises(processor, name):
    with pytest.raises(TypeError, match=name):
        processor.apply_chat_template(CHAT, **SETTINGS, **{name: True})


def test_apply_chat_template_with_a_template_variable_marks_earlier_answers(processor):
    """The earlier turns must be rendered with the same variable to be found in the chat."""
    without = processor.apply_chat_template(CHAT, **SETTINGS)
    processor.chat_template = "{{ style }} " + processor.chat_template
    batch = processor.apply_chat_template(CHAT, **SETTINGS, style="what is")
    assert batch["input_ids"][0, 2:].tolist() == without["input_ids"][0].tolist()
    assert batch["answer_mask"][0].tolist() == [False, False, *without["answer_mask"][0].tolist()]


def test_apply_chat_template_that_continues_an_answer_marks_all_of_it(processor):
    settings = SETTINGS | {"add_generation_prompt": False, "continue_final_message": True}
    batch = processor.apply_chat_template(CONTINUED, **settings)
    earlier = processor.apply_chat_template(CHAT, **SETTINGS)
    assert batch["input_ids"][0].tolist() == [*earlier["input_ids"][0].tolist(), 4]
    assert batch["answer_mask"][0].tolist() == [*earlier["answer_mask"][0].tolist(), True]


def test_apply_chat_template_of_a_chat_that_starts_with_an_answer_marks_its_message(processor):
    processor.chat_template = processor.chat_template + "{{ messages[0].role[:0] }}"  # needs a first message
    batch = processor.apply_chat_template(CHAT[1:], **SETTINGS)
    assert batch["answer_mask"][0].tolist() == [True] * 4 + [False] * (batch["input_ids"].shape[1] - 4)


def test_apply_chat_template_reads_images_from_an_image_url_and_from_processor_kwargs(processor, image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    question = {"type": "text", "text": "what"}
    expected = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": image}, question]}], **SETTINGS
    )
    processor.chat_template = processor.chat_template.replace("<{{ part.type }}>", "<image>")
    parts = ({"type": "image_url", "image_url": {"url": address}}, {"type": "image"})
    for part, options in zip(parts, ({}, {"processor_kwargs": {"images": [image]}}), strict=True):
        chat = [{"role": "user", "content": [part, question]}]
        batch = processor.apply_chat_template(chat, **SETTINGS, **options)
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
        assert (batch["input_ids"] == IMAGE_TOKEN).sum() == 4


@pytest.mark.parametrize("part", [{"url": "https://example.com/a.mp4"}, {"base64": "AAAA"}])
def test_apply_chat_template_of_a_video_that_is_no_file_raises(processor, part):
    chat = [{"role": "user", "content": [{"type": "video", **part}]}]
    with pytest.raises(ValueError, match=f"videos .*{next(iter(part.values()))}"):
        processor.apply_chat_template(chat, **SETTINGS)
