"""Modality pre-fusion: decoder layers ahead of the language model in which the text takes in the picture."""

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
from transformers.models.gemma.modeling_gemma import GemmaAttention
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
# What layers take keys and values as: renamed in transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
# Attention whose keys and values `keys_and_values` makes as it does itself.
KNOWN = (
    *(LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention),
    *(GemmaAttention, Gemma2Attention, Gemma3Attention),
)

# What attention and MLP of a layer give goes through these last.
ENDS = ("self_attn.o_proj", "mlp.down_proj")

# Keys and values in each layer, (batch, key heads, positions, head width) each.
Past = list[tuple[Tensor, Tensor]]


class LayerCache(DynamicCache):
    """A cache of one layer, by whatever number it goes: pre-fusion may be deeper than the language model, whose layers'
    numbers its layers have. Tensors given are not changed."""

    def __init__(self, *keys_and_values: Tensor):
        super().__init__()
        if keys_and_values:
            self.update(*(states[:, :, :0] for states in keys_and_values))
            self.layers[0].keys, self.layers[0].values = keys_and_values

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int = 0, *args: Any, **kwargs: Any) -> Any:
        return super().update(key_states, value_states, 0)


def keys_and_values(
    layer: nn.Module, hidden_states: Float[Tensor, "batch length width"], positions: tuple[Tensor, ...]
) -> tuple[Float[Tensor, "batch heads length head_width"], Float[Tensor, "batch heads length head_width"]]:
    """What the layer's attention, of a class in KNOWN, keeps of these positions in a cache."""
    attention: Any = layer.self_attn
    hidden_states = cast(nn.Module, layer.input_layernorm)(hidden_states)
    keys, values = (
        projection(hidden_states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    return rotate(keys[:, :1], keys, *positions)[1], values


class Prefusion(nn.Module):
    """Additional decoder layers of the language model's own class and configuration, without a final norm.

    The layers run over [visual tokens | text], causally. Since the visual tokens come first, they never see the text:
    only the text is fused, and what the layers keep of the visual tokens holds for any text.

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

    def silence(self) -> None:
        """Attention and MLP of every layer start by giving zero, so that it passes on what it gets; parameters already
        loaded stay.

        Raises:
            TypeError: If a layer ends them by other names than Llama's.
        """
        for layer in self.layers:
            for name in ENDS:
                try:
                    end = layer.get_submodule(name)
                except AttributeError:
                    raise TypeError(f"prefusion_init='identity': {type(layer).__name__} has no {name}") from None
                for parameter in end.parameters():
                    init.zeros_(parameter)

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
        *,
        unread: int = 0,
        past: Past | None = None,
    ) -> tuple[Float[Tensor, "batch read width"], Float[Tensor, "batch text width"]]:
        """Visual tokens and text as they leave the layers. Text that ends early is padded at its end, where no text
        before sees it.

        Args:
            unread: That many of the first visual tokens are not returned. The last layer makes nothing of them but
                keys and values, unless it or a module in it has a forward hook, is checkpointed, or has attention of
                a class that is not in KNOWN: then it runs whole, with the same result.
            past: Keys and values of visual tokens that went through before these: an empty list, or what an earlier
                call made of it. Those of `visual` are appended, new tensors in place of the old; those of text never.

        Raises:
            ValueError: If there is a `past` while layers are checkpointed, which then see no past.
        """
        if past is not None and self._checkpointed():
            raise ValueError(
                "pictures that are encoded ahead need gradient_checkpointing_disable(): checkpointed layers see no "
                "keys but their own; or give pixel_values"
            )
        hidden_states = torch.cat([visual, text], dim=1)  # (batch, visual + text, width)
        end = (past[0][0].shape[2] if past else 0) + visual.shape[1]
        position_ids = torch.arange(end - visual.shape[1], end + text.shape[1], device=hidden_states.device)[None]
        caches: list[LayerCache | None] = [None] * len(self.layers)
        if past is not None:
            caches = [LayerCache(*states) for states in past] or [LayerCache() for _ in self.layers]
        skipped = unread if self._skips() else 0
        masks = self._masks(hidden_states, caches[0])
        rotations = self._rotations(rotary_emb, hidden_states, position_ids)
        for number, (layer, kind, cache) in enumerate(zip(self.layers, self.kinds, caches, strict=True)):
            positions = rotations[kind]
            if skipped and number == len(self.layers) - 1:
                cache = LayerCache() if cache is None else cache
                cache.update(
                    *keys_and_values(layer, hidden_states[:, :skipped], tuple(p[:, :skipped] for p in positions))
                )
                hidden_states, position_ids = hidden_states[:, skipped:], position_ids[:, skipped:]
                positions = tuple(p[:, skipped:] for p in positions)
                masks = self._masks(hidden_states, cache)
            if hidden_states.shape[1]:
                hidden_states = layer(
                    hidden_states,
                    attention_mask=masks[kind],
                    position_ids=position_ids,
                    position_embeddings=positions,
                    **{CACHE: cache},
                )
        if past is not None:
            past[:] = [(c.layers[0].keys[:, :, :end], c.layers[0].values[:, :, :end]) for c in caches if c is not None]
        visual, text = hidden_states[:, unread - skipped :].split([visual.shape[1] - unread, text.shape[1]], dim=1)
        return visual, text

    def _masks(self, hidden_states: Tensor, cache: LayerCache | None) -> dict[str, Any]:
        return {kind: MASKS[kind](self.config, hidden_states, None, cache) for kind in set(self.kinds)}

    def _rotations(
        self, rotary_emb: nn.Module, hidden_states: Tensor, position_ids: Tensor
    ) -> dict[str, tuple[Tensor, ...]]:
        by_kind = {kind: {"layer_type": kind} if self.rotary_by_kind else {} for kind in set(self.kinds)}
        return {kind: rotary_emb(hidden_states, position_ids=position_ids, **more) for kind, more in by_kind.items()}

    def _checkpointed(self) -> bool:
        return self.training and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)

    def _skips(self) -> bool:
        """Whether the last layer leaves out what nobody reads: not where somebody looks on."""
        last = self.layers[-1]
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in last.modules())
        return type(last.self_attn) in KNOWN and not hooked and not self._checkpointed()
