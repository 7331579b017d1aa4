"""Conversations as text, through the chat template of a processor, with the positions of their answers."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin

CharacterSpans = list[tuple[int, int]]  # (start, end)
_STRINGS_ONLY = (
    "the chat template takes the text of a message as a string, not a list of parts; use the template of a "
    "vision-language model, which writes {'type': 'image'} and {'type': 'text', 'text': ...}"
)


def render_chat(
    processor: ProcessorMixin, sample_id: str, messages: list[dict[str, Any]]
) -> tuple[str, CharacterSpans]:
    """Render a conversation turn by turn.

    Args:
        processor: A processor with a chat template.
        sample_id: The sample's name, for errors.
        messages: Turns of the user and the assistant, alternating, whose content is a list of parts.

    Returns:
        The text, and the spans of its answers, each from the end of the answer's header to the end of its turn.

    Raises:
        ValueError: If the template fails, takes strings only, or rewrites earlier turns.
    """
    text, answers = "", []
    for end in range(1, len(messages), 2):
        prompt = _apply_template(processor, sample_id, messages[:end], add_generation_prompt=True)
        text = _apply_template(processor, sample_id, messages[: end + 1])
        if not text.startswith(prompt):
            raise ValueError(
                f"sample {sample_id}: the chat template does not write the conversation turn by turn, so its answers "
                "cannot be located; use a template that only appends text with each turn"
            )
        answers.append((len(prompt), len(text.rstrip())))
    return text, answers


def check_rendered_texts(
    processor: ProcessorMixin, sample_id: str, messages: list[dict[str, Any]], text: str, answers: CharacterSpans
) -> None:
    """Check that a rendered conversation holds the text of each turn, and each answer where its span begins.

    Args:
        processor: The processor of the template.
        sample_id: The sample's name, for errors.
        messages: The turns, as for `render_chat`.
        text: What `render_chat` returned.
        answers: The spans that it returned.

    Raises:
        ValueError: If the template omits the text of a turn, or writes no header of an answer when asked for it.
    """
    for part in (part for message in messages for part in message["content"]):
        if (turn_text := part.get("text", "").strip()) not in text:
            raise ValueError(
                f"sample {sample_id}: the chat template leaves out the text {turn_text[:80]!r}; use a template that "
                "writes every turn"
            )
    for end, (start, stop) in zip(range(1, len(messages), 2), answers, strict=True):
        written, answer = text[start:stop].lstrip(), _texts(messages[end])
        if answer not in written:
            raise ValueError(
                f"sample {sample_id}: the chat template does not write the answer {answer[:80]!r} in its turn; use a "
                "template that writes it after the header of the assistant"
            )
        # Some templates open an answer with an empty thought, which is part of what the model must write.
        if not written.startswith(answer) and text[:start] == _apply_template(processor, sample_id, messages[:end]):
            raise ValueError(
                f"sample {sample_id}: the chat template ignores add_generation_prompt, so the start of its answers "
                "cannot be located; use a template that writes the header of an answer when asked for it"
            )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, after its type."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _apply_template(processor: ProcessorMixin, sample_id: str, messages: list[dict[str, Any]], **options: Any) -> str:
    try:
        text = processor.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program of its own, and can raise anything
        reason = f"the chat template fails with {first_line(error)}; use a template that accepts its turns"
        if _accepts_strings(processor, messages):
            reason = _STRINGS_ONLY
        raise ValueError(f"sample {sample_id}: {reason}") from error
    # A template that takes strings can print the list of parts, without an error.
    parts = [part for message in messages for part in message["content"]]
    if any(str(part) in text and all(str(part) not in other.get("text", "") for other in parts) for part in parts):
        raise ValueError(f"sample {sample_id}: {_STRINGS_ONLY}")
    return text


def _accepts_strings(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> bool:
    """Return whether the template writes the same turns when the content of each is one string."""
    strings = [{**message, "content": _texts(message)} for message in messages]
    try:
        processor.apply_chat_template(strings, tokenize=False)
    except Exception:
        return False
    return True


def _texts(message: dict[str, Any]) -> str:
    return "".join(part.get("text", "") for part in message["content"]).strip()
