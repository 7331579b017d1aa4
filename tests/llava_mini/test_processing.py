"""Processor: placeholders, pixels, layout and answer masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor

from llava_mini import LlavaMiniConfig, LlavaMiniProcessor
from llava_mini.video import Video

IMAGE_TOKEN = 99  # as in conftest.py


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def count_placeholders(batch) -> list[int]:
    """Count the placeholders of each row."""
    return (batch["input_ids"] == IMAGE_TOKEN).sum(dim=1).tolist()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 1),
        ({"compressor_size": 3}, 9),
        ({"compressor": "average", "compressor_size": 2}, 4),
        ({"compressor": "none"}, 16),
    ],
)
def test_processor_gives_an_image_one_placeholder_for_each_visual_token(
    llava_processor, image, tmp_path, fields, expected
):
    config = LlavaMiniConfig(**fields)
    LlavaMiniProcessor.from_llava(llava_processor, config).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is LlavaMiniProcessor
    texts = ["what is <image>", "<image> what is this"]
    batch = processor(images=[image, image], text=texts, padding=True, return_tensors="pt")
    assert count_placeholders(batch) == [expected, expected]
    assert expected == config.num_visual_tokens(16)
    original = llava_processor(images=[image, image], text=texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], original["pixel_values"])
    words = batch["input_ids"][:, : batch["attention_mask"].sum(1).min()]
    assert words[0, :2].tolist() == [4, 5]
    assert processor._get_num_multimodal_tokens([[40, 30], [9, 9]]).num_image_tokens == [expected] * 2


def test_apply_chat_template_gives_inputs_for_generate(llava_processor, image, tiny_mini):
    model = tiny_mini()
    processor = LlavaMiniProcessor.from_llava(llava_processor, model.config)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this"}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert batch["input_ids"].tolist() == [[7, 9, *[IMAGE_TOKEN] * 4, 4, 5, 6, 8, 9]]
    sequences = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert sequences.shape[1] == batch["input_ids"].shape[1] + 3


def test_processor_of_text_alone_returns_its_ids(llava_processor):
    processor = LlavaMiniProcessor.from_llava(llava_processor, LlavaMiniConfig())
    assert processor(text="what is this")["input_ids"] == [[4, 5, 6]]


def random_image(seed: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def process_images(processor, *images) -> torch.Tensor:
    return processor.image_processor(list(images), return_tensors="pt")["pixel_values"]


@pytest.fixture
def processor(llava_processor):
    return LlavaMiniProcessor.from_llava(llava_processor, LlavaMiniConfig(compressor_size=2))


def test_processor_puts_images_and_videos_in_the_order_of_the_text(processor):
    """Images and videos have the same placeholder, and the layout assigns them to rows."""
    a, b, c = random_image(1), random_image(2), random_image(3)
    video = Video([random_image(4), random_image(5), random_image(6)])
    batch = processor(
        text=["what <image> is <video> this", "what is this", "<image> this <image> what"],
        images=[a, [b, c]],
        videos=[video],
        padding=True,
        return_tensors="pt",
    )
    assert count_placeholders(batch) == [4 + 12, 0, 8]
    assert batch["visual_layout"].tolist() == [[0, 1, 1], [0, 3, 1], [2, 1, 1], [2, 1, 1]]
    assert torch.equal(batch["pixel_values"], process_images(processor, a, *video, b, c))
    is_token = batch["attention_mask"][0] == 1
    assert batch["input_ids"][0][is_token].tolist() == [4, *[IMAGE_TOKEN] * 4, 5, *[IMAGE_TOKEN] * 12, 6]


def test_processor_with_lists_for_rows_checks_each_row(processor, image):
    text = ["<image> what", "<image> <image> is this"]
    images = [[image], [image, image]]
    assert processor(text=text, images=images, padding=True)["visual_layout"][:, 0].tolist() == [0, 1, 1]
    # Without text there are no rows to fit.
    assert processor(images=images)["visual_layout"][:, 0].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"images: .*\[2, 1\].*\[1, 2\]"):
        processor(text=text, images=images[::-1], padding=True)
    with pytest.raises(ValueError, match=r"videos: .*\[0, 1\].*\[1, 0\]"):
        processor(text=["<video> what", "what"], videos=[[], [Video([image])]], padding=True)


def test_processor_of_a_list_of_frames_reads_one_video(processor, image):
    """As transformers' processors of other families do."""
    for videos in ([image] * 3, [[image] * 3], [[[image] * 3]], [[Video([image] * 3)]]):
        assert processor(text="<video> what", videos=videos)["visual_layout"].tolist() == [[0, 3, 1]]


def test_processor_with_tiles_and_padding_pads_before_it_cuts(llava_processor):
    """The crops are in row-major order and end with the whole image."""
    config = LlavaMiniConfig(compressor="none")
    processor = LlavaMiniProcessor.from_llava(llava_processor, config, tiles=2, pad_to_square=True)
    wide = random_image(1, (48, 24))
    batch = processor(text="<image> what", images=wide, return_tensors="pt")
    assert batch["visual_layout"].tolist() == [[0, 1, 2]]
    assert count_placeholders(batch) == [4 * 16]
    square = Image.new("RGB", (48, 48), tuple(int(255 * x) for x in processor.image_processor.image_mean))
    square.paste(wide, (0, 12))
    boxes = [(0, 0, 24, 24), (24, 0, 48, 24), (0, 24, 24, 48), (24, 24, 48, 48), (0, 0, 48, 48)]
    assert torch.equal(batch["pixel_values"], process_images(processor, *(square.crop(box) for box in boxes)))


def test_processor_squashes_frames_and_crops_images(processor):
    wide = Image.new("RGB", (48, 24), "red")
    wide.paste("blue", (0, 0, 12, 24))  # the left quarter is cropped from an image and stays in a frame
    batch = processor(text="<image> <video>", images=wide, videos=Video([wide]), return_tensors="pt")
    image, frame = batch["pixel_values"]
    assert (image[0] == image[0, 0, 0]).all()
    assert torch.equal(frame[0, :, :6], frame[0, :1, :1].expand(24, 6))
    assert (frame[0, :, 6:] == image[0, 0, 0]).all()


def test_processor_with_stream_yields_the_same_pixels(processor, tiny_mini):
    arguments = {
        "text": "<image> what <video>",
        "images": random_image(1),
        "videos": Video([random_image(i) for i in range(5)]),
    }
    whole = processor(**arguments, return_tensors="pt")
    stream = processor(**arguments, return_tensors="pt", stream=True).to("cpu")
    for _ in range(2):
        assert torch.equal(torch.cat(list(stream["pixel_values"])), whole["pixel_values"])
    model = tiny_mini()
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "num_beams": 2}
    assert torch.equal(model.generate(**stream, **settings), model.generate(**whole, **settings))


CHAT = [
    {"role": "user", "content": [{"type": "image", "image": random_image(1)}, {"type": "text", "text": "what is"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "this is"}]},
    {"role": "user", "content": [{"type": "text", "text": "this"}]},
]
SETTINGS = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


@pytest.mark.parametrize("side", ["left", "right"])
def test_apply_chat_template_marks_earlier_answers(processor, side):
    chats = [CHAT, CHAT[:1]]
    batch = processor.apply_chat_template(chats, **SETTINGS, padding=True, padding_side=side)
    first = [7, 9, *[IMAGE_TOKEN] * 4, 4, 5, 8, 9, 6, 5, 7, 9, 6, 8, 9]
    assert batch["input_ids"][0].tolist() == first
    answers = torch.zeros(len(first), dtype=torch.bool)
    answers[10:12] = True  # "this is"
    assert torch.equal(batch["answer_mask"], torch.stack([answers, torch.zeros_like(answers)]))
    assert "answer_mask" not in processor.apply_chat_template(CHAT[:1], **SETTINGS)


def test_apply_chat_template_with_fuse_answers_fuses_earlier_answers(processor, tiny_mini):
    model = tiny_mini()
    marked = processor.apply_chat_template(CHAT, **SETTINGS)
    processor.fuse_answers = True
    unmarked = processor.apply_chat_template(CHAT, **SETTINGS)
    assert "answer_mask" not in unmarked
    raw = model.get_input_embeddings()(marked["input_ids"])
    with torch.no_grad():
        marked_embeds, fused_embeds = model.model.fuse(**marked)[0], model.model.fuse(**unmarked)[0]
    answers = marked["answer_mask"]
    assert torch.equal(marked_embeds[answers], raw[answers])
    assert (fused_embeds[answers] != raw[answers]).any(dim=-1).all()
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE_TOKEN]}
    sequences = [model.generate(**marked, **settings, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*sequences)


def test_processor_of_images_without_text_gives_each_a_row(processor):
    batch = processor(images=[random_image(1), random_image(2)])
    assert batch["visual_layout"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert set(batch) == {"pixel_values", "visual_layout"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "<image> what", "images": []}, "1 <image> .*0 images"),
        ({"text": "what", "images": [random_image(1)]}, "0 <image> .*1 images"),
        ({"text": "<video>", "images": [random_image(1)]}, "0 <image> .*1 images"),
        ({"text": "<video>"}, "1 <video> .*0 videos"),
    ],
)
def test_processor_with_a_wrong_number_of_images_raises(processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        processor(**arguments)


def test_apply_chat_template_passes_processor_kwargs_on(processor, image):
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what"}]}]
    expected = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    given = {"return_tensors": "pt", "add_special_tokens": False}
    found = processor.apply_chat_template(chat, tokenize=True, return_dict=True, processor_kwargs=given)
    assert torch.equal(found["input_ids"], expected["input_ids"])


def test_apply_chat_template_of_a_message_without_its_image_raises(processor):
    with pytest.raises(ValueError, match="message part of type 'image'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=True)


def test_apply_chat_template_that_rewrites_earlier_turns_raises(processor):
    processor.chat_template = "{{ messages | length }} " + processor.chat_template
    with pytest.raises(ValueError, match=r"turn by turn.*fuse_answers=True"):
        processor.apply_chat_template(CHAT, **SETTINGS)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("what \ud800 is", r"the text has the surrogate U\+D800 at character 5 "),
        ("\udfff", r"U\+DFFF at character 0 "),
        ("<image> what \udce9", r"U\+DCE9 at character 13 "),  # the text's position, not that of its placeholders
        ("\ud83d\ude00", r"U\+D83D at character 0 "),  # two halves of an emoji that were not joined
        (["what is", "this \udc80"], r"row 1 of the text .*U\+DC80 at character 5 "),
    ],
)
def test_processor_of_a_text_with_a_surrogate_names_its_position(processor, text, where):
    images = [random_image(1)] * str(text).count("<image>")
    with pytest.raises(ValueError, match=where) as caught:
        processor(text=text, images=images)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # the message can be printed


@pytest.mark.parametrize(
    ("chats", "where"),
    [
        ([{"role": "user", "content": "is \ud800"}], r"message 0 .*U\+D800 at character 3 "),
        ([*CHAT[:2], {"role": "user", "content": [{"type": "text", "text": "\udc00"}]}], r"message 2, part 0,.*DC00"),
        ([CHAT[:1], [{"role": "system", "content": "a\udcff"}, *CHAT[:1]]], r"message 0 of chat 1 .*character 1 "),
    ],
)
def test_apply_chat_template_of_a_text_with_a_surrogate_names_its_message(processor, chats, where):
    for options in ({}, {"tokenize": True}):
        with pytest.raises(ValueError, match=where):
            processor.apply_chat_template(chats, **options)


def test_processor_of_text_beyond_the_basic_plane_tokenizes_it(processor):
    assert processor(text="what 😀 \u0000 is é")["input_ids"] == [[4, 3, 3, 5, 3]]


def test_processor_with_fps_for_a_sampled_video_raises(processor):
    for options in ({"fps": 2}, {"num_frames": 2}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=2.*already sampled"):
            processor(text="<video>", videos=Video([random_image(1)]), **options)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.one_of(
        st.tuples(st.integers(1, 60), st.integers(1, 60)), st.sampled_from([(4000, 20), (20, 4000), (1, 900)])
    ),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"]),
    tiles=st.integers(1, 3),
    pad=st.booleans(),
)
def test_processor_of_any_image_returns_finite_pixels(llava_processor, size, mode, tiles, pad):
    config = LlavaMiniConfig()
    processor = LlavaMiniProcessor.from_llava(llava_processor, config, tiles=tiles, pad_to_square=pad)
    batch = processor(text="<image> what <video>", images=Image.new(mode, size), videos=Video([Image.new(mode, size)]))
    assert batch["pixel_values"].shape == (2 * (1 if tiles == 1 else tiles**2 + 1), 3, 24, 24)
    assert batch["pixel_values"].isfinite().all()
