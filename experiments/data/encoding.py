"""Token ids and labels of conversations, through the chat template of the processor, and batches of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from experiments.data.samples import IMAGE_PLACEHOLDER, PLACEHOLDER, VIDEO_PLACEHOLDER, Sample
from llava_mini import LlavaMiniProcessor

IGNORE_INDEX = -100
EncodedSample = dict[str, Any]
CharacterSpans = list[tuple[int, int]]  # (start, end)


def chat_messages(sample: Sample) -> list[dict[str, Any]]:
    """Convert a sample's LLaVA turns to transformers' chat messages.

    A turn's only image goes before its text, as in LLaVA's training code. Several images keep their positions.
    """
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "content": _message_content(turn["value"])} for turn in sample.conversations]


def _message_content(text: str) -> list[dict[str, str]]:
    placeholders = PLACEHOLDER.findall(text)
    if len(placeholders) == 1:
        parts = [placeholders[0], PLACEHOLDER.sub("", text).strip()]
    else:  # the line break after an image is left to the template
        parts = re.split(rf"({PLACEHOLDER.pattern})\n?", text.strip())
    types = {IMAGE_PLACEHOLDER: "image", VIDEO_PLACEHOLDER: "video"}
    return [{"type": types[part]} if part in types else {"type": "text", "text": part} for part in parts if part]


class SampleEncoder:
    """Encodes samples to `input_ids`, `labels` and visual inputs.

    `labels` is -100 everywhere but on answers and the end-of-turn token after each. Answer positions come from the
    template: the chat rendered up to a question, with the header of an answer, is compared with the chat rendered up to
    the answer. The whole text is tokenised once, with the start token if the template leaves it to the tokenizer. The
    tokenizer must be a fast one, since offsets are needed.

    With a LLaVA-Mini processor, an item holds `pixel_values`, a stream that is read when a batch is collated, and
    `visual_layout`. With any other processor it holds `images`.

    Args:
        processor: The model's processor.

    Raises:
        ValueError: On a call, if the template rewrites earlier turns or omits an image, or if a sample has a video and
            the processor accepts none.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token = processor.image_token
        self._token_counts: dict[tuple[int, int], int] = {}  # by image size

    def __call__(self, sample: Sample) -> EncodedSample:
        """Return the encoded sample: `input_ids`, `labels` and the keys of its visual inputs."""
        text, answers = self._render(sample)
        for token, placeholder in ((self.image_token, IMAGE_PLACEHOLDER), (VIDEO_PLACEHOLDER, VIDEO_PLACEHOLDER)):
            if (written := text.count(token)) != (needed := sample.placeholders.count(placeholder)):
                raise ValueError(
                    f"sample {sample.id}: the chat template writes {written} {token} where the sample has {needed} "
                    f"{placeholder}; use a template that writes every image and video"
                )
        bos = self.tokenizer.bos_token
        add_special_tokens = not (bos and text.startswith(bos))
        encode = self._encode_for_llava_mini if isinstance(self.processor, LlavaMiniProcessor) else self._encode
        ids, is_answer, visual_inputs = encode(sample, text, answers, add_special_tokens)
        labels = [i if in_answer else IGNORE_INDEX for i, in_answer in zip(ids, is_answer, strict=True)]
        return {"input_ids": ids, "labels": labels, **visual_inputs}

    def _render(self, sample: Sample) -> tuple[str, CharacterSpans]:
        """Return the conversation as text, and the spans of its answers."""
        messages = chat_messages(sample)
        text, answers = "", []
        for end in range(1, len(messages), 2):
            prompt = self.processor.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=True)
            text = self.processor.apply_chat_template(messages[: end + 1], tokenize=False)
            if not text.startswith(prompt):
                raise ValueError(
                    f"sample {sample.id}: the chat template does not write the conversation turn by turn, so its answers "
                    "cannot be located; use a template that only appends text with each turn"
                )
            answers.append((len(prompt), len(text.rstrip())))
        return text, answers

    def _encode_for_llava_mini(
        self, sample: Sample, text: str, answers: CharacterSpans, add_special_tokens: bool
    ) -> tuple[list[int], list[bool], dict[str, Any]]:
        encoded = self.processor(
            text=[text],
            images=[visual for visual in sample.visual_inputs if isinstance(visual, Image.Image)],
            videos=[visual for visual in sample.visual_inputs if not isinstance(visual, Image.Image)],
            answer_spans=[answers],
            stream=True,
            add_special_tokens=add_special_tokens,
        )
        visual_inputs = {name: encoded[name] for name in ("pixel_values", "visual_layout") if name in encoded}
        return encoded["input_ids"][0], encoded["answer_mask"][0], visual_inputs

    def _encode(
        self, sample: Sample, text: str, answers: CharacterSpans, add_special_tokens: bool
    ) -> tuple[list[int], list[bool], dict[str, Any]]:
        if VIDEO_PLACEHOLDER in sample.placeholders:
            name = type(self.processor).__name__
            raise ValueError(f"sample {sample.id}: a {name} accepts images, not videos; LLaVA-Mini accepts both")
        token_counts = [self.image_token_count(image) for image in sample.visual_inputs]

        def expand_image_tokens(prefix: str) -> str:
            """Repeat the image token of each image in a prefix of the text as often as the image needs."""
            counts = iter(token_counts)
            return re.sub(re.escape(self.image_token), lambda match: match[0] * next(counts), prefix)

        spans = [(len(expand_image_tokens(text[:a])), len(expand_image_tokens(text[:b]))) for a, b in answers]
        encoded = self.tokenizer(
            expand_image_tokens(text), return_offsets_mapping=True, add_special_tokens=add_special_tokens
        )
        is_answer = [any(a <= start and stop <= b for a, b in spans) for start, stop in encoded["offset_mapping"]]
        return encoded["input_ids"], is_answer, {"images": sample.visual_inputs}

    def image_token_count(self, image: Any) -> int:
        """Return how many tokens the processor inserts for an image. The processor runs once per image size."""
        if image.size not in self._token_counts:
            ids = self.processor(text=self.image_token, images=image)["input_ids"]
            image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
            self._token_counts[image.size] = torch.as_tensor(ids).eq(image_id).sum().item()
        return self._token_counts[image.size]


def restrict_to_answers(
    inputs: Mapping[str, torch.Tensor],
) -> tuple[dict[str, Any], Int[torch.Tensor, "batch last"]]:
    """Restrict the logits of a batch to the last positions, which hold the answers.

    The logits start at the first position that predicts a labelled token in any row. Earlier positions, mostly images,
    predict nothing that is labelled. With a large vocabulary their logits would cost more than some of the layers.

    Args:
        inputs: A batch with `labels` (batch, positions).

    Returns:
        The inputs of the model, with `logits_to_keep` and without `labels`, and the labels at the kept positions. A
        LLaVA-Mini also gets `answer_mask`: it must not fuse answers, and would otherwise read them off all labels.
    """
    labels = inputs["labels"]
    first = int((labels != IGNORE_INDEX).any(0).int().argmax())  # 0 where there is no label at all
    # As indices: given a slice, a language model's head without gradients copies its weights for every row of the batch.
    kept_positions = torch.arange(max(first - 1, 0), labels.shape[1], device=labels.device)
    answer_mask = {"answer_mask": labels != IGNORE_INDEX} if "visual_layout" in inputs else {}
    model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
    return model_inputs | answer_mask | {"logits_to_keep": kept_positions}, labels[:, kept_positions]


class Collator:
    """Collates encoded samples into one padded batch of tensors with the pixels of their images.

    Args:
        processor: The model's processor.
        side: The padding side, "left" or "right".
    """

    def __init__(self, processor: ProcessorMixin, side: str = "right") -> None:
        self.image_processor = processor.image_processor
        self.side = side
        pad = processor.tokenizer.pad_token_id
        self._padding_values: dict[str, int] = {"input_ids": pad, "labels": IGNORE_INDEX, "attention_mask": 0}

    def __call__(self, items: Sequence[EncodedSample]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels`, `attention_mask` and, unless all is text, `pixel_values`."""
        columns: dict[str, Callable[[EncodedSample], list[int]]] = {
            "input_ids": lambda item: item["input_ids"],
            "labels": lambda item: item["labels"],
            "attention_mask": lambda item: [1] * len(item["input_ids"]),
        }
        batch = {
            name: pad_sequence(
                [torch.tensor(column(item)) for item in items],
                True,
                self._padding_values[name],
                padding_side=self.side,
            )
            for name, column in columns.items()
        }
        if images := [image for item in items for image in item.get("images", ())]:
            batch |= self.image_processor(images, return_tensors="pt")
        if crops := [frame for item in items for frame in item.get("pixel_values", ())]:
            batch["pixel_values"] = torch.cat(crops)
        if layouts := [(i, item["visual_layout"]) for i, item in enumerate(items) if "visual_layout" in item]:
            batch["visual_layout"] = torch.cat([layout + torch.tensor([i, 0, 0]) for i, layout in layouts])
        return batch
