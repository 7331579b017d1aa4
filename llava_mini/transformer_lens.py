"""Adapter of LLaVA-Mini for TransformerLens 4. Importing this module registers it.

    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(model, "LlavaMiniForConditionalGeneration", hf_config=model.config)
    bridge.run_with_cache(input_ids, pixel_values=pixel_values, visual_layout=visual_layout)

The bridge rebuilds `model` in place: its state dict then has other keys, and its attention is eager.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

try:
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
except ModuleNotFoundError as error:
    if error.name != "transformer_lens":
        raise
    raise ImportError(
        "llava_mini.transformer_lens needs transformer-lens: pip install transformer-lens", name=error.name
    ) from None
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.llava import LlavaArchitectureAdapter

from .compressors.attention import BareAttention
from .modeling import LlavaMiniForConditionalGeneration


class CompressorAttentionBridge(GeneralizedComponent):
    """Hook the attention of the compressor "query".

    Hooks and the shapes of their tensors:

    - `hook_q`: (batch, tokens, heads, width)
    - `hook_k`, `hook_v`: (batch, patches, heads, width)
    - `hook_attn_scores`, `hook_pattern`: (batch, heads, tokens, patches)
    - `hook_z`: (batch, tokens, heads, width)

    Args:
        name: Name of the attention module in the compressor.
    """

    def __init__(self, name: str):
        super().__init__(name, optional=True)
        self.hook_q, self.hook_k, self.hook_v, self.hook_z = (HookPoint() for _ in range(4))
        self.hook_attn_scores, self.hook_pattern = HookPoint(), HookPoint()

    def forward(
        self,
        query: Float[Tensor, "batch tokens width"],
        key: Float[Tensor, "batch patches width"],
        value: Float[Tensor, "batch patches width"],
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens patches"]]:
        """Compute the attention, with every step visible to a hook; see [`BareAttention.forward`]."""
        attention = self.original_component
        assert isinstance(attention, BareAttention)
        heads = zip(
            (self.hook_q, self.hook_k, self.hook_v), attention.split(self.hook_in(query), key, value), strict=True
        )
        q, k, v = (hook(x.transpose(1, 2)).transpose(1, 2) for hook, x in heads)
        scores = self.hook_attn_scores(q @ k.transpose(2, 3) * attention.scale)
        weights = self.hook_pattern(scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype))
        head_outputs = self.hook_z((weights @ v).transpose(1, 2)).transpose(1, 2)
        return self.hook_out(attention.merge(head_outputs)), weights.mean(dim=1)


class LlavaMiniArchitectureAdapter(LlavaArchitectureAdapter):
    """Extend LLaVA's adapter by two components, `compressor` and `prefusion`, under the same naming rules.

    `compressor.hook_in` is the compressor's input, (frames, patches, width), and `compressor.hook_out` its visual tokens,
    (frames, tokens, width). `compressor.attn` exists if the compressor attends. `prefusion.{j}` has the hooks of
    `blocks.{i}`, with frames instead of rows: each frame's patches, its visual tokens, and its row's text. A model
    without compressor or pre-fusion lacks these hooks, and TransformerLens rejects their names.

    All frames pass at once (`frames_per_chunk`), so each hook fires once a call and a cache holds all of them. Only
    frames with different numbers of tiles, and streams, pass in several parts; a cache then holds the last part.
    `rotary_emb` serves both stacks. Its hooks fire for each, and a cache holds the language model's.

    Raises:
        ValueError: If the LLaVA adapter does not support the vision tower or the language model.
    """

    def __init__(self, cfg: Any):
        vision_tower = cfg.vision_config.model_type
        if vision_tower not in ("clip_vision_model", "siglip_vision_model"):
            raise ValueError(f"TransformerLens supports CLIP and SigLIP vision towers of LLaVA, not {vision_tower}")
        super().__init__(cfg)
        assert self.component_mapping is not None
        # Blocks are copies of this template, with its hooks.
        self.component_mapping["blocks"].submodules["attn"].register_forward_pre_hook(_rename_cache, with_kwargs=True)
        prefusion = copy.deepcopy(self.component_mapping["blocks"])
        prefusion.name = "model.prefusion.layers"
        attention = CompressorAttentionBridge("attn")
        compressor = GeneralizedComponent("model.compressor", submodules={"attn": attention})
        self.component_mapping |= {"compressor": compressor, "prefusion": prefusion}

    def prepare_model(self, hf_model: LlavaMiniForConditionalGeneration) -> None:
        """Prepare a model for its bridge: one chunk for all frames, and only the components that it has.

        Raises:
            ValueError: If the language model's layers have four norms.
        """
        if hasattr(hf_model.get_decoder().layers[0], "pre_feedforward_layernorm"):
            name = hf_model.config.get_text_config().model_type
            raise ValueError(
                f"{name} has four norms a layer; TransformerLens supports LLaVA with two, and would misname the others"
            )
        super().prepare_model(hf_model)
        hf_model.config.frames_per_chunk = 2**31
        assert self.component_mapping is not None
        for name in ("compressor", "prefusion"):
            if getattr(hf_model.model, name) is None:
                del self.component_mapping[name]


def _rename_cache(attention: GeneralizedComponent, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the cache the name that transformer-lens 4.3 reads; transformers passes it as `cache` from 5.24 on."""
    if "cache" in kwargs:
        kwargs["past_key_values"] = kwargs.pop("cache")
    return args, kwargs


ArchitectureAdapterFactory.register_adapter(LlavaMiniForConditionalGeneration.__name__, LlavaMiniArchitectureAdapter)

__all__ = ["CompressorAttentionBridge", "LlavaMiniArchitectureAdapter"]
