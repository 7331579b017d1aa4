"""LLaVA-Mini: transformers' LLaVA with compression and modality pre-fusion ahead of the language model."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .compressors import COMPRESSORS, Compressor
from .compressors.query import Attention
from .configuration import COPIES, LlavaMiniConfig
from .encoded_images import Pictures
from .outputs import LlavaMiniCausalLMOutputWithPast, LlavaMiniModelOutputWithPast
from .prefusion import Prefusion
from .vision_tower import query_and_key
from .visual_embedding import FusionMixin
from .visual_layout import Pixels, prefusion_positions

NEW_MODULES = re.compile(r"(^|\.)(compressor|prefusion)\.")


class LlavaMiniPreTrainedModel(LlavaPreTrainedModel):
    config: LlavaMiniConfig
    config_class = LlavaMiniConfig
    # queries and linear maps of a compressor work on one device
    _no_split_modules = sorted({compressor.__name__ for compressor in COMPRESSORS.values()})

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Compressor | Attention):
            module.reset_parameters()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        # Transformers calls this while LlavaModel is being built too, ahead of pre-fusion.
        model: Any = self.base_model
        prefusion = getattr(model, "prefusion", None)
        if prefusion is None or self.config.prefusion_init == "fresh":
            return
        if self.config.prefusion_init in COPIES:
            prefusion.copy_layers(model.language_model.layers)
            if self.config.prefusion_init == "identity":
                prefusion.silence()
        elif not all(getattr(p, "_is_hf_initialized", False) for p in prefusion.parameters()):
            prefusion.copy_file(self.config.prefusion_init)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """As in transformers; takes LLaVA-Mini checkpoints and ordinary LLaVA ones, whose compressor and pre-fusion
        layers are then initialised. Those and the projector stay unquantised in 8 and 4 bits.

        Raises:
            ValueError: If the checkpoint lacks weights of the vision tower, the projector or the language model.
        """
        quantization = kwargs.get("quantization_config")
        if isinstance(quantization, BitsAndBytesConfig) and quantization.llm_int8_skip_modules is None:
            kwargs["quantization_config"] = quantization = copy.copy(quantization)
            kept = ("model.compressor", "model.prefusion", "model.multi_modal_projector", "lm_head")
            quantization.llm_int8_skip_modules = list(kept)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        model, info = loaded
        missing = sorted(key for key in info["missing_keys"] if not NEW_MODULES.search(key))
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} is no LLaVA checkpoint: it lacks {len(missing)} weights that only "
                f"LLaVA could provide, the first of them {missing[0]}"
            )
        return (model, info) if output_loading_info else model


class LlavaMiniModel(FusionMixin, LlavaMiniPreTrainedModel, LlavaModel):
    """LLaVA-Mini without the language modelling head.

    In the official code's order (ictnlp/LLaVA-Mini, commit 47da113) the compressor works on raw vision features, the
    projector maps patches and compressed tokens alike, the pre-fusion layers see [patches | compressed tokens | text],
    and the language model gets the pre-fusion output of the compressed tokens and of the text. `LlavaMiniConfig` has a
    field for everything the paper describes otherwise. With `compressor="none"` and `prefusion_layers=0` this is LLaVA.

    A frame in tiles is compressed from the stitched features of its tiles; those of the whole picture follow them in
    pre-fusion. Text is fused with every frame of its row's pictures by itself, and averaged over the frames, then over
    the pictures; the official code knows one picture a row.

    One departure from that code: it masks token id 0 in pre-fusion, in some vocabularies an ordinary token. Here only
    padding (by `attention_mask`) and answers stay out.
    """

    def __init__(self, config: LlavaMiniConfig):
        config.check()
        super().__init__(config)
        compresses = config.compressor != "none" and config.compressor_size > 0
        self.compressor = COMPRESSORS[config.compressor](config) if compresses else None
        if not {"saliency", "keys"}.isdisjoint(self.needs):
            query_and_key(self.vision_tower, config.vision_feature_layer)  # raises for a tower it does not know
        self.prefusion = Prefusion(self.language_model, config.prefusion_layers) if config.prefusion_layers else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        pixel_values: Pixels | None = None,
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        inputs_embeds: Float[Tensor, "batch length width"] | None = None,
        answer_mask: Bool[Tensor, "batch ending"] | None = None,
        visual_layout: Int[Tensor, "pictures 3"] | None = None,
        pictures: Pictures | None = None,
        padding_mask: Int[Tensor, "batch seen"] | None = None,
        copies: int = 1,
        **kwargs: Any,
    ) -> LlavaMiniModelOutputWithPast:
        """As `LlavaModel.forward`, with text and pictures fused first where there are `pixel_values` or `pictures`.

        Args:
            pixel_values: The crops of all pictures in the order of the text; or a stream that yields the crops of one
                frame at a time, so that a long video is never held whole.
            answer_mask: True at the tokens that pre-fusion leaves alone. May be shorter than the row: it ends with it.
            visual_layout: A line for each picture, in order: the row it belongs to, its frames, its tiles a side.
                Without it every crop is an image.
            pictures: What `encode_pictures` made of `pixel_values`, in their place.
            padding_mask: The 2-D mask, where `attention_mask` is not: `generate` makes 4-D ones for a static cache.
            copies: Each prompt stands in the batch that many times, one after the other, and its pictures are given
                once. `generate` sets it for beams.

        Raises:
            ValueError: If placeholders and pictures do not fit each other, or pictures come twice, without `input_ids`
                or with nothing but a mask that is not 2-D.
            TypeError: If an argument is given that only LLaVA itself supports.
        """
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes", "mm_encoder_outputs"):
            if kwargs.get(name) is not None:
                raise TypeError(f"LLaVA-Mini takes no {name} in a call")
        visual = None
        if pixel_values is not None or pictures is not None:
            if pixel_values is not None and pictures is not None:
                raise ValueError("pictures stand in place of pixel_values: give one of them")
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("pixel_values need input_ids, not inputs_embeds, to find the placeholders")
            mask = attention_mask if padding_mask is None else padding_mask
            if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
                raise ValueError("pre-fusion needs a 2-D mask (batch, length): give it as padding_mask")
            inputs_embeds, visual = self.fuse(
                input_ids, pixel_values, mask, answer_mask, visual_layout, copies, pictures
            )
        elif input_ids is not None and inputs_embeds is None:
            if input_ids.shape[1] > 1 and (input_ids == self.config.image_token_id).any():
                raise ValueError("input_ids have placeholders for pictures, but there are no pixel_values")
            inputs_embeds = self.embed(input_ids)
        outputs = super().forward(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, return_dict=True, **kwargs
        )
        return LlavaMiniModelOutputWithPast(**outputs, image_hidden_states=visual)


class LlavaMiniForConditionalGeneration(LlavaMiniPreTrainedModel, LlavaForConditionalGeneration):
    """LLaVA-Mini with the language modelling head; trains, scores and generates as LLaVA does."""

    def __init__(self, config: LlavaMiniConfig):
        # Past LlavaForConditionalGeneration.__init__, which would build a LlavaModel only to drop it.
        LlavaPreTrainedModel.__init__(self, config)
        self.model = LlavaMiniModel(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_llava(cls, llava: LlavaForConditionalGeneration, **fields: Any) -> LlavaMiniForConditionalGeneration:
        """A LLaVA-Mini on copies of a LLaVA's vision tower, projector and language model, in its dtype, on its device
        and in evaluation mode. Only the new modules draw random numbers: `torch.manual_seed` fixes them.

        Args:
            fields: Fields of [`LlavaMiniConfig`] that LLaVA's configuration has not, `**PRESETS["paper"]` for example.

        Raises:
            TypeError: If there is no such field.
        """
        known = LlavaMiniConfig.__dataclass_fields__.keys() - LlavaConfig.__dataclass_fields__.keys()
        if unknown := sorted(fields.keys() - known):
            raise TypeError(f"from_llava: no field {unknown[0]!r}; there are {', '.join(sorted(known))}")
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the report of weights that are new, as they are meant to be
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
        return model.to(llava.device)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        pixel_values: Pixels | None = None,
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        position_ids: Int[Tensor, "batch length"] | None = None,
        inputs_embeds: Float[Tensor, "batch length width"] | None = None,
        labels: Int[Tensor, "batch length"] | None = None,
        answer_mask: Bool[Tensor, "batch ending"] | None = None,
        visual_layout: Int[Tensor, "pictures 3"] | None = None,
        pictures: Pictures | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        **kwargs: Any,
    ) -> LlavaMiniCausalLMOutputWithPast:
        """As `LlavaMiniModel.forward`; keys and values are given as the installed transformers names them.

        Without `labels` all text is fused. With them the supervised tokens, those whose label is not -100, are not.

        Args:
            answer_mask: True at the tokens that pre-fusion leaves alone; taken from `labels` by default.
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
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # Of a slice, a head without gradients copies its weights for every row of the batch.
        read = outputs.last_hidden_state[:, kept].contiguous()
        logits = self.lm_head(read)  # (batch, kept, vocabulary)
        loss = None
        if labels is not None:
            vocabulary = self.config.get_text_config().vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocabulary, **kwargs)
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return LlavaMiniCausalLMOutputWithPast(loss=loss, logits=logits, **others)

    def encode_pictures(
        self,
        pixel_values: Pixels,
        visual_layout: Int[Tensor, "pictures 3"] | None = None,
        max_bytes: int | None = None,
    ) -> Pictures:
        """Pictures to ask many questions about; see [`llava_mini.visual_embedding.FusionMixin.encode_pictures`]."""
        return self.model.encode_pictures(pixel_values, visual_layout, max_bytes)

    def prefusion_positions(
        self, labels: Int[Tensor, "batch length"] | None = None, **inputs: Any
    ) -> tuple[Int[Tensor, "frames positions"], Int[Tensor, " frames"]]:
        """What pre-fusion's sequences hold when `forward` is called with these inputs; see
        [`llava_mini.visual_layout.prefusion_positions`]."""
        if inputs.get("answer_mask") is None and labels is not None:
            inputs["answer_mask"] = labels != -100
        return prefusion_positions(self.config, **inputs)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, is_first_iteration=False, **kwargs):
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("pictures", None)  # as transformers does with pixel_values
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, is_first_iteration=is_first_iteration, **kwargs
        )
        if inputs.get("pixel_values") is not None or inputs.get("pictures") is not None:
            # for a static cache the attention mask is 4-D by now
            inputs["padding_mask"] = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # Pictures are not repeated for beams: the text is fused with them once, whatever comes of it.
        pictures = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "visual_layout", "pictures")}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | pictures | {"copies": expand_size}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder, num_new_tokens=num_new_tokens
        )
        if not model_kwargs.get("use_cache", True):
            # Without a cache every step starts over: what was generated must stay out of pre-fusion.
            answers = model_kwargs.get("answer_mask")
            if answers is None:
                answers = outputs.logits.new_zeros((outputs.logits.shape[0], 0), dtype=torch.bool)
            model_kwargs["answer_mask"] = nn.functional.pad(answers, (0, num_new_tokens), value=True)
        return model_kwargs


__all__ = ["LlavaMiniForConditionalGeneration", "LlavaMiniModel", "LlavaMiniPreTrainedModel"]
