"""Modality pre-fusion: decoder layers ahead of the language model, in which the text attends to the image."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

MASK_FUNCTIONS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}
# Name of the decoder layers' cache argument, which transformers 5.24 renamed.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
# Attention classes whose keys and values `keys_and_values` reproduces exactly. Names, as importing the classes takes time.
SUPPORTED_ATTENTION = tuple(
    f"transformers.models.{module}.modeling_{module}.{name}Attention"
    for module, name in {
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "gemma": "Gemma",
        "gemma2": "Gemma2",
        "gemma3": "Gemma3",
    }.items()
)
# The last linear maps of a decoder layer's attention and MLP.
OUTPUT_PROJECTIONS = ("self_attn.o_proj", "mlp.down_proj")

# Keys and values of each layer, both of shape (batch, key heads, positions, head width).
PastKeyValues = list[tuple[Tensor, Tensor]]


class LayerCache(DynamicCache):
    """Cache the keys and values of one layer, whatever its layer index.

    Pre-fusion may have more layers than the language model, and its layers use the language model's layer indices.
    The given tensors are not modified.
    """

    def __init__(self, *keys_and_values: Tensor):
        super().__init__()
        if keys_and_values:
            self.update(*(states[:, :, :0] for states in keys_and_values))
            self.layers[0].keys, self.layers[0].values = keys_and_values

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int = 0, *args: Any, **kwargs: Any) -> Any:
        """Append keys and values and return all of them, as in transformers; `layer_idx` is ignored."""
        return super().update(key_states, value_states, 0)


def keys_and_values(
    layer: nn.Module, hidden_states: Float[Tensor, "batch length width"], rotation: tuple[Tensor, ...]
) -> tuple[Float[Tensor, "batch heads length head_width"], Float[Tensor, "batch heads length head_width"]]:
    """Compute the keys and values that a decoder layer's attention would cache.

    Args:
        layer: Decoder layer whose attention is in SUPPORTED_ATTENTION.
        hidden_states: Input of the layer.
        rotation: Cosines and sines of the rotary position embedding.
    """
    attention: Any = layer.self_attn
    hidden_states = cast(nn.Module, layer.input_layernorm)(hidden_states)
    keys, values = (
        projection(hidden_states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    return rotate(keys[:, :1], keys, *(part.to(keys.device) for part in rotation))[1], values


def has_supported_attention(layer: nn.Module) -> bool:
    """Return whether [`keys_and_values`] reproduces the keys and values of a decoder layer, not of a subclass."""
    attention = type(layer.self_attn)
    return f"{attention.__module__}.{attention.__qualname__}" in SUPPORTED_ATTENTION


class Prefusion(nn.Module):
    """Stack of decoder layers of the language model's own class and configuration, without a final norm.

    The layers process [visual tokens | text] causally. The visual tokens come first and never attend to the text. So
    only the text is fused, and the keys and values of the visual tokens are valid for any text.

    Args:
        language_model (`PreTrainedModel`):
            Decoder whose layer class and configuration are used. The configuration object is shared, so the attention
            implementation follows the language model's.
        num_layers (`int`):
            Number of layers.

    Raises:
        TypeError: If the decoder has no `layers` that take `position_embeddings` from its `rotary_emb`, or its
            attention is neither causal full nor causal sliding-window attention.
    """

    def __init__(self, language_model: PreTrainedModel, num_layers: int):
        super().__init__()
        name = type(language_model).__name__
        if not (hasattr(language_model, "layers") and hasattr(language_model, "rotary_emb")):
            raise TypeError(
                f"pre-fusion needs a decoder with `layers` and `rotary_emb`, as Llama and Qwen2 have; {name} lacks one: "
                "set prefusion_layers=0"
            )
        self.config = language_model.config
        decoder_layers = cast(nn.ModuleList, language_model.layers)
        # Some layer classes look up their index in a list as long as the language model, which may have fewer layers.
        indices = [j % len(decoder_layers) for j in range(num_layers)]
        self.layers = nn.ModuleList(type(decoder_layers[j])(self.config, layer_idx=j) for j in indices)
        decoder_layer_types = getattr(self.config, "layer_types", None) or ["full_attention"] * len(decoder_layers)
        self.layer_types = [decoder_layer_types[j] for j in indices]
        if unknown := set(self.layer_types) - MASK_FUNCTIONS.keys():
            raise TypeError(
                f"{name} has layers of type {', '.join(sorted(unknown))}; pre-fusion supports "
                f"{' and '.join(MASK_FUNCTIONS)}"
            )
        # Gemma 3 has one rotary embedding for each layer type.
        self.rotary_per_layer_type = (
            "layer_type" in inspect.signature(cast(nn.Module, language_model.rotary_emb).forward).parameters
        )

    def copy_layers(self, source: nn.ModuleList) -> None:
        """Initialise every layer with the layer of `source` at the same index. Loaded parameters stay unchanged."""
        for layer, original in zip(self.layers, source, strict=False):
            for name, parameter in layer.named_parameters():
                init.copy_(parameter, original.get_parameter(name))

    def zero_outputs(self) -> None:
        """Initialise attention and MLP of every layer to output zero, so that each layer is the identity.

        Loaded parameters stay unchanged.

        Raises:
            TypeError: If a layer's output projections have other names than Llama's.
        """
        for layer in self.layers:
            for name in OUTPUT_PROJECTIONS:
                try:
                    projection = layer.get_submodule(name)
                except AttributeError:
                    raise TypeError(f"prefusion_init='identity': {type(layer).__name__} has no {name}") from None
                for parameter in projection.parameters():
                    init.zeros_(parameter)

    def load_file(self, path: str | Path) -> None:
        """Initialise every layer from a .safetensors file with names such as `0.self_attn.q_proj.weight`.

        Loaded parameters stay unchanged.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If it is not a safetensors file, lacks a parameter, or holds one in another shape.
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
            raise ValueError(f"prefusion_init: {path} is not a complete safetensors file: {error}") from error

    def forward(
        self,
        visual: Float[Tensor, "batch visual width"],
        text: Float[Tensor, "batch text width"],
        rotary_emb: nn.Module,
        *,
        unread: int = 0,
        past: PastKeyValues | None = None,
    ) -> tuple[Float[Tensor, "batch read width"], Float[Tensor, "batch text width"]]:
        """Fuse text with visual tokens.

        Args:
            visual (`torch.FloatTensor` of shape `(batch, visual, width)`):
                Embeddings of patches and compressed tokens.
            text (`torch.FloatTensor` of shape `(batch, text, width)`):
                Text embeddings. Shorter texts are padded at their end, where no earlier text attends to the padding.
            rotary_emb (`nn.Module`):
                Rotary position embedding of the language model.
            unread (`int`, *optional*, defaults to 0):
                Number of leading visual tokens whose output is not returned. The last layer then computes only their
                keys and values. It processes them in full, with the same result, if one of these holds: a forward hook
                on the layer or a module in it, checkpointing, or attention that is not in SUPPORTED_ATTENTION.
            past (`PastKeyValues`, *optional*):
                Keys and values of earlier visual tokens: an empty list, or one that an earlier call filled. This call
                appends those of `visual`, as new tensors in place of the old. It never appends those of `text`.

        Returns:
            - `torch.FloatTensor` of shape `(batch, visual - unread, width)`: output of the visual tokens.
            - `torch.FloatTensor` of shape `(batch, text, width)`: output of the text.

        Raises:
            ValueError: If `past` is given while layers are checkpointed, because they then ignore it.
        """
        if past is not None and self._is_checkpointed():
            raise ValueError(
                "encoded pictures need gradient_checkpointing_disable(), because checkpointed layers ignore cached keys; "
                "or give pixel_values"
            )
        hidden_states = torch.cat([visual, text], dim=1)  # (batch, visual + text, width)
        end = (past[0][0].shape[2] if past else 0) + visual.shape[1]  # of all visual tokens
        position_ids = torch.arange(end - visual.shape[1], end + text.shape[1], device=hidden_states.device)[None]
        caches: list[LayerCache | None] = [None] * len(self.layers)
        if past is not None:
            caches = [LayerCache(*states) for states in past] or [LayerCache() for _ in self.layers]
        skipped = unread if self._skips_unread() else 0
        masks = self._masks(hidden_states, caches[0])
        rotations = self._rotations(rotary_emb, hidden_states, position_ids)
        for index, (layer, layer_type, cache) in enumerate(zip(self.layers, self.layer_types, caches, strict=True)):
            rotation = rotations[layer_type]
            if skipped and index == len(self.layers) - 1:
                cache = LayerCache() if cache is None else cache
                cache.update(
                    *keys_and_values(layer, hidden_states[:, :skipped], tuple(part[:, :skipped] for part in rotation))
                )
                hidden_states, position_ids = hidden_states[:, skipped:], position_ids[:, skipped:]
                rotation = tuple(part[:, skipped:] for part in rotation)
                masks = self._masks(hidden_states, cache)
            if hidden_states.shape[1]:
                hidden_states = layer(
                    hidden_states,
                    attention_mask=masks[layer_type],
                    position_ids=position_ids,
                    position_embeddings=rotation,
                    **{CACHE_ARGUMENT: cache},
                )
        if past is not None:
            past[:] = [(c.layers[0].keys[:, :, :end], c.layers[0].values[:, :, :end]) for c in caches if c is not None]
        # A device map may put layers on several devices.
        hidden_states = hidden_states[:, unread - skipped :].to(text.device)
        visual, text = hidden_states.split([visual.shape[1] - unread, text.shape[1]], dim=1)
        return visual, text

    def _masks(self, hidden_states: Tensor, cache: LayerCache | None) -> dict[str, Any]:
        """Build the attention mask of each layer type."""
        return {
            layer_type: MASK_FUNCTIONS[layer_type](self.config, hidden_states, None, cache)
            for layer_type in set(self.layer_types)
        }

    def _rotations(
        self, rotary_emb: nn.Module, hidden_states: Tensor, position_ids: Tensor
    ) -> dict[str, tuple[Tensor, ...]]:
        """Compute the cosines and sines of each layer type."""
        arguments = {
            layer_type: {"layer_type": layer_type} if self.rotary_per_layer_type else {}
            for layer_type in set(self.layer_types)
        }
        return {
            layer_type: rotary_emb(hidden_states, position_ids=position_ids, **extra)
            for layer_type, extra in arguments.items()
        }

    def _is_checkpointed(self) -> bool:
        return self.training and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)

    def _skips_unread(self) -> bool:
        """Check whether the last layer may skip unread outputs. A hook on it must still receive all positions."""
        last = self.layers[-1]
        has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in last.modules())
        return has_supported_attention(last) and not has_hooks and not self._is_checkpointed()


__all__ = ["PastKeyValues", "Prefusion", "has_supported_attention"]
