"""Conversations to token ids and labels, through whatever chat template the processor has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from experiments.data.samples import IMAGE_SLOT, Sample

IGNORED = -100
Encoded = dict[str, list[int]]


def messages(sample: Sample) -> list[dict[str, Any]]:
    """LLaVA turns -> transformers chat messages."""
    chat: list[dict[str, Any]] = []
    for turn in sample.conversations:
        text = turn["value"]
        content: list[dict[str, str]] = [{"type": "image"}] * text.count(IMAGE_SLOT)
        content.append({"type": "text", "text": text.replace(IMAGE_SLOT, "").strip()})
        chat.append({"role": "user" if turn["from"] == "human" else "assistant", "content": content})
    return chat


class Encoder:
    """Turns samples into `input_ids` and `labels`; `labels` is -100 but on answers and the end-of-turn token after each.

    Where answers lie is read off the template itself: the text of the chat up to a question, with the header that asks
    for an answer, against the text up to the answer. The text is tokenised once, as a whole. Works with fast tokenizers
    (offsets are needed).

    Raises:
        ValueError: if the template writes earlier turns anew when a later one is added.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token = processor.image_token
        self._visual_tokens: dict[tuple[int, int], int] = {}

    def visual_tokens(self, image: Any) -> int:
        """How many tokens the processor puts in the place of an image of this size: asked of it once for each size."""
        if image.size not in self._visual_tokens:
            ids = self.processor(text=self.image_token, images=image)["input_ids"]
            image_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
            self._visual_tokens[image.size] = torch.as_tensor(ids).eq(image_id).sum().item()
        return self._visual_tokens[image.size]

    def _render(self, chat: list[dict[str, Any]], ask: bool) -> str:
        return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)

    def __call__(self, sample: Sample) -> Encoded:
        chat = messages(sample)
        spans = []
        for end in range(1, len(chat), 2):
            head, whole = self._render(chat[:end], ask=True), self._render(chat[: end + 1], ask=False)
            if not whole.startswith(head):
                raise ValueError(
                    f"sample {sample.id}: the chat template does not write the conversation turn by turn, so its answers "
                    "cannot be found; use a template whose text only grows with each turn"
                )
            spans.append((len(head), len(head) + len(whole[len(head) :].rstrip())))
        text = whole
        if sample.load:
            slot = text.index(self.image_token)
            extra = (self.visual_tokens(sample.image) - 1) * len(self.image_token)
            spans = [(a + extra, b + extra) if a > slot else (a, b) for a, b in spans]
            text = text.replace(self.image_token, self.image_token * (1 + extra // len(self.image_token)))
        coded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        answer = [any(a <= start and stop <= b for a, b in spans) for start, stop in coded["offset_mapping"]]
        ids = coded["input_ids"]
        return {"input_ids": ids, "labels": [i if hit else IGNORED for i, hit in zip(ids, answer, strict=True)]}


class Collator:
    """Encoded samples with their images -> one padded batch of tensors."""

    def __init__(self, processor: ProcessorMixin, side: str = "right") -> None:
        self.image_processor = processor.image_processor
        self.side = side
        pad = processor.tokenizer.pad_token_id
        self._fill: dict[str, int] = {"input_ids": pad, "labels": IGNORED, "attention_mask": 0}

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows: dict[str, Callable[[dict[str, Any]], list[int]]] = {
            "input_ids": lambda x: x["input_ids"],
            "labels": lambda x: x["labels"],
            "attention_mask": lambda x: [1] * len(x["input_ids"]),
        }
        batch = {
            name: pad_sequence([torch.tensor(row(x)) for x in items], True, self._fill[name], padding_side=self.side)
            for name, row in rows.items()
        }
        images = [x["image"] for x in items if x["image"] is not None]
        if images:
            batch |= self.image_processor(images, return_tensors="pt")
        return batch
