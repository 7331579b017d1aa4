"""Modality pre-fusion: decoder layers ahead of the language model in which the text takes in the picture."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class Prefusion(nn.Module):
    """Additional decoder layers of the language model's own class and configuration, without a final norm.

    The layers run once, over [visual tokens | text], causally, and keep no cache. Since the visual tokens come first,
    they never see the text: only the text is fused.

    Args:
        language_model: The decoder whose layer class and configuration are used. The configuration object is shared,
            so the attention implementation follows the language model's.
        num_layers: Number of layers.

    Raises:
        TypeError: If the decoder has no `layers` that take `position_embeddings` from its `rotary_emb`, or has layers
            with another attention than causal, full or in a sliding window.
    """

    def __init__(self, language_model: PreTrainedModel, num_layers: int):
        super().__init__()
        name = type(language_model).__name__
        if not (hasattr(language_model, "layers") and hasattr(language_model, "rotary_emb")):
            raise TypeError(
                f"pre-fusion needs a decoder with `layers` and `rotary_emb`, as Llama and Qwen2 have; {name} has not: "
                "set prefusion_layers=0"
            )
        self.config = language_model.config
        source = cast(nn.ModuleList, language_model.layers)
        # Some layer classes look their index up in a list as long as the language model, which may have fewer layers.
        indices = [j % len(source) for j in range(num_layers)]
        self.layers = nn.ModuleList(type(source[j])(self.config, layer_idx=j) for j in indices)
        kinds = getattr(self.config, "layer_types", None) or ["full_attention"] * len(source)
        self.kinds = [kinds[j] for j in indices]
        if unknown := set(self.kinds) - MASKS.keys():
            raise TypeError(f"pre-fusion knows no layers of kind {', '.join(sorted(unknown))}, which {name} has")
        # Gemma 3 turns positions differently in each kind of layer
        self.rotary_by_kind = (
            "layer_type" in inspect.signature(cast(nn.Module, language_model.rotary_emb).forward).parameters
        )

    def copy_layers(self, source: nn.ModuleList) -> None:
        """Starts every layer from the layer of `source` at the same index; parameters already loaded stay."""
        for layer, original in zip(self.layers, source, strict=False):
            for name, parameter in layer.named_parameters():
                init.copy_(parameter, original.get_parameter(name))

    def copy_file(self, path: str | Path) -> None:
        """Starts every layer from a .safetensors file with names such as `0.self_attn.q_proj.weight`; parameters
        already loaded stay.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no safetensors file, or lacks a parameter, or holds it in another shape.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"prefusion_init: no file {path}")
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                for name, parameter in self.layers.named_parameters():
                    if name not in names:
                        raise ValueError(f"prefusion_init: {path} holds no {name}")
                    if (shape := file.get_slice(name).get_shape()) != list(parameter.shape):
                        raise ValueError(f"prefusion_init: {name} in {path} is {shape}, not {list(parameter.shape)}")
                    init.copy_(parameter, file.get_tensor(name))
        except SafetensorError as error:
            raise ValueError(f"prefusion_init: {path} is no whole safetensors file: {error}") from error

    def forward(
        self,
        visual: Float[Tensor, "batch visual width"],
        text: Float[Tensor, "batch text width"],
        rotary_emb: nn.Module,
    ) -> tuple[Float[Tensor, "batch visual width"], Float[Tensor, "batch text width"]]:
        """Visual tokens and text as they leave the layers. Text that ends early is padded at its end, where no text
        before sees it."""
        hidden_states = torch.cat([visual, text], dim=1)  # (batch, visual + text, width)
        position_ids = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        masks, positions = {}, {}
        for kind in set(self.kinds):
            masks[kind] = MASKS[kind](
                config=self.config, inputs_embeds=hidden_states, attention_mask=None, past_key_values=None
            )
            by_kind: dict[str, Any] = {"layer_type": kind} if self.rotary_by_kind else {}
            positions[kind] = rotary_emb(hidden_states, position_ids=position_ids, **by_kind)
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_ids=position_ids,
                position_embeddings=positions[kind],
            )
        visual, text = hidden_states.split([visual.shape[1], text.shape[1]], dim=1)
        return visual, text
