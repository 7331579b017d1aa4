"""Inputs of `generate` for a batch of prompts that may mix images, videos and text alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from experiments.data.encoding import chat_messages
from experiments.data.media_files import with_orientation_of
from experiments.data.samples import Sample
from llava_mini import LlavaMiniProcessor
from llava_mini.chat_templates import starts_with_bos


def prompt_inputs(processor: ProcessorMixin, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the inputs of a left-padded batch, one row for each sample, up to the header of its answer.

    Args:
        processor: The model's processor.
        samples: Samples without answers.

    Returns:
        Tensors. A LLaVA-Mini gets `pixel_values` as a stream, so that a long video is never in memory as a whole.

    Raises:
        ValueError: If the processor refuses a sample.
    """
    samples = [with_orientation_of(processor, sample) for sample in samples]
    texts = [
        processor.apply_chat_template(chat_messages(sample), add_generation_prompt=True, tokenize=False)
        for sample in samples
    ]
    loaded = [sample.visual_inputs for sample in samples]
    images = [[v for v in visual_inputs if isinstance(v, Image.Image)] for visual_inputs in loaded]
    visual: dict[str, Any] = {"images": images if any(images) else None}
    if isinstance(processor, LlavaMiniProcessor):
        videos = [[v for v in visual_inputs if not isinstance(v, Image.Image)] for visual_inputs in loaded]
        visual |= {"videos": videos, "stream": True}
    return dict(
        processor(
            text=texts,
            **visual,
            add_special_tokens=not starts_with_bos(processor.tokenizer, texts[0]),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
    )
