"""Modality pre-fusion: decoder layers ahead of the language model in which the text takes in the picture."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask


class Prefusion(nn.Module):
    """Additional decoder layers of the language model's own class and configuration, without a final norm.

    The layers run once, over [visual tokens | text], causally, and keep no cache. Since the visual tokens come first,
    they never see the text: only the text is fused. As in the official code; in the paper's equation 3 the compressed
    tokens do not pass through these layers.

    Args:
        language_model: The decoder whose layer class and configuration are used. The configuration object is shared,
            so the attention implementation follows the language model's.
        num_layers: Number of layers.

    Raises:
        TypeError: If the decoder has no `layers` that take `position_embeddings` from its `rotary_emb`.
    """

    def __init__(self, language_model: PreTrainedModel, num_layers: int):
        super().__init__()
        if not (hasattr(language_model, "layers") and hasattr(language_model, "rotary_emb")):
            raise TypeError(
                f"pre-fusion needs a decoder with `layers` and `rotary_emb`, as Llama and Qwen2 have; "
                f"{type(language_model).__name__} has not: set prefusion_layers=0"
            )
        self.config = language_model.config
        source = cast(nn.ModuleList, language_model.layers)
        # Some layer classes look their index up in a list as long as the language model, which may have fewer layers.
        self.layers = nn.ModuleList(
            type(source[j % len(source)])(self.config, layer_idx=j % len(source)) for j in range(num_layers)
        )

    def copy_layers(self, source: nn.ModuleList) -> None:
        """Starts every layer from the layer of `source` at the same index; parameters already loaded stay."""
        for layer, original in zip(self.layers, source, strict=False):
            for name, parameter in layer.named_parameters():
                init.copy_(parameter, original.get_parameter(name))

    def forward(
        self,
        visual: Float[Tensor, "batch visual width"],
        text: Float[Tensor, "batch text width"],
        fusable: Bool[Tensor, "batch text"],
        rotary_emb: nn.Module,
    ) -> tuple[Float[Tensor, "batch visual width"], Float[Tensor, "batch text width"]]:
        """Returns the visual tokens after the layers, and the text with its fusable positions fused.

        Other text positions (padding, answers) are seen by none, take no place in the count of positions, and return
        as they came.
        """
        hidden_states = torch.cat([visual, text], dim=1)  # (batch, visual + text, width)
        mask = nn.functional.pad(fusable, (visual.shape[1], 0), value=True)  # (batch, visual + text)
        position_ids = (mask.cumsum(dim=1) - 1).masked_fill(~mask, 1)
        causal_mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=mask, past_key_values=None
        )
        position_embeddings = rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
            )
        visual, fused = hidden_states.split([visual.shape[1], text.shape[1]], dim=1)
        return visual, torch.where(fusable[..., None], fused, text)
