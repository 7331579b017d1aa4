"""LLaVA-Mini: transformers' LLaVA with compression and modality pre-fusion ahead of the language model."""

from __future__ import annotations

import re
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from .compressors import COMPRESSORS, Compressor
from .configuration import LlavaMiniConfig
from .prefusion import Prefusion

NEW_MODULES = re.compile(r"(^|\.)(compressor|prefusion)\.")


class LlavaMiniPreTrainedModel(LlavaPreTrainedModel):
    config: LlavaMiniConfig
    config_class = LlavaMiniConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Compressor):
            module.reset_parameters()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        super().initialize_weights()
        # Transformers calls this while LlavaModel is being built too, ahead of pre-fusion.
        model: Any = self.base_model
        if self.config.prefusion_init == "language_model" and getattr(model, "prefusion", None) is not None:
            model.prefusion.copy_layers(model.language_model.layers)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, **kwargs):
        """As in transformers; takes LLaVA-Mini checkpoints and ordinary LLaVA ones, whose compressor and pre-fusion
        layers are then initialised.

        Raises:
            ValueError: If the checkpoint lacks weights of the vision tower, the projector or the language model.
        """
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


class LlavaMiniModel(LlavaMiniPreTrainedModel, LlavaModel):
    """LLaVA-Mini without the language modelling head.

    The order is the official code's (ictnlp/LLaVA-Mini, commit 47da113): the compressor works on raw vision features,
    the projector maps patches and compressed tokens alike, the pre-fusion layers see [patches | compressed tokens |
    text], and the language model gets the pre-fusion output of the compressed tokens and of the text. With
    `compressor="none"` the pre-fusion layers see [patches | text] and the language model gets the output of every
    patch. With `prefusion_layers=0` as well, this is LLaVA.

    Two departures from that code. It masks token id 0 in pre-fusion, in some vocabularies an ordinary token; here only
    padding (by `attention_mask`), the image's placeholders and the answer are masked. And it detaches the text
    embeddings; here they get gradients, as the paper trains everything but the vision tower.
    """

    def __init__(self, config: LlavaMiniConfig):
        config.check()
        super().__init__(config)
        self.compressor = None if config.compressor == "none" else COMPRESSORS[config.compressor](config)
        self.prefusion = Prefusion(self.language_model, config.prefusion_layers) if config.prefusion_layers else None
        self.post_init()

    def get_vision_features(
        self, pixel_values: Float[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images patches vision_width"]:
        """Raw features of the selected layers of the vision tower, ahead of the projector."""
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        selected = self.config.vision_feature_layer
        layers = [selected] if isinstance(selected, int) else selected
        features = torch.cat([hidden_states[layer] for layer in layers], dim=-1)
        return features[:, 1:] if self.config.vision_feature_select_strategy == "default" else features

    def fuse(
        self,
        input_ids: Int[Tensor, "batch length"],
        pixel_values: Float[Tensor, "images channels height width"],
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        answer_mask: Bool[Tensor, "batch ending"] | None = None,
    ) -> tuple[Float[Tensor, "batch length width"], Float[Tensor, "images tokens width"]]:
        """The language model's input embeddings, and the visual tokens among them.

        Rows without placeholders are text alone and keep their raw embeddings; image i belongs to the i-th other row.

        Raises:
            ValueError: If a row has placeholders for anything but one image, or the images do not match the rows.
        """
        features = self.get_vision_features(pixel_values)  # (images, patches, vision_width)
        compressed = features if self.compressor is None else self.compressor(features)[0]
        num_images, num_tokens = compressed.shape[:2]
        is_visual = input_ids == self.config.image_token_id  # (batch, length)
        has_image = self._rows_with_image(is_visual, num_images, num_tokens)  # (batch,)

        visual = compressed  # (images, tokens, vision_width)
        if self.prefusion is not None and self.compressor is not None:
            visual = torch.cat([features, compressed], dim=1)  # (images, patches + tokens, vision_width)
        embeds = self.get_input_embeddings()(input_ids)  # (batch, length, width)
        visual = self.multi_modal_projector(visual).to(embeds.device, embeds.dtype)

        if self.prefusion is not None:
            length = input_ids.shape[1]
            fusable = torch.ones_like(is_visual) if attention_mask is None else attention_mask[:, -length:] > 0
            if answer_mask is not None:  # padded or cropped at its start
                fusable = fusable & ~nn.functional.pad(answer_mask, (length - answer_mask.shape[1], 0))
            is_text = has_image[:, None] & ~is_visual  # (batch, length): the same number in every row with an image
            rows = (num_images, length - num_tokens)
            visual, text = self.prefusion(
                visual,
                embeds[is_text].unflatten(0, rows),  # (images, length - tokens, width)
                fusable[is_text].unflatten(0, rows),  # (images, length - tokens)
                self.language_model.rotary_emb,
            )
            embeds = embeds.masked_scatter(is_text[..., None], text)
        tokens = visual[:, -num_tokens:]  # (images, tokens, width)
        return embeds.masked_scatter(is_visual[..., None], tokens), tokens

    @staticmethod
    def _rows_with_image(
        is_visual: Bool[Tensor, "batch length"], num_images: int, num_tokens: int
    ) -> Bool[Tensor, " batch"]:
        counts = is_visual.sum(dim=1)
        has_image = counts > 0
        if not ((counts == num_tokens) | ~has_image).all():
            raise ValueError(
                f"a row holds one image, which takes {num_tokens} placeholders, or none; "
                f"got rows with {counts.tolist()} placeholders"
            )
        if has_image.sum() != num_images:
            raise ValueError(f"got {num_images} images for {int(has_image.sum())} rows with placeholders")
        return has_image

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        pixel_values: Float[Tensor, "images channels height width"] | None = None,
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        inputs_embeds: Float[Tensor, "batch length width"] | None = None,
        answer_mask: Bool[Tensor, "batch ending"] | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """As `LlavaModel.forward`, with text and image fused first where there are `pixel_values`.

        Args:
            answer_mask: True at the tokens that pre-fusion leaves alone. May be shorter than the row: it ends with it.

        Raises:
            ValueError: If `pixel_values` come without `input_ids`, or with an `attention_mask` that is not 2-D.
            TypeError: If an argument is given that only LLaVA itself supports.
        """
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes", "mm_encoder_outputs"):
            if kwargs.get(name) is not None:
                raise TypeError(f"LLaVA-Mini takes no {name} in a call")
        visual = None
        if pixel_values is not None:
            if input_ids is None or inputs_embeds is not None:
                raise ValueError("pixel_values need input_ids, not inputs_embeds, to find the image's placeholders")
            if attention_mask is not None and attention_mask.ndim != 2:
                raise ValueError(
                    f"pre-fusion needs a 2-D attention_mask (batch, length), got {attention_mask.ndim}-D; "
                    "a static cache makes 4-D ones: generate with the dynamic cache"
                )
            inputs_embeds, visual = self.fuse(input_ids, pixel_values, attention_mask, answer_mask)
            input_ids = None
        outputs = super().forward(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, return_dict=True, **kwargs
        )
        outputs.image_hidden_states = visual
        return outputs


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
    def from_llava(
        cls,
        llava: LlavaForConditionalGeneration,
        *,
        compressor: str = "query",
        compressor_size: int = 1,
        compressor_heads: int = 8,
        prefusion_layers: int = 4,
        prefusion_init: str = "fresh",
    ) -> LlavaMiniForConditionalGeneration:
        """A LLaVA-Mini on copies of a LLaVA's vision tower, projector and language model, in its dtype, on its device
        and in evaluation mode. Only the new modules draw random numbers: `torch.manual_seed` fixes them."""
        fields = llava.config.to_dict() | {
            "compressor": compressor,
            "compressor_size": compressor_size,
            "compressor_heads": compressor_heads,
            "prefusion_layers": prefusion_layers,
            "prefusion_init": prefusion_init,
        }
        model = cls.from_pretrained(
            None,
            config=LlavaMiniConfig(**fields),
            state_dict={name: tensor.clone() for name, tensor in llava.state_dict().items()},
            dtype=llava.dtype,
            attn_implementation={
                "vision_config": llava.model.vision_tower.config._attn_implementation,
                "text_config": llava.model.language_model.config._attn_implementation,
            },
        )
        return model.to(llava.device)

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"] | None = None,
        pixel_values: Float[Tensor, "images channels height width"] | None = None,
        attention_mask: Int[Tensor, "batch seen"] | None = None,
        position_ids: Int[Tensor, "batch length"] | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch length width"] | None = None,
        labels: Int[Tensor, "batch length"] | None = None,
        answer_mask: Bool[Tensor, "batch ending"] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        """As `LlavaForConditionalGeneration.forward`; `image_hidden_states` are the visual tokens that the language
        model got, (images, tokens, width).

        Without `labels` all text is fused. With them the supervised tokens, those whose label is not -100, are not.

        Args:
            answer_mask: True at the tokens that pre-fusion leaves alone; taken from `labels` by default.
        """
        if answer_mask is None and labels is not None:
            answer_mask = labels != -100
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            answer_mask=answer_mask,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

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
