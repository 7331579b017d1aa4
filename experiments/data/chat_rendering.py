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
        messages: Turns of the user and the assistant, alternating, whose content is a list of parts. A system turn may
            precede them.

    Returns:
        The text, and the spans of its answers, each from the end of the answer's header to the end of its turn.

    Raises:
        ValueError: If the template fails, takes strings only, rewrites earlier turns, or has no system role where the
            conversation has a system turn.
    """
    text, answers = "", []
    if messages[0]["role"] == "system":
        _check_system_role(processor, sample_id, messages[:2])
    for end in _answer_turns(messages):
        prompt = _apply_template(processor, sample_id, messages[:end], add_generation_prompt=True)
        text = _apply_template(processor, sample_id, messages[: end + 1])
        if not text.startswith(prompt):
            raise ValueError(
                f"sample {sample_id}: the chat template does not write the conversation turn by turn, so its answers "
                "cannot be located; use a template that only appends text with each turn"
            )
        stop = len(text.rstrip())
        # Where the template writes no token for the end of a turn, as BLIP-2's does not, a line break ends the answer.
        if text[stop : stop + 1] == "\n" and text[:stop].endswith(_texts(messages[end])):
            stop += 1
        answers.append((len(prompt), stop))
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
    for end, (start, stop) in zip(_answer_turns(messages), answers, strict=True):
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


def _answer_turns(messages: list[dict[str, Any]]) -> range:
    """Return the indices of the assistant's turns."""
    return range(2 if messages[0]["role"] == "system" else 1, len(messages), 2)


def _check_system_role(processor: ProcessorMixin, sample_id: str, messages: list[dict[str, Any]]) -> None:
    """Check that the template writes the text of a system turn. Some templates refuse the role, and others ignore it.

    Its text may also be in a question, or the template's own system prompt, so another text is looked for.

    Args:
        processor: The processor of the template.
        sample_id: The sample's name, for errors.
        messages: The system turn, and the first of the user.
    """
    system, question = messages
    marker = "[SYSTEM PROMPT]"
    marked = [{**system, "content": [{"type": "text", "text": marker}]}, question]
    try:
        # A template that also fails without the system turn has another fault, which is reported for the whole chat.
        without = _apply_template(processor, sample_id, [question])
    except ValueError:
        return
    try:
        written = _apply_template(processor, sample_id, marked)
    except ValueError as error:
        reason = f" ({first_line(error.__cause__)})" if error.__cause__ else ""
    else:
        if written.count(marker) > without.count(marker):
            return
        reason = ", which it leaves out"
    raise ValueError(
        f"sample {sample_id}: the chat template of the {type(processor).__name__} has no system role{reason}; use a "
        "template that has one, or move the system prompt into the first question"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, after its type."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _apply_template(processor: ProcessorMixin, sample_id: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """Return the rendered messages. Some templates take parts in turns of the user, and a string as the system prompt."""
    forms = [messages]
    if messages[0]["role"] == "system":
        forms.append([{**messages[0], "content": _texts(messages[0])}, *messages[1:]])
    parts = [part for message in messages for part in message["content"]]
    first_error: Exception | None = None
    for form in forms:
        try:
            text = processor.apply_chat_template(form, tokenize=False, **options)
        except Exception as error:  # a template is a program of its own, and can raise anything
            first_error = first_error or error
            continue
        # A template that takes strings can print the list of parts, without an error.
        if not any(
            str(part) in text and all(str(part) not in other.get("text", "") for other in parts) for part in parts
        ):
            return text
    reason = _STRINGS_ONLY
    if first_error is not None and not _accepts_strings(processor, messages):
        reason = f"the chat template fails with {first_line(first_error)}; use a template that accepts its turns"
    raise ValueError(f"sample {sample_id}: {reason}") from first_error


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
