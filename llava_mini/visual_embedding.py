"""How pictures become visual tokens, and text is fused with them, ahead of the language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .compressors import Compressor
from .configuration import LlavaMiniConfig
from .encoded_images import EncodedFrames, Pictures
from .prefusion import Past, Prefusion
from .vision_tower import TowerView, look
from .visual_layout import Pixels, pack


class FusionMixin:
    """What LLaVA-Mini does ahead of the language model, for a LlavaModel with `compressor` and `prefusion`."""

    config: LlavaMiniConfig
    compressor: Compressor | None
    prefusion: Prefusion | None
    vision_tower: Any
    multi_modal_projector: Any
    language_model: Any

    @property
    def needs(self) -> tuple[str, ...]:
        """What the compressor works on besides the features."""
        return () if self.compressor is None else self.compressor.needs

    def look_at(self, pixel_values: Float[Tensor, "crops channels height width"]) -> TowerView:
        """Raw features of the selected layers of the vision tower, ahead of the projector; with saliency and keys where
        the compressor needs either. All that is known of the pixels comes from here."""
        attends = not {"saliency", "keys"}.isdisjoint(self.needs)
        return look(self.vision_tower, self.config, pixel_values, attends)

    def encode(
        self,
        pixels: Float[Tensor, "frames crops channels height width"],
        text: Float[Tensor, "frames length width"] | None = None,
        text_mask: Bool[Tensor, "frames length"] | None = None,
    ) -> tuple[Float[Tensor, "frames patches width"], Float[Tensor, "frames tokens width"]]:
        """Frames -> what pre-fusion sees of them, and their visual tokens, both projected. A frame is one crop, or its
        tiles in row-major order and then the whole picture. Without pre-fusion the first is empty.

        Args:
            text, text_mask: Raw embeddings of the text that is asked of each frame, and where they are no padding; for a
                compressor that needs the text.

        Raises:
            ValueError: If the compressor needs the text and there is none.
        """
        crops = pixels.shape[1]
        view = self.look_at(pixels.flatten(0, 1))
        seen = view.of_frames(crops)
        patches = detail = seen.features  # (frames, tiles * tiles * patches, vision_width)
        if crops > 1:
            whole = view.features.unflatten(0, pixels.shape[:2])[:, -1]
            patches = torch.cat([detail, whole], dim=1)
        count = self.config.num_visual_tokens(detail.shape[1])
        if not self.config.compress_before_projection:
            patches = self.multi_modal_projector(patches)
            detail = patches[:, : detail.shape[1]]
            if self.compressor is None:
                return patches, detail[:, :count]
            tokens = self._compress(detail, seen, text, text_mask)
            return patches, torch.cat([detail, tokens], dim=1) if self.config.keep_patches else tokens
        if self.compressor is None:
            patches = self.multi_modal_projector(detail if self.prefusion is None else patches)
            return patches, patches[:, :count]
        tokens = self._compress(detail, seen, text, text_mask)
        if self.prefusion is None:
            patches = detail if self.config.keep_patches else patches[:, :0]
        both = self.multi_modal_projector(torch.cat([patches, tokens], dim=1))
        return both[:, :-count], both[:, -count:]

    def _compress(
        self, features: Float[Tensor, "frames patches width"], seen: TowerView, text: Tensor | None, mask: Tensor | None
    ) -> Float[Tensor, "frames tokens width"]:
        if "text" in self.needs and (text is None or mask is None):
            raise ValueError(f"the compressor {self.config.compressor!r} reads the text: give text and text_mask")
        text = text if text is None else text.to(features.dtype)
        known = {"saliency": seen.saliency, "keys": seen.keys, "text": text, "text_mask": mask}
        return cast(Compressor, self.compressor)(features, **{name: known[name] for name in self.needs})[0]

    def encode_pictures(
        self,
        pixel_values: Pixels,
        visual_layout: Int[Tensor, "pictures 3"] | None = None,
        max_bytes: int | None = None,
    ) -> Pictures:
        """Pictures to ask many questions about, as `model(input_ids=..., pictures=pictures)`: everything that does not
        depend on the question is computed here, once. Gradients are kept track of as in `forward`.

        Args:
            pixel_values, visual_layout: As in `forward`. Without a layout every crop is the image of a row.
            max_bytes: Room for what is kept (`Pictures.nbytes` says what is used). The frames that do not fit in are
                encoded anew with each question, from `pixel_values`, which are then held on to.

        Raises:
            ValueError: If the layout does not fit the pixels, or frames do not fit in and are a stream that can be
                gone through only once; or if the compressor needs the text, so that nothing can be kept.
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
        kept: list[EncodedFrames] = []
        like = self.embed(torch.zeros(1, 1, dtype=torch.long, device=cast(Any, self).device))
        used = 0
        for frames, pixels in pictures.source.chunks(pixel_values, self.config.frames_per_chunk):
            part = self._keep(frames, *self._look(pixels, like))
            used += part.nbytes
            if max_bytes is not None and used > max_bytes:
                if iter(pixel_values) is pixel_values:
                    raise ValueError(
                        f"frames from {frames.start} on do not fit in max_bytes={max_bytes:,}, and the stream can be gone "
                        "through only once: give a tensor, a list, or a stream that starts anew"
                    )
                return replace(pictures, kept=tuple(kept))
            kept.append(part)
        return replace(pictures, kept=tuple(kept), pixel_values=None)

    def fuse(
        self,
        input_ids: Int[Tensor, "batch length"],
        pixel_values: Pixels | None = None,
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        answer_mask: Bool[Tensor, "batch ending"] | None = None,
        visual_layout: Int[Tensor, "pictures 3"] | None = None,
        copies: int = 1,
        pictures: Pictures | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], Float[Tensor, "tokens width"]]:
        """The language model's input embeddings, and the visual tokens among them. Rows without pictures keep their raw
        embeddings. Arguments as in `forward`.

        Raises:
            ValueError: If placeholders, pictures and layout do not fit each other.
        """
        embeds = self.embed(input_ids)  # (batch, length, width)
        is_visual = (input_ids == self.config.image_token_id)[::copies]  # (rows, length)
        placeholders = is_visual.sum(dim=1)
        if pictures is None:
            pictures = Pictures.of_pixels(cast(Pixels, pixel_values), visual_layout, placeholders)
        pictures.check(len(placeholders), visual_layout)
        layout = pictures.layout
        frame_row, frame_weight = layout.frame_row.to(embeds.device), layout.frame_weight.to(embeds.device)

        is_text = torch.zeros_like(is_visual)
        if self.prefusion is not None or "text" in self.needs:
            masks = (mask if mask is None else mask[::copies] for mask in (attention_mask, answer_mask))
            is_text = layout.fused_text(is_visual, *masks)
        text, filled = pack(embeds[::copies], is_text)  # (rows, most, width)
        fused = torch.zeros_like(text, dtype=torch.float32)

        visual: list[Tensor] = [embeds.new_empty(0)] * len(frame_row)
        for asked, tokens, frame_text in self._ask(pictures, text, filled, frame_row):
            fused = fused.index_add(0, frame_row[asked], frame_text.float() * frame_weight[asked, None, None])
            for frame, of_frame in zip(asked.tolist(), tokens.unbind(), strict=True):
                visual[frame] = of_frame
        layout.check_placeholders(placeholders, torch.tensor([len(tokens) for tokens in visual]))

        tokens = torch.cat(visual)  # (tokens, width)
        is_visual, is_text, filled = (x.repeat_interleave(copies, dim=0) for x in (is_visual, is_text, filled))
        if self.prefusion is not None:
            fused = fused.to(embeds.dtype).repeat_interleave(copies, dim=0)
            embeds = embeds.masked_scatter(is_text[..., None], fused[filled])
        if copies > 1:
            tokens = torch.cat([row for row in tokens.split(placeholders.tolist()) for _ in range(copies)])
        return embeds.masked_scatter(is_visual[..., None], tokens), tokens

    def _ask(
        self,
        pictures: Pictures,
        text: Float[Tensor, "rows length width"],
        filled: Bool[Tensor, "rows length"],
        frame_row: Int[Tensor, " frames"],
    ) -> Iterator[
        tuple[Int[Tensor, " asked"], Float[Tensor, "asked tokens width"], Float[Tensor, "asked length width"]]
    ]:
        """Some frames of the layout at a time: which, their visual tokens, and their rows' text fused with them."""
        for part in pictures.kept:
            if len(asked := pictures.asking(part.frames)):
                yield from self._ask_kept(part.to(text.device), asked, pictures, text, frame_row)
        if pictures.pixel_values is None:
            return
        size = self.config.frames_per_chunk
        for frames, pixels in pictures.source.chunks(pictures.pixel_values, size, pictures.kept_frames):
            if not len(asked := pictures.asking(frames)):
                continue
            read = [x[frame_row[asked]] for x in (text, filled)] if "text" in self.needs else []
            patches, tokens = self._look(pixels, text, *read)
            if torch.equal(pictures.frame[asked], torch.arange(frames.start, frames.stop)):  # one question a frame
                fused = text[frame_row[asked]]
                if self.prefusion is not None:
                    tokens, fused = self._prefuse(patches, tokens, fused)
                yield asked, tokens.clone(), fused  # a view would keep all patches of the chunk
            else:
                yield from self._ask_kept(self._keep(frames, patches, tokens), asked, pictures, text, frame_row)

    def _ask_kept(
        self, part: EncodedFrames, asked: Tensor, pictures: Pictures, text: Tensor, frame_row: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for some in asked.split(self.config.frames_per_chunk):
            frame, fused = pictures.frame[some], text[frame_row[some]]
            if self.prefusion is not None:
                _, fused = self.prefusion(fused[:, :0], fused, self.language_model.rotary_emb, past=part.take(frame))
            yield some, part.tokens[frame - part.frames.start], fused

    def _look(
        self, pixels: Float[Tensor, "frames crops channels height width"], like: Tensor, *read: Tensor
    ) -> tuple[Float[Tensor, "frames patches width"], Float[Tensor, "frames tokens width"]]:
        """`encode`, from any device and dtype to those of `like`. What is read is the text and its mask."""
        patches, tokens = self.encode(pixels.to(like.device, self.vision_tower.dtype), *read)
        return patches.to(like.device, like.dtype), tokens.to(like.device, like.dtype)

    def _keep(
        self,
        frames: slice,
        patches: Float[Tensor, "frames patches width"],
        tokens: Float[Tensor, "frames tokens width"],
    ) -> EncodedFrames:
        past: Past = []
        if self.prefusion is not None:
            tokens, _ = self._prefuse(patches, tokens, patches[:, :0], past)
        return EncodedFrames(frames, tokens.clone(), past)

    def _prefuse(
        self,
        patches: Float[Tensor, "frames patches width"],
        tokens: Float[Tensor, "frames tokens width"],
        text: Float[Tensor, "frames length width"],
        past: Past | None = None,
    ) -> tuple[Float[Tensor, "frames tokens width"], Float[Tensor, "frames length width"]]:
        """The visual tokens that the language model gets, and the text fused with each frame. Keys and values of what
        is visual are put into `past`."""
        rotary_emb, prefusion = self.language_model.rotary_emb, cast(Prefusion, self.prefusion)
        unread = patches.shape[1]
        if not self.config.prefuse_visual_tokens:
            return tokens, prefusion(patches, text, rotary_emb, unread=unread, past=past)[1]
        if self.compressor is None and tokens.shape[1]:  # the visual tokens are the first of the patches
            visual, text = prefusion(patches, text, rotary_emb, past=past)
            return visual[:, : tokens.shape[1]], text
        return prefusion(torch.cat([patches, tokens], dim=1), text, rotary_emb, unread=unread, past=past)

    def embed(self, input_ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """Raw text embeddings. A placeholder's own embedding is never used, so its id may lie past the vocabulary."""
        is_visual = input_ids == self.config.image_token_id
        embeds = cast(Any, self).get_input_embeddings()(input_ids.masked_fill(is_visual, 0))
        return embeds.detach() if self.config.detach_embeddings else embeds


__all__ = ["FusionMixin"]
