"""A LLaVA-Mini on the tiny LLaVA, and samples of every kind to train it on."""

import pytest
import torch
from PIL import Image

from experiments.data.samples import Sample, llava_conversation
from experiments.models.from_parts import multimodal_chat_template
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from llava_mini.video import Video


@pytest.fixture
def mini(llava):
    """A LLaVA-Mini on the tiny LLaVA: four visual tokens, one pre-fusion layer."""
    torch.manual_seed(1)
    return LlavaMiniForConditionalGeneration.from_llava(llava, compressor_size=2, prefusion_layers=1)


@pytest.fixture
def mini_processor(processor, mini):
    """The LLaVA-Mini's processor. Its template, unlike the tiny LLaVA's, accepts videos."""
    processor = LlavaMiniProcessor.from_llava(processor, mini.config)
    processor.chat_template = multimodal_chat_template(
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}{{ '<assistant>' if add_generation_prompt }}"
    )
    return processor


@pytest.fixture
def mixed_samples(shapes_split):
    """Four samples with an image, one with text alone, and three with a video of two frames."""

    def clip(level: int) -> Video:
        return Video([Image.new("RGB", (48, 48), (level, i, 0)) for i in (50, 200)])

    text = Sample("t", (), llava_conversation([("is there a ring?", "no")], []), ["x"])
    turns = llava_conversation([("what colour is at row 1 column 2?", "red")], ["<video>"])
    clips = [Sample(f"v{level}", (lambda level=level: clip(level),), turns, ["x"]) for level in (0, 100, 250)]
    return [*(shapes_split.samples[i] for i in range(4)), text, *clips]
