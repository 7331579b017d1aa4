"""FLOPs, parameters and cache bytes of LLaVA and LLaVA-Mini from a configuration, without weights or a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, LlavaConfig

from llava_mini import LlavaMiniConfig
from llava_mini.compressors import Compressor
from llava_mini.prefusion import has_supported_attention
from llava_mini.vision_tower import run_vision_tower
from llava_mini.visual_layout import crops_per_frame

Convention = Literal["paper", "full"]
CONVENTIONS: tuple[Convention, ...] = ("paper", "full")
LINEAR_OPERATIONS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one component. A multiplication and an addition count as two.

    Args:
        linear: FLOPs of linear maps as the released code runs them, patch embedding included.
        other: FLOPs of all other products: those of attention, causal or not, over all pairs.
        skipped_linear: The part of `linear` that this project does not run: layers of the vision tower behind the selected
            one, and all but keys and values of patches in the last pre-fusion layer.
    """

    linear: float = 0.0
    other: float = 0.0
    skipped_linear: float = 0.0

    def flops(self, convention: Convention) -> float:
        """Return the FLOPs under a convention.

        Args:
            convention: "paper" counts linear maps only, as LLaVA-Mini's printed figures do. "full" equals torch's FLOP
                counter.
        """
        return self.linear if convention == "paper" else self.linear + self.other - self.skipped_linear

    def __add__(self, more: FlopCount) -> FlopCount:
        return FlopCount(self.linear + more.linear, self.other + more.other, self.skipped_linear + more.skipped_linear)

    def __mul__(self, times: float) -> FlopCount:
        return FlopCount(self.linear * times, self.other * times, self.skipped_linear * times)


@dataclass(frozen=True)
class Prompt:
    """Sizes of a prompt.

    Args:
        text: Text tokens.
        frames: Frames of a video; 1 for an image.
        tiles: Tiles along each side of a frame. With more than 1 the model also gets the whole frame.
        visual_by_layer: For each layer of the language model, the share of the visual tokens that it still processes.
            Empty if no layer drops any.
    """

    text: float
    frames: int = 1
    tiles: int = 1
    visual_by_layer: Sequence[float] = field(default=())


class CostEstimate:
    """Estimate the cost of one prompt by component.

    The component attributes are [`FlopCount`]s for all frames together.

    Attributes:
        tower, projector, compressor, prefusion: The parts ahead of the language model.
        prefill: The layers of the language model over the prompt.
        head: The output map on every token of the prompt, as a plain forward pass computes it.
        visual_tokens: Visual tokens of all frames that enter the language model.

    Args:
        cost_model: The costs per token of a model.
        prompt: The sizes of the prompt.

    Raises:
        ValueError: If `prompt.visual_by_layer` has another length than the language model has layers.
    """

    def __init__(self, cost_model: CostModel, prompt: Prompt) -> None:
        self.cost_model, self.prompt = cost_model, prompt
        config, frames = cost_model.config, prompt.frames
        crops = crops_per_frame(prompt.tiles)
        compressed_patches = cost_model.patches * prompt.tiles**2  # of the tiles, without the whole frame
        patches = cost_model.patches * crops
        mini = config if isinstance(config, LlavaMiniConfig) else None
        tokens = patches if mini is None else mini.num_visual_tokens(compressed_patches)
        has_compressor, has_prefusion = cost_model.compressor is not None, cost_model.prefusion_layers > 0

        self.visual_tokens = tokens * frames
        self.tower = cost_model.tower * (crops * frames)
        if mini is None or not mini.compress_before_projection:
            projected = patches
        elif cost_model.compressor is not None and "projected" in cost_model.compressor.needs:
            projected = tokens + compressed_patches + (patches if has_prefusion else 0)
        elif has_compressor:
            projected = tokens + (patches if has_prefusion else 0)
        else:
            projected = patches if has_prefusion else compressed_patches
        self.projector = cost_model.projector * (projected * frames)
        self.compressor = (
            cost_model.compressor_flops(compressed_patches, prompt.text) * frames if has_compressor else FlopCount()
        )
        self.prefusion = self._prefusion(mini, patches, tokens) * frames if has_prefusion else FlopCount()
        shares = list(prompt.visual_by_layer) or [1.0] * cost_model.layers
        if len(shares) != cost_model.layers:
            raise ValueError(
                f"visual_by_layer names {len(shares)} layers, but the language model has {cost_model.layers}"
            )
        layers = (cost_model.layer_flops(self.visual_tokens * share + prompt.text) for share in shares)
        self.prefill = sum(layers, FlopCount())
        self.head = cost_model.head * (self.visual_tokens * shares[-1] + prompt.text)
        self._cached_tokens = sum(self.visual_tokens * share + prompt.text for share in shares)

    @property
    def components(self) -> dict[str, FlopCount]:
        """FLOPs of each component, by the names of the attributes."""
        names = ("tower", "projector", "compressor", "prefusion", "prefill", "head")
        return {name: getattr(self, name) for name in names}

    @property
    def decode(self) -> FlopCount:
        """FLOPs of the next token, with the prompt in the cache."""
        cost_model = self.cost_model
        context = self._cached_tokens + cost_model.layers  # in each layer the token also attends to itself
        linear = cost_model.linear_flops_per_token * cost_model.layers
        return FlopCount(linear, cost_model.attention_flops_per_pair * context) + cost_model.head

    def flops(self, convention: Convention) -> float:
        """Return the FLOPs of the prompt under a convention of [`FlopCount.flops`]."""
        return sum(component.flops(convention) for component in self.components.values())

    def cache_bytes(self, bytes_per_number: int = 2) -> float:
        """Return the bytes of the keys and values of the prompt, in all layers of the language model."""
        return self.cost_model.cache_values_per_token * self._cached_tokens * bytes_per_number

    def pixel_bytes(self, bytes_per_number: int = 2) -> float:
        """Return the bytes of the pixels of all frames, if they are held in memory at once."""
        vision = self.cost_model.config.vision_config
        pixels = vision.num_channels * vision.image_size * vision.image_size
        return self.prompt.frames * crops_per_frame(self.prompt.tiles) * pixels * bytes_per_number

    def _prefusion(self, mini: LlavaMiniConfig | None, patches: int, tokens: int) -> FlopCount:
        """Return the FLOPs of the pre-fusion layers over one frame."""
        cost_model = self.cost_model
        has_compressor = cost_model.compressor is not None
        length = patches + self.prompt.text
        if has_compressor and mini is not None and mini.prefuse_visual_tokens:
            length += tokens
        last_layer = cost_model.layer_flops(length)
        patches_unread = mini is not None and (has_compressor or not tokens or not mini.prefuse_visual_tokens)
        if cost_model.last_layer_flops_per_patch is not None and patches_unread:
            skipped = (cost_model.linear_flops_per_token - cost_model.last_layer_flops_per_patch) * patches
            attention = cost_model.attention_flops_per_pair * (length - patches) * length
            last_layer = FlopCount(last_layer.linear, attention, skipped)
        return cost_model.layer_flops(length) * (cost_model.prefusion_layers - 1) + last_layer


class CostModel:
    """Read the sizes that a model's cost depends on, and estimate the cost of prompts.

    The sizes come from the modules that the configuration builds on torch's meta device. These hold no numbers, so a
    model of any size fits in memory.

    Args:
        config: The configuration of a LLaVA or a LLaVA-Mini.

    Raises:
        ValueError: If the layers of the language model hold weights outside linear maps and norms, such as experts. The
            configuration does not tell which tokens would use those.

    Example:
        >>> from experiments.cost.architectures import llava_config
        >>> estimate = CostModel(llava_config("llava-1.5-7b"))(Prompt(text=60))
        >>> estimate.visual_tokens, round(estimate.flops("paper") / 1e12, 2)
        (576, 8.78)
    """

    def __init__(self, config: LlavaConfig) -> None:
        self.config = config
        with torch.device("meta"):
            self.model = AutoModelForImageTextToText.from_config(config).eval()
        text = config.get_text_config()
        inner = self.model.model
        self.layers: int = text.num_hidden_layers
        layer = inner.language_model.layers[0]
        self.linear_flops_per_token = 2.0 * _linear_weights(layer)  # in each layer
        if self.linear_flops_per_token / 2 < 0.95 * sum(p.numel() for p in layer.parameters()):
            raise ValueError(
                f"{type(layer).__name__} holds weights outside linear maps, so its cost cannot be estimated"
            )
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        # of each pair of a query and a key in each layer: QK and PV
        self.attention_flops_per_pair = 4.0 * text.num_attention_heads * head_width
        self.cache_values_per_token = 2 * text.num_key_value_heads * head_width  # in each layer
        self.head = FlopCount(2.0 * _linear_weights(self.model.lm_head))
        self.projector = FlopCount(2.0 * _linear_weights(inner.multi_modal_projector))
        self.prefusion_layers = getattr(config, "prefusion_layers", 0)
        self.compressor: Compressor | None = getattr(inner, "compressor", None)
        # None if the last pre-fusion layer processes patches like the others
        self.last_layer_flops_per_patch: float | None = None
        if self.prefusion_layers and has_supported_attention(inner.prefusion.layers[-1]):
            attention = inner.prefusion.layers[-1].self_attn
            key_value_weights = _linear_weights(attention.k_proj) + _linear_weights(attention.v_proj)
            self.last_layer_flops_per_patch = 2.0 * key_value_weights

    @cached_property
    def tower(self) -> FlopCount:
        """FLOPs of the vision tower on one crop, with the saliency that a compressor may need.

        torch counts them on the meta device, because vision towers differ in what surrounds their layers.
        """
        inner = self.model.model
        if not hasattr(inner, "look_at"):
            return _count_vision_tower(self.config, None, False, inner.vision_tower)
        with_attention = not {"saliency", "keys"}.isdisjoint(inner.needs)
        run = _count_vision_tower(self.config, self.config.vision_feature_layer, with_attention, inner.look_at)
        every_layer = copy.copy(self.config)  # as the released code runs them
        every_layer.vision_feature_layer = -1
        run_every_layer = partial(run_vision_tower, inner.vision_tower, every_layer, with_attention=False)
        whole = _count_vision_tower(self.config, -1, False, run_every_layer)
        return FlopCount(whole.linear, run.other, whole.linear - run.linear)

    @cached_property
    def patches(self) -> int:
        """Patch features that the vision tower returns for one crop."""
        if (side := getattr(self.config, "encoded_side", None)) is not None:
            return side * side
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        # "full" keeps the class token; SigLIP has none.
        has_class_token = vision.model_type != "siglip_vision_model"
        return patches + int(has_class_token and self.config.vision_feature_select_strategy == "full")

    def layer_flops(self, tokens: float) -> FlopCount:
        """Return the FLOPs of one layer of the language model, or of pre-fusion, over this many tokens."""
        return FlopCount(self.linear_flops_per_token * tokens, self.attention_flops_per_pair * tokens * tokens)

    def compressor_flops(self, patches: int, text: float) -> FlopCount:
        """Return the FLOPs of the compressor on one frame.

        Args:
            patches: Patches that it compresses.
            text: Text tokens, for compressors that read the text; rounded.
        """
        assert self.compressor is not None
        assert isinstance(self.config, LlavaMiniConfig)
        length = round(text)
        available = {
            "saliency": torch.empty(1, patches, device="meta"),
            "keys": torch.empty(1, patches, self.config.vision_config.hidden_size, device="meta"),
            "projected": torch.empty(1, patches, self.config.get_text_config().hidden_size, device="meta"),
            "text": torch.empty(1, length, self.config.get_text_config().hidden_size, device="meta"),
            "text_mask": torch.empty(1, length, dtype=torch.bool, device="meta"),
        }
        needed = {name: available[name] for name in self.compressor.needs}
        return count_module_flops(self.compressor, 1, patches, self.config.compressor_width, **needed)

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters of each component."""
        inner = self.model.model
        tied = self.model.lm_head.weight is self.model.get_input_embeddings().weight
        components: dict[str, nn.Module | None] = {
            "tower": inner.vision_tower,
            "projector": inner.multi_modal_projector,
            "compressor": self.compressor,
            "prefusion": getattr(inner, "prefusion", None),
            "language model": inner.language_model,
            "head": None if tied else self.model.lm_head,
        }
        return {
            name: sum(p.numel() for p in module.parameters()) if module is not None else 0
            for name, module in components.items()
        }

    def __call__(self, prompt: Prompt) -> CostEstimate:
        return CostEstimate(self, prompt)


@torch.no_grad()
def count_module_flops(module: Callable[..., Any], *shape: int, **arguments: Tensor) -> FlopCount:
    """Count the FLOPs of one call with torch's counter, on the meta device.

    Args:
        module: The module to call.
        shape: Shape of its first argument.
        arguments: Its keyword arguments.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        module(torch.empty(*shape), **arguments)
    counts = counter.get_flop_counts().get("Global", {})  # empty if the module only selects patches
    linear = sum(flops for operation, flops in counts.items() if operation in LINEAR_OPERATIONS)
    return FlopCount(float(linear), float(sum(counts.values()) - linear))


# FLOPs of vision towers that were counted: a table of compressors asks for the same one again and again.
_vision_tower_flops: dict[tuple[object, ...], FlopCount] = {}


def _count_vision_tower(
    config: LlavaConfig, layers: int | list[int] | None, with_attention: bool, run: Callable[..., Any]
) -> FlopCount:
    """Count the FLOPs of a vision tower on one crop, once for all models that run it in the same way.

    Args:
        config: The configuration of the model.
        layers: The selected layers up to which it runs; None if it runs as a whole.
        with_attention: Whether it also returns saliency and keys.
        run: Runs it on pixels of shape (1, channels, height, width).
    """
    vision = config.vision_config
    selection = (str(layers), config.vision_feature_select_strategy, getattr(config, "encoded_side", None))
    key = (vision.to_json_string(use_diff=False), vision._attn_implementation, *selection, with_attention)
    if key not in _vision_tower_flops:
        pixels = (1, vision.num_channels, vision.image_size, vision.image_size)
        _vision_tower_flops[key] = count_module_flops(run, *pixels)
    return _vision_tower_flops[key]


def _linear_weights(module: nn.Module) -> int:
    """Return the number of weights of all linear maps in a module."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
