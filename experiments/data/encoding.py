"""Token ids and labels of conversations, through the chat template of the processor, and batches of them."""

from __future__ import annotations

import bisect
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from experiments.data.chat_rendering import CharacterSpans, check_rendered_texts, first_line
from experiments.data.length_limit import LengthLimit, cut_question, drop_questions, droppable_questions
from experiments.data.media_files import with_orientation_of
from experiments.data.rendered_chats import RenderedChats
from experiments.data.samples import IMAGE_PLACEHOLDER, PLACEHOLDER, VIDEO_PLACEHOLDER, Sample
from llava_mini import LlavaMiniProcessor
from llava_mini.chat_templates import starts_with_bos

IGNORE_INDEX = -100
EncodedSample = dict[str, Any]
_RENDERED_CHATS = RenderedChats()  # of all encoders of this process
log = logging.getLogger(__name__)


def chat_messages(sample: Sample) -> list[dict[str, Any]]:
    """Convert a sample's LLaVA turns to transformers' chat messages.

    A turn's only image goes before its text, as in LLaVA's training code. Several images keep their positions. The system
    prompt, if the sample has one, is the first message.
    """
    roles = {"human": "user", "gpt": "assistant"}
    turns = [{"role": roles[turn["from"]], "content": _message_content(turn["value"])} for turn in sample.conversations]
    system = {"role": "system", "content": [{"type": "text", "text": sample.system}]}
    return turns if sample.system is None else [system, *turns]


def _message_content(text: str) -> list[dict[str, str]]:
    placeholders = PLACEHOLDER.findall(text)
    if len(placeholders) == 1:
        parts = [placeholders[0], PLACEHOLDER.sub("", text).strip()]
    else:  # the line break after an image is left to the template
        parts = re.split(rf"({PLACEHOLDER.pattern})\n?", text.strip())
    types = {IMAGE_PLACEHOLDER: "image", VIDEO_PLACEHOLDER: "video"}
    return [{"type": types[part]} if part in types else {"type": "text", "text": part} for part in parts if part]


class SampleEncoder:
    """Encodes samples to `input_ids`, `labels` and visual inputs, with the model's own processor.

    `labels` is -100 everywhere but on answers and the end-of-turn token after each. Answer positions come from the
    template: the chat rendered up to a question, with the header of an answer, is compared with the chat rendered up to
    the answer. The whole text is tokenised once, with the start token if the template leaves it to the tokenizer.

    With a LLaVA-Mini processor, an item holds `pixel_values`, a stream that is read when a batch is collated, and
    `visual_layout`. Its `ignore_orientation` holds for the image files of samples too. With any other processor an item
    holds `text`, `add_special_tokens` and `images`, from which a `Collator` lets the processor make the batch.

    Args:
        processor: The model's processor.
        limit: The longest sample that the model accepts.

    Raises:
        ValueError: If the processor has no chat template, no image token, no pad token or no fast tokenizer. On a call,
            if the template does not write the sample (it fails, takes strings only, rewrites earlier turns, or omits an
            image or a text), if all answers are empty, if the sample is too long, or if it has a video and the
            processor accepts none.
    """

    def __init__(self, processor: ProcessorMixin, limit: LengthLimit | None = None) -> None:
        check_processor(processor)
        self.processor = processor
        self.limit = limit or LengthLimit()
        self.tokenizer = processor.tokenizer
        self.image_token = processor.image_token

    def __call__(self, sample: Sample) -> EncodedSample:
        """Return the encoded sample: `input_ids`, `labels` and the keys of its visual inputs."""
        sample = with_orientation_of(self.processor, sample)
        encoded = self._encode_whole(sample)
        length = len(encoded["input_ids"])
        if self.limit.excess(length) <= 0:
            return encoded
        if self.limit.max_length is None:
            raise self._too_long(sample, length)
        encoded = self._encode_truncated(sample, length)
        log.info("sample %s: %d tokens truncated to %d", sample.id, length, len(encoded["input_ids"]))
        return encoded

    def _encode_truncated(self, sample: Sample, length: int) -> EncodedSample:
        """Return a sample of `length` tokens without as few of its last questions as needed, or with its question cut."""

        def fits(dropped: int) -> bool:
            return self.limit.excess(len(self._encode_whole(drop_questions(sample, dropped))["input_ids"])) <= 0

        droppable = droppable_questions(sample)
        shorter = drop_questions(sample, bisect.bisect_left(range(droppable), True, lo=min(1, droppable), key=fits))
        encoded = self._encode_whole(shorter)
        while (excess := self.limit.excess(len(encoded["input_ids"]))) > 0:
            cut = cut_question(shorter, excess, self.tokenizer)
            if cut is None:
                raise ValueError(
                    f"sample {sample.id}: data.max_length={self.limit.max_length} leaves no question beside its images "
                    f"and its answer, of {length} tokens in all; set a larger one"
                )
            shorter, encoded = cut, self._encode_whole(cut)
        return encoded

    def check(self, samples: Iterable[Sample]) -> None:
        """Check that samples can be encoded, as far as this is known without their images, which are not loaded.

        Raises:
            ValueError: As on a call.
        """
        for sample in samples:
            text, _ = self._render(sample)
            length = len(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if self.limit.max_length is None and self.limit.excess(length) > 0:
                raise self._too_long(sample, length)

    def _too_long(self, sample: Sample, length: int) -> ValueError:
        return ValueError(
            f"sample {sample.id}: its {length} tokens exceed the {self.limit.positions} positions of the model; shorten "
            "it, or set data.max_length to truncate questions"
        )

    def _encode_whole(self, sample: Sample) -> EncodedSample:
        text, answers = self._render(sample)
        add_special_tokens = not starts_with_bos(self.tokenizer, text)
        encode = self._encode_for_llava_mini if isinstance(self.processor, LlavaMiniProcessor) else self._encode
        ids, is_answer, visual_inputs = encode(sample, text, answers, add_special_tokens)
        labels = [i if in_answer else IGNORE_INDEX for i, in_answer in zip(ids, is_answer, strict=True)]
        return {"input_ids": ids, "labels": labels, **visual_inputs}

    def _render(self, sample: Sample) -> tuple[str, CharacterSpans]:
        """Return the conversation as text, and the spans of its answers."""
        if not any(answer.strip() for answer in sample.answers):
            raise ValueError(f"sample {sample.id}: all its answers are empty; give each question an answer")
        if VIDEO_PLACEHOLDER in sample.placeholders and not isinstance(self.processor, LlavaMiniProcessor):
            name = type(self.processor).__name__
            raise ValueError(f"sample {sample.id}: a {name} accepts images, not videos; LLaVA-Mini accepts both")
        messages = chat_messages(sample)
        text, answers = _RENDERED_CHATS.render(self.processor, sample.id, messages)
        for token, placeholder in ((self.image_token, IMAGE_PLACEHOLDER), (VIDEO_PLACEHOLDER, VIDEO_PLACEHOLDER)):
            if (written := text.count(token)) != (needed := sample.placeholders.count(placeholder)):
                raise ValueError(
                    f"sample {sample.id}: the chat template writes {written} {token} where the sample has {needed} "
                    f"{placeholder}; use a template that writes every image and video"
                )
        check_rendered_texts(self.processor, sample.id, messages, text, answers)
        return text, answers

    def _encode_for_llava_mini(
        self, sample: Sample, text: str, answers: CharacterSpans, add_special_tokens: bool
    ) -> tuple[list[int], list[bool], dict[str, Any]]:
        loaded = sample.visual_inputs
        encoded = self.processor(
            text=[text],
            images=[visual for visual in loaded if isinstance(visual, Image.Image)],
            videos=[visual for visual in loaded if not isinstance(visual, Image.Image)],
            answer_spans=[answers],
            stream=True,
            add_special_tokens=add_special_tokens,
        )
        visual_inputs = {name: encoded[name] for name in ("pixel_values", "visual_layout") if name in encoded}
        return encoded["input_ids"][0], encoded["answer_mask"][0], visual_inputs

    def _encode(
        self, sample: Sample, text: str, answers: CharacterSpans, add_special_tokens: bool
    ) -> tuple[list[int], list[bool], dict[str, Any]]:
        item = {"text": text, "images": sample.visual_inputs, "add_special_tokens": add_special_tokens}
        try:
            ids = _run_processor(self.processor, [item])["input_ids"][0].tolist()
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"sample {sample.id}: its {type(self.processor).__name__} refuses it: {first_line(error)}"
            ) from error
        plain = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens)
        in_text = [any(a <= start and stop <= b for a, b in answers) for start, stop in plain["offset_mapping"]]
        is_answer = _carry_over(in_text, plain["input_ids"], ids)
        if not any(is_answer) or sum(is_answer) != sum(in_text):
            raise ValueError(
                f"sample {sample.id}: its answers cannot be located among the tokens of its "
                f"{type(self.processor).__name__}, which rewrites text beside images"
            )
        return ids, is_answer, item


def check_processor(processor: ProcessorMixin) -> None:
    """Check that a processor can encode chats about images, and can pad batches of them.

    Raises:
        ValueError: If it has no tokenizer, image token, fast tokenizer, pad token or chat template.
    """
    name, tokenizer = type(processor).__name__, getattr(processor, "tokenizer", None)
    if tokenizer is None or not isinstance(getattr(processor, "image_token", None), str):
        raise ValueError(
            f"the prompts of a {name} hold no image token that a chat template can write; use a model whose prompts do"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of the {name}, a {type(tokenizer).__name__}, is not fast; use its fast version"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer of the {name} has no pad token, which batches need; set tokenizer.pad_token, often to its "
            f"eos_token {tokenizer.eos_token!r}, and save the processor"
        )
    if not processor.chat_template:
        advice = "set processor.chat_template and save the processor"
        raise ValueError(f"the {name} has no chat template, which writes questions as prompts; {advice}")


def _run_processor(processor: ProcessorMixin, items: Sequence[EncodedSample], side: str = "right") -> dict[str, Any]:
    """Return what the model's own processor makes of the texts and images of a batch, padded on `side`."""
    images = [list(item.get("images", ())) for item in items]
    return processor(
        text=[item["text"] for item in items],
        images=images if any(images) else None,
        add_special_tokens=items[0]["add_special_tokens"],
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )


def _carry_over(flags: Sequence[bool], ids: Sequence[int], expanded_ids: Sequence[int]) -> list[bool]:
    """Move flags of tokens to a longer sequence: the same text, with other tokens in place of each image token."""
    shorter = min(len(ids), len(expanded_ids))
    head = next((i for i in range(shorter) if ids[i] != expanded_ids[i]), shorter)
    tail = next((i for i in range(shorter - head) if ids[-1 - i] != expanded_ids[-1 - i]), shorter - head)
    end, expanded_end = len(ids) - tail, len(expanded_ids) - tail
    moved = [*flags[:head], *[False] * (expanded_end - head), *flags[end:]]
    # The cost of matching is quadratic, so only what lies between the first and the last image is matched.
    matcher = SequenceMatcher(None, ids[head:end], expanded_ids[head:expanded_end], autojunk=False)
    for a, b, size in matcher.get_matching_blocks():
        moved[head + b : head + b + size] = flags[head + a : head + a + size]
    return moved


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
    model_inputs = {name: value for name, value in hide_answers(inputs).items() if name != "labels"}
    return model_inputs | answer_mask | {"logits_to_keep": kept_positions}, labels[:, kept_positions]


def hide_answers(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the inputs of a batch with its answers hidden from the text before them, where the model's mask needs it.

    PaliGemma attends both ways inside its prefix, which its processor marks with `token_type_ids` of 0. Questions would
    attend to their own answers, so the first answer and what follows it become the suffix, of 1, as in its training. All
    other masks are causal for text. Gemma 3 marks its images with 1, so that its `token_type_ids` are never all 0.

    Args:
        inputs: A batch with `labels` (batch, positions).
    """
    types = inputs.get("token_type_ids")
    if types is None or "pixel_values" not in inputs or types.any():
        return dict(inputs)
    return {**inputs, "token_type_ids": (inputs["labels"] != IGNORE_INDEX).cumsum(1).clamp(max=1).to(types)}


class Collator:
    """Collates encoded samples into one padded batch of tensors.

    The model's own processor makes the batch, so that it holds all inputs of the model's family, padded its way. Items
    with streams of pixels or features (LLaVA-Mini, or a feature cache) are padded here.

    Args:
        processor: The model's processor.
        side: The padding side, "left" or "right".

    Raises:
        ValueError: As `check_processor`. On a call, if the processor gives a sample other tokens in a batch than alone.
    """

    def __init__(self, processor: ProcessorMixin, side: str = "right") -> None:
        check_processor(processor)
        self.processor = processor
        self.side = side
        pad = processor.tokenizer.pad_token_id
        self._padding_values: dict[str, int] = {"input_ids": pad, "labels": IGNORE_INDEX, "attention_mask": 0}

    def __call__(self, items: Sequence[EncodedSample]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `labels`, `attention_mask` and the visual inputs of the model, if there are any."""
        has_stream = any("pixel_values" in item for item in items)
        if has_stream or isinstance(self.processor, LlavaMiniProcessor):
            return self._pad_with_streams(items)
        batch = dict(_run_processor(self.processor, items, self.side))
        kept = batch["attention_mask"].bool()
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORE_INDEX)
        for row, item in enumerate(items):
            if batch["input_ids"][row, kept[row]].tolist() != item["input_ids"]:
                name = type(self.processor).__name__
                raise ValueError(f"{name} writes other tokens for a sample in a batch than alone; set batch_size=1")
            batch["labels"][row, kept[row]] = torch.tensor(item["labels"])
        return batch

    def _pad_with_streams(self, items: Sequence[EncodedSample]) -> dict[str, torch.Tensor]:
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
        if crops := [frame for item in items for frame in item.get("pixel_values", ())]:
            batch["pixel_values"] = torch.cat(crops)
        if layouts := [(i, item["visual_layout"]) for i, item in enumerate(items) if "visual_layout" in item]:
            batch["visual_layout"] = torch.cat([layout + torch.tensor([i, 0, 0]) for i, layout in layouts])
        return batch
