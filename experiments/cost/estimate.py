"""FLOPs, parameters and cache bytes of LLaVA and LLaVA-Mini from a configuration alone: no weights, no run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, LlavaConfig

from llava_mini import LlavaMiniConfig
from llava_mini.compressors import Compressor
from llava_mini.prefusion import KNOWN
from llava_mini.visual_layout import crops_of

Convention = Literal["paper", "full"]
CONVENTIONS: tuple[Convention, ...] = ("paper", "full")
LINEAR = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)


@dataclass(frozen=True)
class Work:
    """FLOPs, a multiplication and an addition counted as two.

    Args:
        linear: Of linear maps, to which the cutting into patches belongs, as the released code runs them.
        other: Of all other products: those of attention, causal or not, over all pairs.
        spared: Of `linear`, what is left out here: the last pre-fusion layer makes nothing but keys and values of
            patches.
    """

    linear: float = 0.0
    other: float = 0.0
    spared: float = 0.0

    def flops(self, convention: Convention) -> float:
        """ "paper": linear maps alone, as LLaVA-Mini's printed figures count; "full": as torch's FLOP counter."""
        return self.linear if convention == "paper" else self.linear + self.other - self.spared

    def __add__(self, more: Work) -> Work:
        return Work(self.linear + more.linear, self.other + more.other, self.spared + more.spared)

    def __mul__(self, times: float) -> Work:
        return Work(self.linear * times, self.other * times, self.spared * times)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Args:
        text: Text tokens.
        frames: 1 for an image; the frames of a video.
        tiles: Every frame is cut into `tiles` x `tiles` and also seen whole.
        visual_by_layer: Share of the visual tokens that each layer of the language model still works on, for methods
            that drop some on the way; all by default.
    """

    text: float
    frames: int = 1
    tiles: int = 1
    visual_by_layer: Sequence[float] = field(default=())


class Estimate:
    """The cost of one prompt, by component. Attributes are of type `Work`, for all frames together.

    Attributes:
        tower, projector, compressor, prefusion: What is done to the picture, and to the text with it.
        prefill: The language model's layers over the prompt.
        head: Its output map on every token of the prompt, as a plain forward pass computes it.
        visual_tokens: What the language model sees of all frames.
    """

    def __init__(self, geometry: Geometry, prompt: Prompt) -> None:
        self.geometry, self.prompt = geometry, prompt
        config, frames = geometry.config, prompt.frames
        crops = crops_of(prompt.tiles)
        detail = geometry.patches * prompt.tiles**2  # what is compressed: not the picture as a whole beside its tiles
        patches = geometry.patches * crops
        mini = config if isinstance(config, LlavaMiniConfig) else None
        tokens = patches if mini is None else mini.num_visual_tokens(detail)
        compresses, fuses = geometry.compressor is not None, geometry.prefusion_layers > 0

        self.visual_tokens = tokens * frames
        self.tower = geometry.tower * (crops * frames)
        first = mini is not None and mini.compress_before_projection
        if not first:
            read = patches
        elif compresses:
            read = tokens + (patches if fuses else 0)
        else:
            read = patches if fuses else detail
        self.projector = geometry.projector * (read * frames)
        self.compressor = geometry.compress(detail, prompt.text) * frames if compresses else Work()
        through = patches + prompt.text
        if compresses and mini is not None and mini.prefuse_visual_tokens:
            through += tokens
        last = geometry.layer(through)
        unread = mini is not None and (compresses or not tokens or not mini.prefuse_visual_tokens)
        if geometry.last_linear is not None and unread:
            spared = (geometry.layer_linear - geometry.last_linear) * patches
            last = Work(last.linear, geometry.attention * (through - patches) * through, spared)
        self.prefusion = (
            (geometry.layer(through) * (geometry.prefusion_layers - 1) + last) * frames if fuses else Work()
        )
        shares = list(prompt.visual_by_layer) or [1.0] * geometry.layers
        if len(shares) != geometry.layers:
            raise ValueError(f"visual_by_layer names {len(shares)} layers: the language model has {geometry.layers}")
        self.prefill = sum((geometry.layer(self.visual_tokens * s + prompt.text) for s in shares), Work())
        self.head = geometry.head * (self.visual_tokens * shares[-1] + prompt.text)
        self._cached = sum(self.visual_tokens * share + prompt.text for share in shares)

    @property
    def components(self) -> dict[str, Work]:
        names = ("tower", "projector", "compressor", "prefusion", "prefill", "head")
        return {name: getattr(self, name) for name in names}

    def flops(self, convention: Convention) -> float:
        return sum(work.flops(convention) for work in self.components.values())

    @property
    def decode(self) -> Work:
        """The next token, the prompt in the cache."""
        geometry = self.geometry
        context = self._cached + geometry.layers  # the token sees itself too
        return Work(geometry.layer_linear * geometry.layers, geometry.attention * context) + geometry.head

    def cache_bytes(self, bytes_per_number: int = 2) -> float:
        """Of the keys and values of the whole prompt, in all layers of the language model."""
        return self.geometry.cache_numbers * self._cached * bytes_per_number

    def pixel_bytes(self, bytes_per_number: int = 2) -> float:
        """Of the pixels of all frames, where they are held at once."""
        vision = self.geometry.config.vision_config
        side = vision.image_size
        return self.prompt.frames * crops_of(self.prompt.tiles) * vision.num_channels * side * side * bytes_per_number


class Geometry:
    """The sizes of a model that its costs follow from, read off the modules that its configuration makes on torch's
    meta device: those hold no numbers, whatever the model's size.

    Raises:
        ValueError: If the language model's layers hold weights in other modules than linear maps and norms, such as
            experts: which tokens would use them the configuration does not say.
    """

    def __init__(self, config: LlavaConfig) -> None:
        self.config = config
        with torch.device("meta"):
            self.model = AutoModelForImageTextToText.from_config(config).eval()
        text = config.get_text_config()
        inner = self.model.model
        self.layers: int = text.num_hidden_layers
        layer = inner.language_model.layers[0]
        self.layer_linear = 2.0 * _linear(layer)
        if self.layer_linear / 2 < 0.95 * sum(p.numel() for p in layer.parameters()):
            raise ValueError(f"{type(layer).__name__} is not made of linear maps alone: its cost is not known")
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.attention = 4.0 * text.num_attention_heads * width  # of each pair of a query and a key: QK and PV
        self.cache_numbers = 2 * text.num_key_value_heads * width  # of each token in each layer
        self.head = Work(2.0 * _linear(self.model.lm_head))
        self.projector = Work(2.0 * _linear(inner.multi_modal_projector))
        self.prefusion_layers = getattr(config, "prefusion_layers", 0)
        self.compressor: Compressor | None = getattr(inner, "compressor", None)
        # of a patch in the last pre-fusion layer; None where that runs whole
        self.last_linear: float | None = None
        if self.prefusion_layers and type(attention := inner.prefusion.layers[-1].self_attn) in KNOWN:
            self.last_linear = 2.0 * (_linear(attention.k_proj) + _linear(attention.v_proj))

    @cached_property
    def tower(self) -> Work:
        """Of one crop, with what a compressor reads off its attention. Counted by torch as it runs on the meta device:
        towers differ in what surrounds their layers."""
        vision = self.config.vision_config
        pixels = (1, vision.num_channels, vision.image_size, vision.image_size)
        inner = self.model.model
        return count(getattr(inner, "look_at", inner.vision_tower), *pixels)

    @cached_property
    def patches(self) -> int:
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        # "full" keeps the class token, of which SigLIP has none.
        has_class = vision.model_type != "siglip_vision_model"
        return patches + int(has_class and self.config.vision_feature_select_strategy == "full")

    def layer(self, tokens: float) -> Work:
        """Of one layer of the language model, which pre-fusion's are of the kind of, over `tokens` tokens."""
        return Work(self.layer_linear * tokens, self.attention * tokens * tokens)

    def compress(self, patches: int, text: float) -> Work:
        """Of one frame, asked about with so many text tokens, rounded, where the compressor reads them."""
        assert self.compressor is not None
        assert isinstance(self.config, LlavaMiniConfig)
        words = round(text)
        needed = {
            "saliency": torch.empty(1, patches, device="meta"),
            "keys": torch.empty(1, patches, self.config.vision_config.hidden_size, device="meta"),
            "text": torch.empty(1, words, self.config.get_text_config().hidden_size, device="meta"),
            "text_mask": torch.empty(1, words, dtype=torch.bool, device="meta"),
        }
        given = {name: needed[name] for name in self.compressor.needs}
        return count(self.compressor, 1, patches, self.config.compressor_width, **given)

    def parameters(self) -> dict[str, int]:
        """By component."""
        inner = self.model.model
        tied = self.model.lm_head.weight is self.model.get_input_embeddings().weight
        parts: dict[str, nn.Module | None] = {
            "tower": inner.vision_tower,
            "projector": inner.multi_modal_projector,
            "compressor": self.compressor,
            "prefusion": getattr(inner, "prefusion", None),
            "language model": inner.language_model,
            "head": None if tied else self.model.lm_head,
        }
        return {
            name: sum(p.numel() for p in module.parameters()) if module is not None else 0
            for name, module in parts.items()
        }

    def __call__(self, prompt: Prompt) -> Estimate:
        return Estimate(self, prompt)


def _linear(module: nn.Module) -> int:
    """Weights of the linear maps in it."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


@torch.no_grad()
def count(module: Callable[..., Any], *shape: int, **more: Tensor) -> Work:
    """Of one call with a tensor of that shape and these, by torch's counter."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        module(torch.empty(*shape), **more)
    counts = counter.get_flop_counts().get("Global", {})  # nothing at all where patches are merely chosen
    linear = sum(flops for operation, flops in counts.items() if operation in LINEAR)
    return Work(float(linear), float(sum(counts.values()) - linear))
