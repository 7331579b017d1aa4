"""An interactive page: what each word of a prompt and its answer attends to in the image."""

from probes.view.page import AttentionView
from probes.view.words import Words, find_words

__all__ = ["AttentionView", "Words", "find_words"]
