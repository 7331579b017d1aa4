"""LLaVA-Mini in TransformerLens. Importing this module registers the adapter; it needs transformer-lens 4.

    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(model, "LlavaMiniForConditionalGeneration", hf_config=model.config)
    bridge.run_with_cache(input_ids, pixel_values=pixel_values, visual_layout=visual_layout)

The bridge rebuilds `model` in place: its state dict has other keys from then on, and its attention is eager.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.llava import LlavaArchitectureAdapter

from .compressors.query import BareAttention
from .modeling import LlavaMiniForConditionalGeneration


class CompressorAttentionBridge(GeneralizedComponent):
    """The attention of the compressor "query": `hook_q` (batch, tokens, heads, width), `hook_k` and `hook_v` (batch,
    patches, heads, width), `hook_attn_scores` and `hook_pattern` (batch, heads, tokens, patches), `hook_z` (batch,
    tokens, heads, width)."""

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
        attention = self.original_component
        assert isinstance(attention, BareAttention)
        heads = zip(
            (self.hook_q, self.hook_k, self.hook_v), attention.split(self.hook_in(query), key, value), strict=True
        )
        q, k, v = (hook(x.transpose(1, 2)).transpose(1, 2) for hook, x in heads)
        scores = self.hook_attn_scores(q @ k.transpose(2, 3) * attention.scale)
        weights = self.hook_pattern(scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype))
        mixed = self.hook_z((weights @ v).transpose(1, 2)).transpose(1, 2)
        return self.hook_out(attention.merge(mixed)), weights.mean(dim=1)


class LlavaMiniArchitectureAdapter(LlavaArchitectureAdapter):
    """LLaVA's adapter with two components more, by the same rules of naming.

    `compressor.hook_in` is what the compressor gets, (frames, patches, width), and `compressor.hook_out` the visual
    tokens it makes of it, (frames, tokens, width); `compressor.attn` is there where it attends. `prefusion.{j}` has
    what `blocks.{i}` has, for frames in place of rows: each frame's patches, its visual tokens, and its row's text.
    A model without compressor or without pre-fusion has no such hooks, and TransformerLens refuses their names.

    All frames go through at once (`frames_per_chunk`), so each hook fires once a call and a cache holds them all. Only
    frames cut into unlike tiles, and streams, still come in several parts; of those a cache keeps the last. `rotary_emb`
    serves both stacks: its hooks fire for each, and a cache keeps the language model's.

    Raises:
        ValueError: The vision tower or the language model is of a kind that the LLaVA adapter misreads.
    """

    def __init__(self, cfg: Any):
        tower = cfg.vision_config.model_type
        if tower not in ("clip_vision_model", "siglip_vision_model"):
            raise ValueError(f"TransformerLens knows LLaVA with a CLIP or SigLIP tower, not with {tower}")
        super().__init__(cfg)
        assert self.component_mapping is not None
        prefusion = copy.deepcopy(self.component_mapping["blocks"])
        prefusion.name = "model.prefusion.layers"
        attention = CompressorAttentionBridge("attn")
        compressor = GeneralizedComponent("model.compressor", submodules={"attn": attention})
        self.component_mapping |= {"compressor": compressor, "prefusion": prefusion}

    def prepare_model(self, hf_model: LlavaMiniForConditionalGeneration) -> None:
        if hasattr(hf_model.get_decoder().layers[0], "pre_feedforward_layernorm"):
            name = hf_model.config.get_text_config().model_type
            raise ValueError(
                f"TransformerLens knows LLaVA with two norms a layer; {name} has four, and hooks would get their names wrong"
            )
        super().prepare_model(hf_model)
        hf_model.config.frames_per_chunk = 2**31
        assert self.component_mapping is not None
        for name in ("compressor", "prefusion"):
            if getattr(hf_model.model, name) is None:
                del self.component_mapping[name]


ArchitectureAdapterFactory.register_adapter(LlavaMiniForConditionalGeneration.__name__, LlavaMiniArchitectureAdapter)

__all__ = ["CompressorAttentionBridge", "LlavaMiniArchitectureAdapter"]
