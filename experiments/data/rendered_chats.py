"""Rendered conversations, kept for the cells that one process runs one after another."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import Any

from transformers import ProcessorMixin

from experiments.data.chat_rendering import CharacterSpans, render_chat

MAX_CHATS = 50_000  # of a few hundred characters each for the generated data


class RenderedChats:
    """Renders conversations once for each chat template, as long as they stay among the `limit` latest.

    Rendering takes most of the time of encoding, since it grows with the square of the turns. The cells of a sweep read the
    same conversations, mostly with the same chat template.

    Args:
        limit: How many conversations are kept.

    Example:
        >>> chats = RenderedChats(limit=2)
        >>> question = {"role": "user", "content": [{"type": "text", "text": "what is this"}]}
        >>> answer = {"role": "assistant", "content": [{"type": "text", "text": "a ring"}]}
        >>> text, answers = chats.render(processor, "sample 1", [question, answer])
        >>> [text[start:stop] for start, stop in answers]
        ['a ring</s>']
        >>> chats.render(processor, "sample 2", [question, answer]) is chats.render(processor, "", [question, answer])
        True
    """

    def __init__(self, limit: int = MAX_CHATS) -> None:
        self.limit = limit
        self._chats: OrderedDict[bytes, tuple[str, CharacterSpans]] = OrderedDict()

    def render(
        self, processor: ProcessorMixin, sample_id: str, messages: list[dict[str, Any]]
    ) -> tuple[str, CharacterSpans]:
        """Return the text of a conversation and the spans of its answers.

        Args:
            processor: The processor of the chat template.
            sample_id: The sample's name, for errors.
            messages: The turns, as for `render_chat`.

        Raises:
            ValueError: As `render_chat`.
        """
        # A digest, since the template is often longer than the conversation.
        key = hashlib.sha256(json.dumps([*_template_key(processor), messages]).encode()).digest()
        if key not in self._chats:
            self._chats[key] = render_chat(processor, sample_id, messages)
            if len(self._chats) > self.limit:
                self._chats.popitem(last=False)
        return self._chats[key]


def _template_key(processor: ProcessorMixin) -> list[Any]:
    """Return all that the rendered text depends on, beside the messages."""
    templates = [getattr(part, "chat_template", None) for part in (processor, processor.tokenizer)]
    return [type(processor).__name__, templates, processor.tokenizer.special_tokens_map]
