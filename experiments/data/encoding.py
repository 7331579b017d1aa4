"""Conversations to token ids and labels, through whatever chat template the processor has."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from experiments.data.samples import IMAGE_SLOT, SLOT, VIDEO_SLOT, Sample
from llava_mini import LlavaMiniProcessor

IGNORED = -100
Encoded = dict[str, Any]
Spans = list[tuple[int, int]]  # of characters


def messages(sample: Sample) -> list[dict[str, Any]]:
    """LLaVA turns -> transformers chat messages.

    A turn's only picture goes before its text, as LLaVA's own training code has it; several stay where they are.
    """
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "content": _content(turn["value"])} for turn in sample.conversations]


def _content(text: str) -> list[dict[str, str]]:
    slots = SLOT.findall(text)
    if len(slots) == 1:
        parts = [slots[0], SLOT.sub("", text).strip()]
    else:  # a template writes the line break after a picture
        parts = re.split(rf"({SLOT.pattern})\n?", text.strip())
    types = {IMAGE_SLOT: "image", VIDEO_SLOT: "video"}
    return [{"type": types[part]} if part in types else {"type": "text", "text": part} for part in parts if part]


class Encoder:
    """Turns samples into `input_ids`, `labels` and pictures; `labels` is -100 but on answers and the end-of-turn token
    after each.

    Where answers lie is read off the template itself: the text of the chat up to a question, with the header that asks
    for an answer, against the text up to the answer. The text is tokenised once, as a whole, with the start token if
    the template leaves it to the tokenizer. Works with fast tokenizers (offsets are needed).

    The pictures of a LLaVA-Mini's processor come as `pixel_values`, a stream that is read when a batch is put together,
    and their `visual_layout`; those of any other, which must be images, as `images`.

    Raises:
        ValueError: if the template writes earlier turns anew when a later one is added, or leaves a picture out, or the
            processor takes no videos and the sample has one.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token = processor.image_token
        self._visual_tokens: dict[tuple[int, int], int] = {}

    def __call__(self, sample: Sample) -> Encoded:
        text, answers = self._render(sample)
        for token, slot in ((self.image_token, IMAGE_SLOT), (VIDEO_SLOT, VIDEO_SLOT)):
            if (written := text.count(token)) != (needed := sample.slots.count(slot)):
                raise ValueError(
                    f"sample {sample.id}: the chat template writes {written} {token} where the sample has {needed} {slot}"
                )
        bos = self.tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        encode = self._mini if isinstance(self.processor, LlavaMiniProcessor) else self._plain
        ids, is_answer, pictures = encode(sample, text, answers, special)
        labels = [i if hit else IGNORED for i, hit in zip(ids, is_answer, strict=True)]
        return {"input_ids": ids, "labels": labels, **pictures}

    def _render(self, sample: Sample) -> tuple[str, Spans]:
        """The conversation as text, and where in it the answers are."""
        chat = messages(sample)
        text, answers = "", []
        for end in range(1, len(chat), 2):
            head = self.processor.apply_chat_template(chat[:end], tokenize=False, add_generation_prompt=True)
            text = self.processor.apply_chat_template(chat[: end + 1], tokenize=False)
            if not text.startswith(head):
                raise ValueError(
                    f"sample {sample.id}: the chat template does not write the conversation turn by turn, so its answers "
                    "cannot be found; use a template whose text only grows with each turn"
                )
            answers.append((len(head), len(text.rstrip())))
        return text, answers

    def _mini(
        self, sample: Sample, text: str, answers: Spans, special: bool
    ) -> tuple[list[int], list[bool], dict[str, Any]]:
        coded = self.processor(
            text=[text],
            images=[p for p in sample.pictures if isinstance(p, Image.Image)],
            videos=[p for p in sample.pictures if not isinstance(p, Image.Image)],
            answer_spans=[answers],
            stream=True,
            add_special_tokens=special,
        )
        pictures = {name: coded[name] for name in ("pixel_values", "visual_layout") if name in coded}
        return coded["input_ids"][0], coded["answer_mask"][0], pictures

    def _plain(
        self, sample: Sample, text: str, answers: Spans, special: bool
    ) -> tuple[list[int], list[bool], dict[str, Any]]:
        if VIDEO_SLOT in sample.slots:
            name = type(self.processor).__name__
            raise ValueError(f"sample {sample.id}: a {name} takes images, not videos; LLaVA-Mini takes both")
        counts = [self.visual_tokens(image) for image in sample.pictures]

        def stretch(part: str) -> str:
            """The start of the text, with as many image tokens for each image as it takes."""
            each = iter(counts)
            return re.sub(re.escape(self.image_token), lambda slot: slot[0] * next(each), part)

        spans = [(len(stretch(text[:a])), len(stretch(text[:b]))) for a, b in answers]
        coded = self.tokenizer(stretch(text), return_offsets_mapping=True, add_special_tokens=special)
        is_answer = [any(a <= start and stop <= b for a, b in spans) for start, stop in coded["offset_mapping"]]
        return coded["input_ids"], is_answer, {"images": sample.pictures}

    def visual_tokens(self, image: Any) -> int:
        """How many tokens the processor puts in the place of an image of this size: asked of it once for each size."""
        if image.size not in self._visual_tokens:
            ids = self.processor(text=self.image_token, images=image)["input_ids"]
            image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
            self._visual_tokens[image.size] = torch.as_tensor(ids).eq(image_id).sum().item()
        return self._visual_tokens[image.size]


def on_answers(inputs: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], Int[torch.Tensor, "batch last"]]:
    """What to call a model with for logits of a batch at its last positions alone, and the labels there.

    They are from the first position on that predicts a labelled token in any row. What is ahead of it, pictures most of
    all, predicts nothing that is asked for, and a large vocabulary's logits there would cost more than some of the
    layers. A LLaVA-Mini is told apart what to leave unfused, which it would read off the labels of all positions.
    """
    labels = inputs["labels"]
    first = int((labels != IGNORED).any(0).int().argmax())  # 0 where there is no label at all
    # Named one by one: of a slice, a language model's head without gradients copies its weights for every row of the batch.
    kept = torch.arange(max(first - 1, 0), labels.shape[1], device=labels.device)
    unfused = {"answer_mask": labels != IGNORED} if "visual_layout" in inputs else {}
    asked = {name: value for name, value in inputs.items() if name != "labels"}
    return asked | unfused | {"logits_to_keep": kept}, labels[:, kept]


class Collator:
    """Encoded samples -> one padded batch of tensors with the pixels of their pictures."""

    def __init__(self, processor: ProcessorMixin, side: str = "right") -> None:
        self.image_processor = processor.image_processor
        self.side = side
        pad = processor.tokenizer.pad_token_id
        self._fill: dict[str, int] = {"input_ids": pad, "labels": IGNORED, "attention_mask": 0}

    def __call__(self, items: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        rows: dict[str, Callable[[Encoded], list[int]]] = {
            "input_ids": lambda x: x["input_ids"],
            "labels": lambda x: x["labels"],
            "attention_mask": lambda x: [1] * len(x["input_ids"]),
        }
        batch = {
            name: pad_sequence([torch.tensor(row(x)) for x in items], True, self._fill[name], padding_side=self.side)
            for name, row in rows.items()
        }
        if images := [image for x in items for image in x.get("images", ())]:
            batch |= self.image_processor(images, return_tensors="pt")
        if crops := [frame for x in items for frame in x.get("pixel_values", ())]:
            batch["pixel_values"] = torch.cat(crops)
        if shown := [(i, x["visual_layout"]) for i, x in enumerate(items) if "visual_layout" in x]:
            batch["visual_layout"] = torch.cat([layout + torch.tensor([i, 0, 0]) for i, layout in shown])
        return batch
