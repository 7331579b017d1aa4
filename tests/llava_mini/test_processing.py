from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from llava_mini import LlavaMiniConfig, LlavaMiniProcessor

IMAGE_TOKEN = 99  # as in conftest.py
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture
def llava_processor():
    words = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "user", "assistant", ":"]
    tokenizer = Tokenizer(
        WordLevel({word: i for i, word in enumerate(words)} | {"<image>": IMAGE_TOKEN}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    size = {"height": 24, "width": 24}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size),
        tokenizer=fast,
        patch_size=6,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


def placeholders(batch) -> list[int]:
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
def test_an_image_takes_the_tokens_the_language_model_sees(llava_processor, image, tmp_path, fields, expected):
    config = LlavaMiniConfig(**fields)
    LlavaMiniProcessor.from_llava(llava_processor, config).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is LlavaMiniProcessor
    texts = ["what is <image>", "<image> what is this"]
    batch = processor(images=[image, image], text=texts, padding=True, return_tensors="pt")
    assert placeholders(batch) == [expected, expected]
    assert expected == config.num_visual_tokens(16)
    original = llava_processor(images=[image, image], text=texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], original["pixel_values"])
    words = batch["input_ids"][:, : batch["attention_mask"].sum(1).min()]
    assert words[0, :2].tolist() == [4, 5]
    assert processor._get_num_multimodal_tokens([[40, 30], [9, 9]]).num_image_tokens == [expected] * 2


def test_chat_template_to_generation(llava_processor, image, tiny_mini):
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
    new = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert new.shape[1] == batch["input_ids"].shape[1] + 3


def test_text_without_images(llava_processor):
    processor = LlavaMiniProcessor.from_llava(llava_processor, LlavaMiniConfig())
    assert processor(text="what is this")["input_ids"] == [[4, 5, 6]]
