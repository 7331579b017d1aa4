"""Conversations that are rendered once for each chat template."""

import pytest
from transformers import AutoProcessor

from experiments.data.chat_rendering import render_chat
from experiments.data.encoding import chat_messages
from experiments.data.rendered_chats import RenderedChats
from experiments.data.samples import Sample, llava_conversation
from experiments.files import ASSETS


@pytest.fixture
def processor():
    return AutoProcessor.from_pretrained(ASSETS / "tiny")


@pytest.fixture
def conversations():
    """Messages of three conversations, of which the last has another answer than the second."""
    pairs = [("a?", "red"), ("b?", "blue"), ("b?", "green")]
    return [chat_messages(Sample(str(i), (), llava_conversation([pair]), [])) for i, pair in enumerate(pairs)]


def test_render_equals_render_chat_also_on_the_second_call(processor, conversations):
    chats = RenderedChats()
    for messages in [*conversations, *conversations]:
        assert chats.render(processor, "x", messages) == render_chat(processor, "x", messages)


def test_render_after_a_change_of_the_template_renders_again(processor, conversations):
    chats = RenderedChats()
    text, _ = chats.render(processor, "x", conversations[0])
    processor.chat_template = processor.chat_template.replace("{{ bos_token }}", "{{ bos_token }}!")
    changed, _ = chats.render(processor, "x", conversations[0])
    assert changed == text.replace("<s>", "<s>!") != text


def test_render_beyond_the_limit_drops_the_oldest(processor, conversations):
    chats = RenderedChats(limit=2)
    first = chats.render(processor, "x", conversations[0])
    for messages in conversations[1:]:
        chats.render(processor, "x", messages)
    assert len(chats._chats) == 2
    again = chats.render(processor, "x", conversations[0])
    assert again == first
    assert again is not first
