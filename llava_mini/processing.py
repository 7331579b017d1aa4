"""Processor of LLaVA-Mini."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, LlavaProcessor
from transformers.image_utils import load_image
from transformers.processing_utils import MultiModalData

from .configuration import LlavaMiniConfig
from .images import pad_to_square, to_rgb
from .tiles import cut
from .video import Video

VIDEO_SLOT = "<video>"
Spans = Sequence[tuple[int, int]]  # of characters


class LlavaMiniProcessor(LlavaProcessor):
    """Images, videos and text for LLaVA-Mini: crops, their layout, and as many placeholders as there are visual tokens.

    Args:
        num_visual_tokens: Placeholders an image or a frame takes: C x C, or None for one a patch, as in LLaVA.
        tiles: N; every image and frame is cut into N x N tiles, followed by the whole (LLaVA-Mini-HD: 2).
        pad_to_square: Pad pictures to a square with the image processor's mean colour before anything else, as LLaVA-1.5
            was fine-tuned. Otherwise images are cropped at the centre, and frames squashed, as the released code does.
        fuse_answers: Let pre-fusion fuse what the assistant said in earlier turns, as the released code does. In
            training answers are never fused, so by default `apply_chat_template` marks them in `answer_mask`.
        keep_patches: A frame takes a placeholder for each patch ahead of those for its compressed tokens.
        The other arguments are those of [`LlavaProcessor`].
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        num_visual_tokens: int | None = None,
        tiles: int = 1,
        pad_to_square: bool = False,
        fuse_answers: bool = False,
        keep_patches: bool = False,
        **kwargs: Any,
    ):
        self.num_visual_tokens = num_visual_tokens
        self.tiles = tiles
        self.pad_to_square = pad_to_square
        self.fuse_answers = fuse_answers
        self.keep_patches = keep_patches
        super().__init__(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    @classmethod
    def from_llava(cls, processor: LlavaProcessor, config: LlavaMiniConfig, **fields: Any) -> LlavaMiniProcessor:
        """A processor for a LLaVA-Mini of this configuration, on a LLaVA's tokenizer and image processor. `fields` are
        `tiles`, `pad_to_square` and `fuse_answers`."""
        return cls(
            image_processor=processor.image_processor,
            tokenizer=processor.tokenizer,
            patch_size=processor.patch_size,
            vision_feature_select_strategy=processor.vision_feature_select_strategy,
            chat_template=processor.chat_template,
            image_token=processor.image_token,
            num_additional_image_tokens=processor.num_additional_image_tokens,
            num_visual_tokens=None if config.compressor == "none" else config.compressor_size**2,
            keep_patches=config.keep_patches,
            **fields,
        )

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        *,
        fps: float | None = None,
        num_frames: int | None = None,
        stream: bool = False,
        answer_spans: list[Spans] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Rows of text with their pictures, which stand where `<image>` and `<video>` are.

        Args:
            images: PIL images or paths, in the order of the text: one, a list, or a list for each row.
            text: One row or a list of them.
            videos: Paths, or [`Video`]s, which may be made of frames, likewise.
            fps: Frames a second taken from videos given by path; 1 unless `num_frames` is given.
            num_frames: Frames taken from each such video, spread evenly.
            stream: Decode frames only while the model takes them, so that a long video is never held whole.
            answer_spans: For each row the characters that pre-fusion shall leave alone.
            kwargs: Of the tokenizer: `padding`, `return_tensors`, ...

        Returns:
            `input_ids`, `attention_mask` and, with pictures, `pixel_values` (crops, channels, height, width) and
            `visual_layout` (pictures, 3); with `answer_spans` also `answer_mask`.

        Raises:
            FileNotFoundError, ValueError: If a picture cannot be read, or the text has another number of slots.
        """
        rows = [text] if isinstance(text, str) else list(text or [])
        pictures = self._pictures(rows, _flat(images), [_video(v, fps, num_frames) for v in _flat(videos)])
        stretched = [self._stretch(row, [p for p in pictures if p.row == i]) for i, row in enumerate(rows)]
        data: dict[str, Any] = {}
        if text is not None:
            spans = answer_spans and [_moved(x, moves) for x, (_, moves) in zip(answer_spans, stretched, strict=True)]
            data |= self._encode([row for row, _ in stretched], spans, kwargs)
        if pictures:
            frames = FrameStream(self, pictures)
            data["pixel_values"] = frames if stream else torch.cat(list(frames))
            data["visual_layout"] = torch.tensor([[p.row, p.num_frames, self.tiles] for p in pictures])
        return BatchFeature(data)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, for one conversation or a list of them; pictures are taken from the messages (`image`,
        `video`, `url` or `path`). Keyword arguments of `__call__` may stand among the others or in `processor_kwargs`.
        """
        options = dict(processor_kwargs or {})
        for name in ("fps", "num_frames", "stream", "padding", "truncation", "max_length", "padding_side"):
            if name in kwargs:
                options[name] = kwargs.pop(name)

        def render(chat: list[dict[str, Any]], **more: Any) -> str:
            return super(LlavaMiniProcessor, self).apply_chat_template(
                chat, chat_template=chat_template, tokenize=False, **more
            )

        single = isinstance(conversation[0], dict)
        chats = [conversation] if single else conversation
        texts = [render(chat, **kwargs) for chat in chats]
        if not tokenize:
            return texts[0] if single else texts
        spans = None
        if not self.fuse_answers and any(m["role"] == "assistant" for chat in chats for m in chat):
            spans = [_answers(chat, text, render) for chat, text in zip(chats, texts, strict=True)]
        bos = self.tokenizer.bos_token
        data = self(
            text=texts[0] if single else texts,
            images=[_image(part) for part in _parts(chats, "image")],
            videos=[_source(part) for part in _parts(chats, "video")],
            answer_spans=spans,
            # a template that writes the start token itself must not get a second one
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            return_tensors=return_tensors,
            **options,
        )
        return data if return_dict else data["input_ids"]

    def _pictures(self, rows: list[str], images: list[Any], videos: list[Video]) -> list[_Picture]:
        slots = [(row, match[0]) for row, text in enumerate(rows) for match in self._slots.finditer(text)]
        kinds = [kind for _, kind in slots]
        for name, slot, given in (("images", self.image_token, images), ("videos", VIDEO_SLOT, videos)):
            if rows and kinds.count(slot) != len(given):
                raise ValueError(f"the text has {kinds.count(slot)} {slot} slots, but {len(given)} {name} are given")
        if not rows:  # pictures alone: a row each
            return [_Picture(i, source) for i, source in enumerate([*images, *videos])]
        sources = {self.image_token: iter(images), VIDEO_SLOT: iter(videos)}
        return [_Picture(row, next(sources[kind])) for row, kind in slots]

    @property
    def _slots(self) -> re.Pattern[str]:
        return re.compile(f"{re.escape(self.image_token)}|{re.escape(VIDEO_SLOT)}")

    def _stretch(self, text: str, pictures: list[_Picture]) -> tuple[str, list[tuple[int, int]]]:
        """Slots -> placeholders; and, for each slot, where it ended and how many characters longer the text is since."""
        each = self._tokens_of_a_frame() if pictures else 0
        counts = iter([picture.num_frames * each for picture in pictures])
        moves: list[tuple[int, int]] = []

        def placeholders(match: re.Match[str]) -> str:
            new = self.image_token * next(counts)
            moves.append((match.end(), len(new) - len(match[0])))
            return new

        return self._slots.sub(placeholders, text), moves

    def _tokens_of_a_frame(self) -> int:
        compressed = self.num_visual_tokens
        if compressed is not None and not self.keep_patches:
            return compressed
        pixels = self.image_processor(Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
        patches = (pixels.shape[-2] // self.patch_size) * (pixels.shape[-1] // self.patch_size)
        extra = self.num_additional_image_tokens - (self.vision_feature_select_strategy == "default")
        return (patches + extra) * self.tiles**2 + (compressed or 0)

    def _encode(self, rows: list[str], spans: list[Spans] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        if spans is None:
            return dict(self.tokenizer(rows, **kwargs))
        data = dict(self.tokenizer(rows, return_offsets_mapping=True, **kwargs))
        masks = [
            [any(a <= start < end <= b for a, b in row_spans) for start, end in map(tuple, row)]
            for row, row_spans in zip(data.pop("offset_mapping"), spans, strict=True)
        ]
        data["answer_mask"] = torch.tensor(masks) if kwargs.get("return_tensors") == "pt" else masks
        return data

    def crops(self, picture: Any, squash: bool) -> Float[Tensor, "crops channels height width"]:
        """The pixels of an image's or a frame's crops: tiles in row-major order and the whole, or the whole alone."""
        picture = to_rgb(picture)
        if self.pad_to_square:
            red, green, blue = (int(255 * x) for x in self.image_processor.image_mean)
            picture = pad_to_square(picture, (red, green, blue))
        crops = cut(picture, self.tiles)
        if squash and not self.pad_to_square:
            side = self.image_processor.size.get("shortest_edge") or self.image_processor.size["height"]
            crops = [crop.resize((side, side), Image.Resampling.NEAREST) for crop in crops]
        return self.image_processor(crops, return_tensors="pt")["pixel_values"]

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        each = [self._tokens_of_a_frame()] * len(image_sizes)
        return MultiModalData(num_image_tokens=each, num_image_patches=[1] * len(image_sizes))


@dataclass(frozen=True)
class _Picture:
    row: int
    source: Any  # an image, or a Video

    @property
    def num_frames(self) -> int:
        return len(self.source) if isinstance(self.source, Video) else 1


class FrameStream:
    """The crops of one frame after another, through all pictures of a batch, read anew each time it is gone through."""

    def __init__(self, processor: LlavaMiniProcessor, pictures: list[_Picture]) -> None:
        self.processor, self.pictures = processor, pictures

    def __iter__(self) -> Iterator[Float[Tensor, "crops channels height width"]]:
        for picture in self.pictures:
            if isinstance(picture.source, Video):
                for frame in picture.source:
                    yield self.processor.crops(frame, squash=True)
            else:
                yield self.processor.crops(picture.source, squash=False)


def _flat(given: Any) -> list[Any]:
    """One picture, a list of them, or a list of lists -> a list."""
    if given is None:
        return []
    if not isinstance(given, (list, tuple)):
        return [given]
    return [x for item in given for x in (item if isinstance(item, (list, tuple)) else [item])]


def _image(part: dict[str, Any]) -> Any:
    """The picture of a message; addresses and base64 are read by transformers, files by `crops`."""
    source = _source(part)
    remote = isinstance(source, str) and source.startswith(("http://", "https://", "data:image/"))
    return load_image(source) if remote or "base64" in part else source


def _video(source: Any, fps: float | None, num_frames: int | None) -> Video:
    return source if isinstance(source, Video) else Video(source, fps=fps, frames=num_frames)


def _parts(chats: list[list[dict[str, Any]]], kind: str) -> Iterator[dict[str, Any]]:
    for chat in chats:
        for message in chat:
            if not isinstance(message["content"], str):
                yield from (part for part in message["content"] if part["type"] == kind)


def _source(part: dict[str, Any]) -> Any:
    for name in (part["type"], "url", "path", "base64"):
        if part.get(name) is not None:
            return part[name]
    raise ValueError(f"a message has a part of type {part['type']!r} without a picture: give it as {part['type']!r}")


def _answers(chat: list[dict[str, Any]], text: str, render: Any) -> Spans:
    """Where in a rendered chat the assistant's turns are, from after the header that asks for them to their end.

    Raises:
        ValueError: If the template does not write the chat turn by turn.
    """
    spans = []
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            head, whole = render(chat[:i], add_generation_prompt=True), render(chat[: i + 1])
            if not (whole.startswith(head) and text.startswith(whole.rstrip())):
                raise ValueError("the chat template does not write the chat turn by turn: set fuse_answers=True")
            spans.append((len(head), len(whole.rstrip())))
    return spans


def _moved(spans: Spans, moves: list[tuple[int, int]]) -> Spans:
    """Spans of characters after slots have been stretched to placeholders."""

    def move(at: int) -> int:
        return at + sum(longer for end, longer in moves if end <= at)

    return [(move(a), move(b)) for a, b in spans]


__all__ = ["FrameStream", "LlavaMiniProcessor"]
