"""Steps ahead of the language model: encode images and videos as visual tokens, and fuse text with them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .chunk_size import choose_chunk_size, choose_encoded_chunk_size
from .compressors import Compressor
from .configuration import LlavaMiniConfig
from .encoded_images import EncodedFrames, Pictures
from .prefusion import PastKeyValues, Prefusion
from .read_ahead import read_ahead
from .vision_tower import VisionFeatures, run_vision_tower
from .visual_layout import Pixels, pack_rows


class VisualEmbeddingMixin:
    """Build the language model's input embeddings in a LlavaModel with `compressor` and `prefusion`."""

    config: LlavaMiniConfig
    compressor: Compressor | None
    prefusion: Prefusion | None
    vision_tower: Any
    multi_modal_projector: Any
    language_model: Any

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the names of the compressor's inputs besides the features; see [`Compressor`]."""
        return () if self.compressor is None else self.compressor.needs

    def look_at(self, pixel_values: Float[Tensor, "crops channels height width"]) -> VisionFeatures:
        """Run the vision tower on crops.

        Every use of pixels in the model goes through this method.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(crops, channels, height, width)`):
                Pixels of the crops.

        Returns:
            `VisionFeatures`: Features of the selected layers ahead of the projector. Saliency and keys are included if
            the compressor needs either.
        """
        with_attention = not {"saliency", "keys"}.isdisjoint(self.needs)
        return run_vision_tower(self.vision_tower, self.config, pixel_values, with_attention)

    def encode(
        self,
        pixels: Float[Tensor, "frames crops channels height width"],
        text: Float[Tensor, "frames length width"] | None = None,
        text_mask: Bool[Tensor, "frames length"] | None = None,
    ) -> tuple[Float[Tensor, "frames patches width"], Float[Tensor, "frames tokens width"]]:
        """Encode frames as projected patches and visual tokens.

        Args:
            pixels (`torch.FloatTensor` of shape `(frames, crops, channels, height, width)`):
                Pixels of the frames. A frame is one crop, or its tiles in row-major order followed by the whole image.
            text (`torch.FloatTensor` of shape `(frames, length, width)`, *optional*):
                Raw embeddings of each frame's question, for a compressor that needs the text.
            text_mask (`torch.BoolTensor` of shape `(frames, length)`, *optional*):
                False at padding of `text`.

        Returns:
            - `torch.FloatTensor` of shape `(frames, patches, width)`: patches for pre-fusion, empty without pre-fusion.
            - `torch.FloatTensor` of shape `(frames, tokens, width)`: visual tokens.

        Raises:
            ValueError: If the compressor needs the text and `text` or `text_mask` is None.
        """
        crops = pixels.shape[1]
        crop_features = self.look_at(pixels.flatten(0, 1))
        frame_features = crop_features.stitch_frames(crops)
        patches = grid = frame_features.features  # (frames, tiles * tiles * patches, vision_width)
        if crops > 1:
            whole = crop_features.features.unflatten(0, pixels.shape[:2])[:, -1]
            patches = torch.cat([grid, whole], dim=1)
        num_tokens = self.config.num_visual_tokens(grid.shape[1])
        if not self.config.compress_before_projection:
            patches = self.multi_modal_projector(patches)
            grid = patches[:, : grid.shape[1]]
            if self.compressor is None:
                return patches, grid[:, :num_tokens]
            tokens = self._compress(grid, frame_features, grid, text, text_mask)
            return patches, torch.cat([grid, tokens], dim=1) if self.config.keep_patches else tokens
        if self.compressor is None:
            patches = self.multi_modal_projector(grid if self.prefusion is None else patches)
            return patches, patches[:, :num_tokens]
        projected_grid = self.multi_modal_projector(grid) if "projected" in self.needs else None
        tokens = self._compress(grid, frame_features, projected_grid, text, text_mask)
        if self.prefusion is None:
            patches = grid if self.config.keep_patches else patches[:, :0]
        projected = self.multi_modal_projector(torch.cat([patches, tokens], dim=1))
        return projected[:, :-num_tokens], projected[:, -num_tokens:]

    def encode_pictures(
        self,
        pixel_values: Pixels,
        visual_layout: Int[Tensor, "visual_inputs 3"] | None = None,
        max_bytes: int | None = None,
    ) -> Pictures:
        """Encode images and videos once, to ask many questions about them.

        Everything that does not depend on the question is computed here. Gradients are tracked as in `forward`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(crops, channels, height, width)` or an iterable):
                Pixels of all crops, as in [`LlavaMiniModel.forward`].
            visual_layout (`torch.LongTensor` of shape `(visual_inputs, 3)`, *optional*):
                Row, frames and tiles of each image or video, as in [`LlavaMiniModel.forward`]. Without it every crop is
                the image of one row.
            max_bytes (`int`, *optional*):
                Memory limit of the encodings; `Pictures.nbytes` reports their size. Frames beyond the limit are encoded
                with each question, and the returned object holds `pixel_values` for them.

        Returns:
            [`Pictures`]: The encodings, for `model(input_ids=..., pictures=pictures)`.

        Raises:
            ValueError: If the layout does not match the pixels. If the compressor needs the text, because no encoding
                is then independent of the question. If frames exceed `max_bytes` and `pixel_values` is a stream that
                can be read only once.

        Example:
            >>> pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
            >>> mini.encode_pictures(pixels).kept_frames
            1
        """
        if "text" in self.needs:
            raise ValueError(
                f"the compressor {self.config.compressor!r} reads the question, so pictures cannot be encoded ahead of "
                "it: give pixel_values with each question"
            )
        if visual_layout is not None:
            rows = int(visual_layout[:, 0].max()) + 1
        else:
            rows = len(pixel_values) if isinstance(pixel_values, Tensor) else 0
        pictures = Pictures.of_pixels(pixel_values, visual_layout, torch.ones(rows, dtype=torch.long))
        encodings: list[EncodedFrames] = []
        like = self.embed(torch.zeros(1, 1, dtype=torch.long, device=cast(Any, self).device))
        used_bytes = 0
        chunk_size = choose_chunk_size(self.config, pictures.source.frame_tiles, 0, like.device, like.dtype)
        with _read_chunks(pictures, chunk_size) as chunks:
            for frames, pixels in chunks:
                encoding = self._encode_for_reuse(frames, *self._encode_like(pixels, like))
                used_bytes += encoding.nbytes
                if max_bytes is not None and used_bytes > max_bytes:
                    if iter(pixel_values) is pixel_values:
                        raise ValueError(
                            f"frames from {frames.start} on exceed max_bytes={max_bytes:,}, and the stream can be read "
                            "only once: give a tensor, a list, or a stream that restarts"
                        )
                    return replace(pictures, kept=tuple(encodings))
                encodings.append(encoding)
        return replace(pictures, kept=tuple(encodings), pixel_values=None)

    def fuse(
        self,
        input_ids: Int[Tensor, "batch length"],
        pixel_values: Pixels | None = None,
        attention_mask: Int[Tensor, "batch mask_length"] | None = None,
        answer_mask: Bool[Tensor, "batch answer_length"] | None = None,
        visual_layout: Int[Tensor, "visual_inputs 3"] | None = None,
        copies: int = 1,
        pictures: Pictures | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], Float[Tensor, "tokens width"]]:
        """Compute the language model's input embeddings, with text fused and visual tokens at their placeholders.

        Rows without images or videos have their raw embeddings.

        Args:
            input_ids, pixel_values, attention_mask, answer_mask, visual_layout, copies, pictures:
                As in [`LlavaMiniModel.forward`].

        Returns:
            - `torch.FloatTensor` of shape `(batch, length, width)`: input embeddings.
            - `torch.FloatTensor` of shape `(tokens, width)`: visual tokens among them, in the order of the text.

        Raises:
            ValueError: If placeholders, pixels and layout do not match.
        """
        embeds = self.embed(input_ids)  # (batch, length, width)
        is_visual = (input_ids == self.config.image_token_id)[::copies]  # (rows, length)
        placeholders = is_visual.sum(dim=1)
        if pictures is None:
            pictures = Pictures.of_pixels(cast(Pixels, pixel_values), visual_layout, placeholders)
        pictures.check(placeholders, visual_layout)
        layout = pictures.layout
        frame_row, frame_weight = layout.frame_row.to(embeds.device), layout.frame_weight.to(embeds.device)

        is_text = torch.zeros_like(is_visual)
        if self.prefusion is not None or "text" in self.needs:
            masks = (mask if mask is None else mask[::copies] for mask in (attention_mask, answer_mask))
            is_text = layout.fused_text(is_visual, *masks)
        text, filled = pack_rows(embeds[::copies], is_text)  # (rows, longest, width)
        fused = torch.zeros_like(text, dtype=torch.float32)

        visual: list[Tensor] = [embeds.new_empty(0)] * len(frame_row)
        with closing(self._fuse_frames(pictures, text, filled, frame_row)) as fused_frames:
            for frame_index, frame_tokens, frame_text in fused_frames:
                weight = frame_weight[frame_index, None, None]
                fused = fused.index_add(0, frame_row[frame_index], frame_text.float() * weight)
                for frame, tokens in zip(frame_index.tolist(), frame_tokens.unbind(), strict=True):
                    visual[frame] = tokens
        layout.check_placeholders(placeholders, torch.tensor([len(tokens) for tokens in visual]))

        tokens = torch.cat(visual)  # (tokens, width)
        is_visual, is_text, filled = (x.repeat_interleave(copies, dim=0) for x in (is_visual, is_text, filled))
        if self.prefusion is not None:
            fused = fused.to(embeds.dtype).repeat_interleave(copies, dim=0)
            embeds = embeds.masked_scatter(is_text[..., None], fused[filled])
        if copies > 1:
            tokens = torch.cat([row for row in tokens.split(placeholders.tolist()) for _ in range(copies)])
        return embeds.masked_scatter(is_visual[..., None], tokens), tokens

    def embed(self, input_ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """Return the raw text embeddings.

        The embedding of a placeholder itself is never used, so its id may lie outside the vocabulary.
        """
        is_visual = input_ids == self.config.image_token_id
        embeds = cast(Any, self).get_input_embeddings()(input_ids.masked_fill(is_visual, 0))
        return embeds.detach() if self.config.detach_embeddings else embeds

    def _compress(
        self,
        features: Float[Tensor, "frames patches width"],
        vision: VisionFeatures,
        projected: Tensor | None,
        text: Tensor | None,
        mask: Tensor | None,
    ) -> Float[Tensor, "frames tokens width"]:
        if "text" in self.needs and (text is None or mask is None):
            raise ValueError(f"the compressor {self.config.compressor!r} reads the text: give text and text_mask")
        text = text if text is None else text.to(features.dtype)
        available = {
            "saliency": vision.saliency,
            "keys": vision.keys,
            "projected": projected,
            "text": text,
            "text_mask": mask,
        }
        tokens = cast(Compressor, self.compressor)(features, **{name: available[name] for name in self.needs})[0]
        return tokens.to(features.device)  # a device map may put the compressor on another device

    def _fuse_frames(
        self,
        pictures: Pictures,
        text: Float[Tensor, "rows length width"],
        filled: Bool[Tensor, "rows length"],
        frame_row: Int[Tensor, " frames"],
    ) -> Generator[
        tuple[Int[Tensor, " chunk"], Float[Tensor, "chunk tokens width"], Float[Tensor, "chunk length width"]],
        None,
        None,
    ]:
        """Fuse the text of every row with each of its frames, one chunk of frames at a time.

        Yields:
            Indices of the chunk's frames in `pictures.layout`, their visual tokens, and their rows' text fused with
            them.
        """
        for encoding in pictures.kept:
            if len(frame_index := pictures.asking(encoding.frames)):
                yield from self._fuse_encoded(encoding.to(text.device), frame_index, pictures, text, frame_row)
        if pictures.pixel_values is None:
            return
        chunk_size = choose_chunk_size(self.config, pictures.source.frame_tiles, text.shape[1], text.device, text.dtype)
        with _read_chunks(pictures, chunk_size) as chunks:
            for frames, pixels in chunks:
                if not len(frame_index := pictures.asking(frames)):
                    continue
                question = [x[frame_row[frame_index]] for x in (text, filled)] if "text" in self.needs else []
                patches, tokens = self._encode_like(pixels, text, *question)
                if torch.equal(pictures.frame[frame_index], torch.arange(frames.start, frames.stop)):
                    # Each frame has exactly one question, so visual tokens and text pass through pre-fusion together.
                    fused = text[frame_row[frame_index]]
                    if self.prefusion is not None:
                        tokens, fused = self._prefuse(patches, tokens, fused)
                    yield frame_index, tokens.clone(), fused  # a view would keep the chunk's patches in memory
                else:
                    encoding = self._encode_for_reuse(frames, patches, tokens)
                    yield from self._fuse_encoded(encoding, frame_index, pictures, text, frame_row)

    def _fuse_encoded(
        self, encoding: EncodedFrames, frame_index: Tensor, pictures: Pictures, text: Tensor, frame_row: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Fuse text with frames whose keys and values in pre-fusion are in `encoding`; see [`_fuse_frames`]."""
        chunk_size = choose_encoded_chunk_size(
            self.config, encoding.nbytes / len(encoding.tokens), text.shape[1], text.dtype
        )
        for chunk in frame_index.split(chunk_size):
            source_frame, fused = pictures.frame[chunk], text[frame_row[chunk]]
            if self.prefusion is not None:
                past = encoding.select_past(source_frame)
                _, fused = self.prefusion(fused[:, :0], fused, self.language_model.rotary_emb, past=past)
            yield chunk, encoding.tokens[source_frame - encoding.frames.start], fused

    def _encode_like(
        self, pixels: Float[Tensor, "frames crops channels height width"], like: Tensor, *question: Tensor
    ) -> tuple[Float[Tensor, "frames patches width"], Float[Tensor, "frames tokens width"]]:
        """Call [`encode`] on pixels of any device and dtype, and return its outputs in those of `like`.

        Args:
            pixels: Pixels of the frames.
            like: Tensor with the device and dtype of the outputs.
            question: The text and its mask, or nothing.
        """
        patches, tokens = self.encode(pixels.to(like.device, self.vision_tower.dtype), *question)
        return patches.to(like.device, like.dtype), tokens.to(like.device, like.dtype)

    def _encode_for_reuse(
        self,
        frames: slice,
        patches: Float[Tensor, "frames patches width"],
        tokens: Float[Tensor, "frames tokens width"],
    ) -> EncodedFrames:
        """Run pre-fusion over the visual tokens alone and store their keys and values."""
        past: PastKeyValues = []
        if self.prefusion is not None:
            tokens, _ = self._prefuse(patches, tokens, patches[:, :0], past)
        return EncodedFrames(frames, tokens.clone(), past)

    def _prefuse(
        self,
        patches: Float[Tensor, "frames patches width"],
        tokens: Float[Tensor, "frames tokens width"],
        text: Float[Tensor, "frames length width"],
        past: PastKeyValues | None = None,
    ) -> tuple[Float[Tensor, "frames tokens width"], Float[Tensor, "frames length width"]]:
        """Run pre-fusion and return the language model's visual tokens and the text fused with each frame.

        Keys and values of the visual tokens are appended to `past`.
        """
        rotary_emb, prefusion = self.language_model.rotary_emb, cast(Prefusion, self.prefusion)
        num_patches = patches.shape[1]
        if not self.config.prefuse_visual_tokens:
            return tokens, prefusion(patches, text, rotary_emb, unread=num_patches, past=past)[1]
        if self.compressor is None and tokens.shape[1]:  # the visual tokens are the first patches
            visual, text = prefusion(patches, text, rotary_emb, past=past)
            return visual[:, : tokens.shape[1]], text
        visual = torch.cat([patches, tokens], dim=1)
        return prefusion(visual, text, rotary_emb, unread=num_patches, past=past)


def _read_chunks(
    pictures: Pictures, size: int
) -> AbstractContextManager[Iterator[tuple[slice, Float[Tensor, "frames crops channels height width"]]]]:
    """Return the chunks of frames without an encoding; a thread reads a stream of several chunks.

    Args:
        pictures: Images and videos with pixels.
        size: Largest number of frames in a chunk.
    """
    pixels = cast(Pixels, pictures.pixel_values)
    chunks = pictures.source.chunks(pixels, size, pictures.kept_frames)
    is_one_chunk = len(pictures.source.frame_tiles) - pictures.kept_frames <= size
    return nullcontext(chunks) if isinstance(pixels, Tensor) or is_one_chunk else read_ahead(chunks)


__all__ = ["VisualEmbeddingMixin"]
