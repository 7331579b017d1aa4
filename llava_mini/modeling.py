"""LLaVA-Mini models: transformers' LLaVA with compression and modality pre-fusion ahead of the language model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .compressors import COMPRESSORS
from .configuration import LlavaMiniConfig
from .encoded_images import Pictures
from .outputs import LlavaMiniCausalLMOutputWithPast, LlavaMiniModelOutputWithPast
from .prefusion import CACHE_ARGUMENT, Prefusion
from .pretrained_model import LlavaMiniPreTrainedModel, check_plain_weights
from .quick_gelu import replace_quick_gelu
from .vision_tower import query_key_projections
from .visual_embedding import VisualEmbeddingMixin
from .visual_layout import Pixels, prefusion_positions


class LlavaMiniModel(VisualEmbeddingMixin, LlavaMiniPreTrainedModel, LlavaModel):
    """LLaVA-Mini without the language modelling head.

    The order of modules is that of the official code (ictnlp/LLaVA-Mini, commit 47da113):

    1. The compressor reads raw vision features.
    2. The projector maps patches and compressed tokens.
    3. The pre-fusion layers process [patches | compressed tokens | text].
    4. The language model receives the pre-fusion output of the compressed tokens and of the text.

    [`LlavaMiniConfig`] has a field for everything that the paper describes differently. With `compressor="none"` and
    `prefusion_layers=0` the model is LLaVA.

    A frame in tiles is compressed from the stitched features of its tiles. In pre-fusion the features of the whole image
    follow those of the tiles. Text is fused separately with each frame of its row. The results are averaged over the
    frames of each image or video, then over the row's images and videos; the official code supports one a row.

    One difference to that code is intended: it masks token id 0 in pre-fusion, which is an ordinary token in some
    vocabularies. Here pre-fusion leaves out only padding (by `attention_mask`) and answers.

    Args:
        config ([`LlavaMiniConfig`]):
            Configuration of the model.

    Raises:
        ValueError: If a field of `config` is out of range, or the compressor needs saliency or keys of a vision tower
            that is not supported.
    """

    def __init__(self, config: LlavaMiniConfig):
        config.check()
        super().__init__(config)
        replace_quick_gelu(self.vision_tower)
        compresses = config.compressor != "none" and config.compressor_size > 0
        self.compressor = COMPRESSORS[config.compressor](config) if compresses else None
        if not {"saliency", "keys"}.isdisjoint(self.needs):
            query_key_projections(self.vision_tower, config.vision_feature_layer)  # raises if unsupported
        self.prefusion = Prefusion(self.language_model, config.prefusion_layers) if config.prefusion_layers else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        pixel_values: Pixels | None = None,
        attention_mask: Int[Tensor, "batch mask_length"] | None = None,
        inputs_embeds: Float[Tensor, "batch length width"] | None = None,
        answer_mask: Bool[Tensor, "batch answer_length"] | None = None,
        visual_layout: Int[Tensor, "visual_inputs 3"] | None = None,
        pictures: Pictures | None = None,
        padding_mask: Int[Tensor, "batch mask_length"] | None = None,
        copies: int = 1,
        **kwargs: Any,
    ) -> LlavaMiniModelOutputWithPast:
        """Run the model as [`LlavaModel.forward`], after fusing text with `pixel_values` or `pictures` if given.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Token ids, with one placeholder for each visual token.
            pixel_values (`torch.FloatTensor` of shape `(crops, channels, height, width)` or an iterable, *optional*):
                Pixels of all crops, in the order of the text. Or a stream that yields the crops of one frame at a time,
                so that a long video is never in memory as a whole. A thread reads it, one chunk of frames ahead.
            attention_mask (`torch.LongTensor` of shape `(batch, mask_length)`, *optional*):
                0 at padding. It includes cached tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, length, width)`, *optional*):
                Embeddings instead of `input_ids`.
            answer_mask (`torch.BoolTensor` of shape `(batch, answer_length)`, *optional*):
                True at tokens that pre-fusion leaves unchanged. It may be shorter than the row and ends with it.
            visual_layout (`torch.LongTensor` of shape `(visual_inputs, 3)`, *optional*):
                For each image or video, in order: its row, its number of frames, and its tiles along a side. Without it
                every crop is an image.
            pictures ([`Pictures`], *optional*):
                Output of [`encode_pictures`], instead of `pixel_values`.
            padding_mask (`torch.LongTensor` of shape `(batch, mask_length)`, *optional*):
                The 2-D mask if `attention_mask` is 4-D, as `generate` makes it for a static cache.
            copies (`int`, *optional*, defaults to 1):
                Number of successive rows with the same prompt, whose images are given once. `generate` sets it for
                beams.
            kwargs:
                Other arguments of [`LlavaModel.forward`].

        Returns:
            [`LlavaMiniModelOutputWithPast`]: Hidden states, cache, and the visual tokens as `image_hidden_states`.

        Raises:
            ValueError: If placeholders, pixels and layout do not match. If both `pixel_values` and `pictures` are given,
                or one of them without `input_ids` or without a 2-D mask.
            TypeError: If an argument is given that only LLaVA itself supports.
        """
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes", "mm_encoder_outputs"):
            if kwargs.get(name) is not None:
                raise TypeError(f"a forward call of LLaVA-Mini takes no {name}; got {kwargs[name]!r}")
        visual = None
        if pixel_values is not None or pictures is not None:
            if pixel_values is not None and pictures is not None:
                raise ValueError("both pixel_values and pictures are given: give only one of them")
            if input_ids is None or inputs_embeds is not None:
                raise ValueError(
                    "pixel_values and pictures need input_ids, not inputs_embeds, to locate the placeholders"
                )
            mask = attention_mask if padding_mask is None else padding_mask
            if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
                raise ValueError("pre-fusion needs a 2-D mask of shape (batch, length): give it as padding_mask")
            inputs_embeds, visual = self.fuse(
                input_ids, pixel_values, mask, answer_mask, visual_layout, copies, pictures
            )
        elif input_ids is not None and inputs_embeds is None:
            if input_ids.shape[1] > 1 and (input_ids == self.config.image_token_id).any():
                raise ValueError(
                    "input_ids has placeholders for images, but neither pixel_values nor pictures are given"
                )
            inputs_embeds = self.embed(input_ids)
        outputs = super().forward(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, return_dict=True, **kwargs
        )
        return LlavaMiniModelOutputWithPast(**outputs, image_hidden_states=visual)


class LlavaMiniForConditionalGeneration(LlavaMiniPreTrainedModel, LlavaForConditionalGeneration):
    """LLaVA-Mini with the language modelling head. It trains, scores and generates as LLaVA does.

    Args:
        config ([`LlavaMiniConfig`]):
            Configuration of the model.

    Example:
        >>> from llava_mini import LlavaMiniProcessor
        >>> mini_processor = LlavaMiniProcessor.from_llava(processor, mini.config)
        >>> inputs = mini_processor(text="<image> how many shapes are there", images=image, return_tensors="pt")
        >>> output_ids = mini.generate(**inputs, max_new_tokens=2, do_sample=False)
        >>> output_ids.shape[1] - inputs["input_ids"].shape[1] <= 2
        True
    """

    def __init__(self, config: LlavaMiniConfig):
        # Not LlavaForConditionalGeneration.__init__, which would build a LlavaModel that is not used.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaMiniModel(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_llava(cls, llava: LlavaForConditionalGeneration, **fields: Any) -> LlavaMiniForConditionalGeneration:
        """Build a LLaVA-Mini on copies of a LLaVA's vision tower, projector and language model.

        It has the LLaVA's dtype and device, and is in evaluation mode. Only the new modules draw random numbers;
        `torch.manual_seed` makes them reproducible.

        Args:
            llava ([`LlavaForConditionalGeneration`]):
                The LLaVA. It stays unchanged.
            fields:
                Fields that [`LlavaMiniConfig`] adds to LLaVA's configuration, for example `**PRESETS["paper"]`.

        Raises:
            TypeError: If `llava` is no LLaVA, or if a field does not exist.
            ValueError: If `llava` is quantised, offloaded or has adapters.

        Example:
            >>> mini = LlavaMiniForConditionalGeneration.from_llava(model, compressor_size=2, prefusion_layers=1)
            >>> mini.config.num_visual_tokens(patches=36)
            4
        """
        if not isinstance(llava, LlavaForConditionalGeneration):
            raise TypeError(f"from_llava: found a {type(llava).__name__}; pass a LlavaForConditionalGeneration")
        new_fields = LlavaMiniConfig.__dataclass_fields__.keys() - LlavaConfig.__dataclass_fields__.keys()
        if unknown := sorted(fields.keys() - new_fields):
            raise TypeError(f"from_llava: no field {unknown[0]!r}; use one of {', '.join(sorted(new_fields))}")
        check_plain_weights(llava)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the new modules are missing in LLaVA on purpose, so do not report them
        try:
            model = cls.from_pretrained(
                None,
                config=LlavaMiniConfig(**(llava.config.to_dict() | fields)),
                state_dict={name: tensor.clone() for name, tensor in llava.state_dict().items()},
                dtype=llava.dtype,
                attn_implementation={
                    "vision_config": llava.model.vision_tower.config._attn_implementation,
                    "text_config": llava.model.language_model.config._attn_implementation,
                },
            )
        finally:
            logging.set_verbosity(verbosity)
        model.name_or_path = model.config.name_or_path = llava.name_or_path
        # Some models name their end-of-turn token there alone.
        model.generation_config = copy.deepcopy(llava.generation_config)
        return model.to(llava.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        pixel_values: Pixels | None = None,
        attention_mask: Int[Tensor, "batch mask_length"] | None = None,
        position_ids: Int[Tensor, "batch length"] | None = None,
        inputs_embeds: Float[Tensor, "batch length width"] | None = None,
        labels: Int[Tensor, "batch length"] | None = None,
        answer_mask: Bool[Tensor, "batch answer_length"] | None = None,
        visual_layout: Int[Tensor, "visual_inputs 3"] | None = None,
        pictures: Pictures | None = None,
        logits_to_keep: int | Int[Tensor, " positions"] = 0,
        **kwargs: Any,
    ) -> LlavaMiniCausalLMOutputWithPast:
        """Run the model as [`LlavaMiniModel.forward`], and compute logits and, with `labels`, the loss.

        Without `labels` all text is fused. With them the supervised tokens, whose label is not -100, are not fused.

        Args:
            input_ids, pixel_values, attention_mask, inputs_embeds, visual_layout, pictures:
                As in [`LlavaMiniModel.forward`].
            position_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Positions of the tokens in the language model.
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Labels of the language modelling loss; -100 is ignored.
            answer_mask (`torch.BoolTensor` of shape `(batch, answer_length)`, *optional*):
                True at tokens that pre-fusion leaves unchanged; computed from `labels` by default. A trainer that keeps
                the labels for a loss of its own, as with `label_smoothing_factor`, must give this mask instead.
            logits_to_keep (`int` or `torch.LongTensor`, *optional*, defaults to 0):
                Number of last positions, or indices of the positions, to compute logits of; 0 for all.
            kwargs:
                Other arguments of [`LlavaForConditionalGeneration.forward`], among them the cache under the name that
                the installed transformers gives it.

        Returns:
            [`LlavaMiniCausalLMOutputWithPast`]: Loss, logits, cache, and the visual tokens as `image_hidden_states`.

        Raises:
            ValueError, TypeError: As [`LlavaMiniModel.forward`].
        """
        if answer_mask is None and labels is not None:
            answer_mask = labels != -100
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            answer_mask=answer_mask,
            visual_layout=visual_layout,
            pictures=pictures,
            **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # On a non-contiguous slice, a head without gradients would copy its weights for every row of the batch.
        hidden_states = outputs.last_hidden_state[:, positions].contiguous()
        logits = self.lm_head(hidden_states)  # (batch, positions, vocabulary)
        loss = None
        if labels is not None:
            vocabulary = self.config.get_text_config().vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return LlavaMiniCausalLMOutputWithPast(loss=loss, logits=logits, **others)

    def encode_pictures(
        self,
        pixel_values: Pixels,
        visual_layout: Int[Tensor, "visual_inputs 3"] | None = None,
        max_bytes: int | None = None,
    ) -> Pictures:
        """Encode images and videos once, to ask many questions about them; see [`LlavaMiniModel.encode_pictures`].

        Example:
            >>> pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
            >>> pictures = mini.encode_pictures(pixels)
            >>> ids = torch.tensor([[5, mini.config.image_token_id, 6]])
            >>> torch.allclose(
            ...     mini(input_ids=ids, pictures=pictures).logits, mini(input_ids=ids, pixel_values=pixels).logits, atol=1e-4
            ... )
            True
        """
        return self.model.encode_pictures(pixel_values, visual_layout, max_bytes)

    def prefusion_positions(
        self, labels: Int[Tensor, "batch length"] | None = None, **inputs: Any
    ) -> tuple[Int[Tensor, "frames positions"], Int[Tensor, " frames"]]:
        """Describe the sequences that pre-fusion processes when `forward` is called with these inputs.

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Labels, as in `forward`.
            inputs:
                Other arguments of `forward`.

        Returns:
            What each position of a frame's sequence holds, a `torch.LongTensor` of shape `(frames, positions)` as of
            [`llava_mini.visual_layout.prefusion_positions`]; and the batch row of each frame's text, a
            `torch.LongTensor` of shape `(frames,)`.

        Raises:
            ValueError: If there are no pre-fusion layers, or the layout does not match the rows or the pixels.

        Example:
            >>> ids = torch.tensor([[5, mini.config.image_token_id, 6]])
            >>> positions, rows = mini.prefusion_positions(input_ids=ids, pixel_values=torch.zeros(1, 3, 48, 48))
            >>> positions.shape  # 36 patches, 1 compressed token and 2 text tokens
            torch.Size([1, 39])
        """
        if inputs.get("answer_mask") is None and labels is not None:
            inputs["answer_mask"] = labels != -100
        return prefusion_positions(self.config, **inputs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # The cache is among the other arguments of `forward`, and _expand_inputs_for_generation adds "copies".
        others = {name: value for name, value in model_kwargs.items() if name not in (CACHE_ARGUMENT, "copies")}
        super()._validate_model_kwargs(others)

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        cache = kwargs.get(CACHE_ARGUMENT)
        if is_first_iteration and cache is not None and (cached := cache.get_seq_length()):
            looks_again = any(kwargs.get(name) is not None for name in ("pixel_values", "pictures"))
            has_images = bool((input_ids == self.config.image_token_id).any())
            if looks_again or (has_images and self.config.prefusion_layers):
                raise ValueError(
                    f"{CACHE_ARGUMENT} holds {cached} tokens of a prompt with images, and new text is not fused with "
                    "images in a cache: give the whole prompt without it (encode_pictures encodes the images only once)"
                )
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("pictures", None)  # as transformers does with pixel_values
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if inputs.get("pixel_values") is not None or inputs.get("pictures") is not None:
            # With a static cache, transformers has already made the attention mask 4-D.
            inputs["padding_mask"] = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # Images are not repeated for beams, because the prompt of all beams is fused with them once.
        shared = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "visual_layout", "pictures")}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | shared | {"copies": expand_size}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder, num_new_tokens=num_new_tokens
        )
        if not model_kwargs.get("use_cache", True):
            # Without a cache every step repeats pre-fusion, which must leave the generated tokens out.
            answer_mask = model_kwargs.get("answer_mask")
            if answer_mask is None:
                answer_mask = outputs.logits.new_zeros((outputs.logits.shape[0], 0), dtype=torch.bool)
            model_kwargs["answer_mask"] = nn.functional.pad(answer_mask, (0, num_new_tokens), value=True)
        return model_kwargs


__all__ = ["LlavaMiniForConditionalGeneration", "LlavaMiniModel"]
