"""Questions for the tiny model families, with a chat template of each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from PIL import Image

from experiments.data.samples import Sample, llava_conversation
from experiments.models.blip_2_prompts import Blip2ChatProcessor
from tests.probes.tokens.families.build import TinyFamily, tiny

CHAT_TEMPLATE = (
    "{% for message in messages %}<bos>{{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% if message.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant {% endif %}"
)
IMAGE_SIZES = [(40, 24), (24, 32), (33, 30), (20, 60), (30, 30), (50, 24)]  # wide, tall, small and square


def chat_family(name: str, monkeypatch: pytest.MonkeyPatch) -> TinyFamily:
    """Return a tiny family whose processor has a chat template."""
    family = tiny(name)
    if name == "blip_2":  # its own processor has no chats
        own = family.processor
        return replace(family, processor=Blip2ChatProcessor(own.image_processor, own.tokenizer, num_query_tokens=4))
    monkeypatch.setattr(family.processor, "chat_template", CHAT_TEMPLATE.replace("IMAGE", family.mark))
    if name == "smolvlm":  # its apply_chat_template reads them, and the stand-in of its video processor lacks them
        monkeypatch.setattr(family.processor.video_processor, "num_frames", 1, raising=False)
        monkeypatch.setattr(family.processor.video_processor, "fps", 1, raising=False)
    return family


def noise_image(index: int, size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8))


def image_questions() -> list[Sample]:
    """Return six questions of unequal length about images of unequal size; the answers are "a" and "b" in turn."""
    return [
        Sample(
            str(index),
            (partial(noise_image, index, size),),
            llava_conversation([(f"what is it{'x' * index}?", "ab"[index % 2])]),
            ["x"],
        )
        for index, size in enumerate(IMAGE_SIZES)
    ]
