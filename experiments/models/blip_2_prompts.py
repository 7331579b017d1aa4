"""Prompts of BLIP-2, whose own processor has no chat template and writes the visual tokens before every text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, Blip2Processor

# The prompt of BLIP-2 with OPT for questions (arXiv 2301.12597, section 4.1). Its generation ends at a line break.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{%- for part in message.content if part.type == 'image' -%}IMAGE{%- endfor -%}"
    "{{- 'Question: ' if message.role == 'user' else ' Answer: ' -}}"
    "{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}"
    "{{- '\n' if message.role == 'assistant' -}}{%- endfor -%}{{- ' Answer:' if add_generation_prompt -}}"
)


class Blip2ChatProcessor(Blip2Processor):
    """BLIP-2's processor for texts from a chat template, which begin with the image token.

    The token ids of a text are those of BLIP-2's own processor: the query tokens, then the text with its start token.
    Padding on the left comes before the query tokens, and not between them and the text.

    Args:
        image_processor: BLIP-2's image processor.
        tokenizer: Tokenizer of the language model.
        num_query_tokens: Query tokens of an image; files of some checkpoints lack them.
        chat_template: Chat template, which writes the image token first; by default BLIP-2's prompt for questions.

    Example:
        >>> from transformers import BlipImageProcessorPil
        >>> blip_2 = Blip2ChatProcessor(BlipImageProcessorPil(), processor.tokenizer, num_query_tokens=32)
        >>> parts = [{"type": "image"}, {"type": "text", "text": "what shape?"}]
        >>> blip_2.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        '<image>Question: what shape? Answer:'
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        num_query_tokens: int | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, num_query_tokens)
        self.image_token = str(vars(self)["image_token"])
        default = CHAT_TEMPLATE.replace("IMAGE", self.image_token)
        self.chat_template = chat_template or default

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Return the inputs of a batch, of one image a row.

        Args:
            images: A list of one image for each text.
            text: Texts that begin with the image token.
            kwargs: Arguments of the tokenizer, such as `padding`.

        Raises:
            ValueError: If a text does not begin with its only image token, or has several images or none.
        """
        rows = [row if isinstance(row, Sequence) else [row] for row in images or [()] * len(text)]
        for line, row in zip(text, rows, strict=True):
            if len(row) != 1 or not line.startswith(self.image_token) or line.count(self.image_token) != 1:
                raise ValueError(
                    f"BLIP-2 takes one image, before the text: found {len(row)} images and {line[:40]!r}; use another "
                    "model for texts, several images, or images inside a text"
                )
        padding = {name: kwargs.pop(name) for name in ("padding", "padding_side") if name in kwargs}
        tensors = kwargs.pop("return_tensors", None)
        encoded = self.tokenizer([line.removeprefix(self.image_token) for line in text], **kwargs)
        query_ids = [self.tokenizer.convert_tokens_to_ids(self.image_token)] * self.num_query_tokens
        ids = {"input_ids": [query_ids + row for row in encoded["input_ids"]]}
        pixels = self.image_processor([row[0] for row in rows], return_tensors=tensors)
        return BatchFeature({**self.tokenizer.pad(ids, return_tensors=tensors, **padding), **pixels})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields to save. They name BLIP-2's own processor, which transformers loads again."""
        return {**super().to_dict(), "processor_class": Blip2Processor.__name__}
