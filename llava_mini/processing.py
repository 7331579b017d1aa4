"""Processor of LLaVA-Mini: images, videos and text to pixels, layout and token ids."""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, LlavaProcessor
from transformers.processing_utils import MultiModalData

from .answer_spans import CharacterSpans, find_answer_spans, shift_spans, tokens_within
from .chat_messages import check_message_texts, check_text, load_part_image, message_parts, part_source
from .chat_templates import starts_with_bos
from .checkpoint_files import PROCESSOR_FILES, name_damaged_file
from .configuration import LlavaMiniConfig
from .images import pad_to_square, to_rgb
from .older_processors import complete_from_checkpoint, complete_from_config
from .processor_arguments import split_template_arguments, tokenizer_arguments
from .tiles import cut_into_tiles
from .video import Video
from .visual_inputs import FrameStream, VisualInput, as_video, check_rows, flatten, is_image, is_video


class LlavaMiniProcessor(LlavaProcessor):
    """Processor of LLaVA-Mini: a [`LlavaProcessor`] with videos, tiles and one placeholder for each visual token.

    Args:
        num_visual_tokens (`int`, *optional*):
            Number of placeholders of an image or a video frame, C x C. None gives one for each patch, as in LLaVA.
        tiles (`int`, *optional*, defaults to 1):
            N: every image and frame is cut into N x N tiles, followed by the whole image. LLaVA-Mini-HD uses 2.
        pad_to_square (`bool`, *optional*, defaults to `False`):
            Whether to pad images to a square with the image processor's mean colour first, as LLaVA-1.5 was fine-tuned.
            Otherwise images are cropped at the centre and frames are squashed, as in the released code.
        fuse_answers (`bool`, *optional*, defaults to `False`):
            Whether pre-fusion fuses the assistant's earlier turns, as in the released code. Training never fuses
            answers, so by default `apply_chat_template` marks them in `answer_mask`.
        ignore_orientation (`bool`, *optional*, defaults to `False`):
            Whether images keep the pixels as stored, as in the released code. Otherwise they are turned upright by
            their EXIF orientation, as in transformers. Videos are turned upright in either case, as in both.
        keep_patches (`bool`, *optional*, defaults to `False`):
            Whether a frame has one placeholder for each patch ahead of those for its compressed tokens.
        kwargs:
            `image_processor`, `tokenizer`, `patch_size`, `vision_feature_select_strategy`, `chat_template`,
            `image_token` and `num_additional_image_tokens`, as in [`LlavaProcessor`].

    Example:
        >>> from llava_mini import LlavaMiniConfig
        >>> mini_processor = LlavaMiniProcessor.from_llava(processor, LlavaMiniConfig(compressor_size=2))
        >>> inputs = mini_processor(text="<image> what is this", images=image, return_tensors="pt")
        >>> inputs["visual_layout"].tolist()  # row 0, one frame, one tile
        [[0, 1, 1]]
        >>> int((inputs["input_ids"] == model.config.image_token_id).sum())
        4
    """

    video_token = "<video>"  # replaced by image tokens, so it need not be in the vocabulary

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
        ignore_orientation: bool = False,
        **kwargs: Any,
    ):
        self.num_visual_tokens = num_visual_tokens
        self.tiles = tiles
        self.pad_to_square = pad_to_square
        self.fuse_answers = fuse_answers
        self.keep_patches = keep_patches
        self.ignore_orientation = ignore_orientation
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
        """Build a processor from a LLaVA's tokenizer and image processor.

        Args:
            processor ([`LlavaProcessor`]):
                The LLaVA's processor.
            config ([`LlavaMiniConfig`]):
                Configuration of the LLaVA-Mini.
            fields:
                `tiles`, `pad_to_square`, `fuse_answers` and `ignore_orientation`.

        Example:
            >>> LlavaMiniProcessor.from_llava(processor, mini.config, tiles=2).num_visual_tokens
            1
        """
        mini = cls(
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
        complete_from_config(mini, config)
        return mini

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a processor, as in transformers.

        Processors that older versions of transformers saved lack `patch_size`, `vision_feature_select_strategy` and
        `num_additional_image_tokens`. These are then read from the checkpoint's config.json.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder, or a name on the model hub.
            kwargs:
                As in [`ProcessorMixin.from_pretrained`].

        Raises:
            ValueError: If a file of the checkpoint is damaged.
        """
        name, subfolder = pretrained_model_name_or_path, kwargs.get("subfolder") or ""
        with name_damaged_file(name, PROCESSOR_FILES, subfolder):
            loaded = super().from_pretrained(name, **kwargs)
        complete_from_checkpoint(loaded[0] if isinstance(loaded, tuple) else loaded, name, kwargs)
        return loaded

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        *,
        fps: float | None = None,
        num_frames: int | None = None,
        stream: bool = False,
        answer_spans: list[CharacterSpans] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare rows of text with the images and videos at their `<image>` and `<video>` tokens.

        Args:
            images (`PIL.Image.Image`, path, or (nested) list of them, *optional*):
                Images in the order of the text: one, a list, or a list for each row.
            text (`str` or `list[str]`, *optional*):
                One row or several. Without text every image and video is a row.
            videos (path, [`Video`], or (nested) list of them, *optional*):
                Videos in the order of the text, as `images`. A list of PIL images is one video.
            fps (`float`, *optional*):
                Frames a second sampled from videos given by path; 1 unless `num_frames` is given.
            num_frames (`int`, *optional*):
                Number of evenly spread frames sampled from each such video.
            stream (`bool`, *optional*, defaults to `False`):
                Whether to decode frames only while the model encodes them, one chunk of frames ahead in a thread. A long
                video is then never in memory as a whole.
            answer_spans (`list[CharacterSpans]`, *optional*):
                For each row the spans of characters that pre-fusion must not fuse.
            kwargs:
                Arguments of the tokenizer: `padding`, `return_tensors`, ... They may be grouped in `text_kwargs`.

        Returns:
            [`BatchFeature`]: With text `input_ids` and `attention_mask`. With images or videos `pixel_values` of shape
            `(crops, channels, height, width)` and `visual_layout` of shape `(visual_inputs, 3)`. With `answer_spans`
            also `answer_mask`.

        Raises:
            FileNotFoundError: If the file of an image or a video does not exist.
            ValueError: If an image or a video cannot be read, the text has another number of `<image>` or `<video>`
                tokens or a surrogate, `fps` or `num_frames` is given for a [`Video`], or truncation cuts placeholders.
            TypeError: If the tokenizer does not know an argument.
        """
        arguments = tokenizer_arguments(self.tokenizer, kwargs)
        rows = [text] if isinstance(text, str) else list(text or [])
        for i, row in enumerate(rows):
            check_text(row, f"row {i} of the text" if len(rows) > 1 else "the text")
        check_rows("images", images, is_image, [row.count(self.image_token) for row in rows])
        check_rows("videos", videos, is_video, [row.count(self.video_token) for row in rows])
        all_videos = [as_video(video, fps, num_frames) for video in flatten(videos, is_video)]
        visual_inputs = self._assign_rows(rows, flatten(images, is_image), all_videos)
        expanded = [
            self._expand_placeholders(row, [visual for visual in visual_inputs if visual.row == i])
            for i, row in enumerate(rows)
        ]
        data: dict[str, Any] = {}
        if text is not None:
            spans = answer_spans and [
                shift_spans(row_spans, insertions)
                for row_spans, (_, insertions) in zip(answer_spans, expanded, strict=True)
            ]
            data |= self._tokenize([row for row, _ in expanded], spans, arguments)
        if visual_inputs:
            frames = FrameStream(self, visual_inputs)
            data["pixel_values"] = frames if stream else torch.cat(list(frames))
            data["visual_layout"] = torch.tensor([[v.row, v.num_frames, self.tiles] for v in visual_inputs])
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
        """Render one conversation or a list of them, and tokenize it, as in transformers.

        Images and videos come from the messages, where they are given as `image`, `video`, `url` or `path`; images also
        as `base64`, or with their addresses in `image_url`. `processor_kwargs` may have the `images` instead.
        Unless `fuse_answers` is set, `answer_mask` marks the assistant's earlier turns.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                Messages of one chat or of several.
            chat_template (`str`, *optional*):
                Template to use instead of the processor's.
            tokenize (`bool`, *optional*, defaults to `False`):
                Whether to return token ids instead of text.
            return_dict (`bool`, *optional*, defaults to `False`):
                Whether to return all model inputs instead of the token ids alone.
            return_tensors (`str`, *optional*):
                `"pt"` for tensors.
            processor_kwargs (`dict`, *optional*):
                Arguments of `__call__`.
            kwargs:
                Arguments of the template. Those that `__call__` knows are passed to it.

        Raises:
            TypeError: If `return_assistant_tokens_mask` or `sanitize_control_tokens` is set.
            ValueError: As `__call__`; or if a message part has no image or video, or the template does not render the
                chat turn by turn.

        Example:
            >>> content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this"}]
            >>> chat = [{"role": "user", "content": content}]
            >>> template = "{{ messages[0].role }} : <image> {{ messages[0].content[1].text }}"
            >>> mini_processor = LlavaMiniProcessor.from_llava(processor, mini.config)
            >>> mini_processor.apply_chat_template(chat, template)
            'user : <image> what is this'
        """
        options, kwargs = split_template_arguments(self.tokenizer, kwargs, processor_kwargs)

        def render(chat: list[dict[str, Any]], **template_kwargs: Any) -> str:
            return super(LlavaMiniProcessor, self).apply_chat_template(
                chat, chat_template=chat_template, tokenize=False, **template_kwargs
            )

        is_single = isinstance(conversation[0], dict)
        chats = [conversation] if is_single else conversation
        check_message_texts(chats)
        texts = [render(chat, **kwargs) for chat in chats]
        if not tokenize:
            return texts[0] if is_single else texts
        spans = None
        if not self.fuse_answers and any(message["role"] == "assistant" for chat in chats for message in chat):
            spans = [find_answer_spans(chat, text, render, kwargs) for chat, text in zip(chats, texts, strict=True)]
        images = options.pop("images", None)
        if images is None:
            images = [load_part_image(part, self.ignore_orientation) for part in message_parts(chats, "image")]
        data = self(
            text=texts[0] if is_single else texts,
            images=images,
            videos=[part_source(part) for part in message_parts(chats, "video")],
            answer_spans=spans,
            **{
                "add_special_tokens": not starts_with_bos(self.tokenizer, texts[0]),
                "return_tensors": return_tensors,
            }
            | options,
        )
        return data if return_dict else data["input_ids"]

    def crops(self, picture: Any, squash: bool) -> Float[Tensor, "crops channels height width"]:
        """Prepare the pixels of an image's or a frame's crops.

        Args:
            picture (`PIL.Image.Image` or path):
                The image or frame.
            squash (`bool`):
                Whether to squash each crop to a square instead of cropping it at the centre. It has no effect with
                `pad_to_square`.

        Returns:
            `torch.FloatTensor` of shape `(crops, channels, height, width)`: the tiles in row-major order and then the
            whole image, or the whole image alone without tiles.

        Raises:
            FileNotFoundError, TypeError, ValueError: As [`llava_mini.images.to_rgb`].

        Example:
            >>> mini_processor = LlavaMiniProcessor.from_llava(processor, mini.config, tiles=2)
            >>> mini_processor.crops(image, squash=False).shape
            torch.Size([5, 3, 48, 48])
        """
        picture = to_rgb(picture, self.ignore_orientation)
        if self.pad_to_square:
            red, green, blue = (int(255 * x) for x in self.image_processor.image_mean)
            picture = pad_to_square(picture, (red, green, blue))
        crops = cut_into_tiles(picture, self.tiles)
        if squash and not self.pad_to_square:
            side = self.image_processor.size.get("shortest_edge") or self.image_processor.size["height"]
            crops = [crop.resize((side, side), Image.Resampling.NEAREST) for crop in crops]
        return self.image_processor(crops, return_tensors="pt")["pixel_values"]

    def _assign_rows(self, rows: list[str], images: list[Any], videos: list[Video]) -> list[VisualInput]:
        """Assign images and videos to the rows with their `<image>` and `<video>` tokens, in the order of the text."""
        matches = [(row, match[0]) for row, text in enumerate(rows) for match in self._visual_tokens.finditer(text)]
        tokens = [token for _, token in matches]
        for name, token, given in (("images", self.image_token, images), ("videos", self.video_token, videos)):
            if rows and tokens.count(token) != len(given):
                raise ValueError(
                    f"the text has {tokens.count(token)} {token} tokens, but {len(given)} {name} are given"
                )
        if not rows:  # without text every image and video is a row
            return [VisualInput(i, source) for i, source in enumerate([*images, *videos])]
        sources = {self.image_token: iter(images), self.video_token: iter(videos)}
        return [VisualInput(row, next(sources[token])) for row, token in matches]

    @property
    def _visual_tokens(self) -> re.Pattern[str]:
        return re.compile(f"{re.escape(self.image_token)}|{re.escape(self.video_token)}")

    def _expand_placeholders(self, text: str, visual_inputs: list[VisualInput]) -> tuple[str, list[tuple[int, int]]]:
        """Replace each `<image>` and `<video>` by one placeholder for each visual token.

        Returns:
            The new text, and for each replacement its end in the old text and the number of characters it adds.
        """
        tokens_per_frame = self._num_tokens_per_frame() if visual_inputs else 0
        counts = iter([visual.num_frames * tokens_per_frame for visual in visual_inputs])
        insertions: list[tuple[int, int]] = []

        def placeholders(match: re.Match[str]) -> str:
            replacement = self.image_token * next(counts)
            insertions.append((match.end(), len(replacement) - len(match[0])))
            return replacement

        return self._visual_tokens.sub(placeholders, text), insertions

    def _num_tokens_per_frame(self) -> int:
        num_compressed = self.num_visual_tokens
        if num_compressed is not None and not self.keep_patches:
            return num_compressed
        if not isinstance(self.patch_size, int) or not self.vision_feature_select_strategy:
            raise ValueError(
                "the processor needs the model's patch_size and vision_feature_select_strategy to count patches; got "
                f"{self.patch_size!r} and {self.vision_feature_select_strategy!r}: set them, or load it from a folder with config.json"
            )
        pixels = self.image_processor(Image.new("RGB", (8, 8)), return_tensors="pt")["pixel_values"]
        patches = (pixels.shape[-2] // self.patch_size) * (pixels.shape[-1] // self.patch_size)
        extra = self.num_additional_image_tokens - (self.vision_feature_select_strategy == "default")
        return (patches + extra) * self.tiles**2 + (num_compressed or 0)

    def _tokenize(self, rows: list[str], spans: list[CharacterSpans] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Tokenize rows, with an `answer_mask` of the tokens within `spans` if given."""
        data = dict(self.tokenizer(rows, **kwargs | ({} if spans is None else {"return_offsets_mapping": True})))
        self._check_special_mm_tokens(rows, BatchFeature(data), modalities=["image"])
        if spans is None:
            return data
        masks = [tokens_within(*row) for row in zip(spans, data.pop("offset_mapping"), strict=True)]
        data["answer_mask"] = torch.tensor(masks) if kwargs.get("return_tensors") == "pt" else masks
        return data

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        num_tokens = [self._num_tokens_per_frame()] * len(image_sizes)
        return MultiModalData(num_image_tokens=num_tokens, num_image_patches=[1] * len(image_sizes))


__all__ = ["FrameStream", "LlavaMiniProcessor"]
