"""LLaVA and LLaVA-Mini of one geometry with random weights, and a prompt to each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaConfig, PreTrainedModel

from experiments.config.schema import CostConfig
from experiments.cost.architectures import geometry, mini
from experiments.cost.estimate import Estimate, Geometry, Prompt
from llava_mini import LlavaMiniConfig
from llava_mini.compressors import COMPRESSORS
from llava_mini.prefusion import Prefusion
from llava_mini.visual_layout import crops_of


def configurations(cost: CostConfig) -> dict[str, LlavaConfig]:
    """LLaVA and a LLaVA-Mini for each of `cost.sizes`, by the names that tables call them.

    Raises:
        ValueError: If `cost.geometry` is unknown or a LLaVA-Mini itself.
    """
    llava = geometry(cost.geometry)
    if isinstance(llava, LlavaMiniConfig):
        raise ValueError(f"cost.geometry: {cost.geometry} is a LLaVA-Mini; give the LLaVA that it is compared with")
    layers = cost.prefusion or max(1, round(llava.get_text_config().num_hidden_layers / 8))
    found = {"LLaVA": llava}
    for size in cost.sizes:
        name = f"LLaVA-Mini, {size**2} token{'s' * (size > 1)}"
        found[name] = mini(llava, compressor_size=size, prefusion_layers=layers)
    return found


@dataclass(frozen=True)
class Needs:
    """Bytes that one answer takes, about. Activations are the widest that any one component holds at once."""

    weights: float
    cache: float
    activations: float

    @classmethod
    def of(cls, estimate: Estimate, answer: int, bytes_each: int) -> Needs:
        config, prompt, sizes = estimate.geometry.config, estimate.prompt, estimate.geometry
        text, vision = config.get_text_config(), config.vision_config
        length = estimate.visual_tokens + prompt.text
        crops = crops_of(prompt.tiles)
        at_once, tokens = prompt.frames, 0  # what stands beside the patches in pre-fusion
        if isinstance(config, LlavaMiniConfig):
            at_once = min(prompt.frames, config.frames_per_chunk)
            tokens = config.num_visual_tokens(sizes.patches * prompt.tiles**2) + int(prompt.text)
        states = vision.num_hidden_layers + 8  # all of the tower's stay
        looked = at_once * crops * (sizes.patches + 1) * vision.hidden_size * states
        each = 6 * text.hidden_size + 2 * text.intermediate_size  # of a token in a layer of the language model
        fused = at_once * (crops * sizes.patches + tokens) * each if sizes.prefusion_layers else 0
        pixels = estimate.pixel_bytes(1) * at_once / prompt.frames
        return cls(
            sum(sizes.parameters().values()) * bytes_each,
            estimate.cache_bytes(bytes_each) * (length + answer) / length,
            (pixels + max(looked, fused, length * each)) * bytes_each,
        )

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.activations

    def __str__(self) -> str:
        parts = {name: f"{value / 2**30:,.3g} GiB of {name}" for name, value in vars(self).items()}
        largest = max(parts, key=lambda name: getattr(self, name))
        return f"about {self.total / 2**30:,.3g} GiB, {parts[largest]} alone"


def room(device: torch.device) -> int:
    """Bytes that are free on the machine, or on the GPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def estimates(cost: CostConfig, device: torch.device) -> dict[tuple[str, int], tuple[Estimate, Needs, bool]]:
    """For each model and number of frames what it costs, what it needs, and whether that is there. Nothing is built.

    Raises:
        ValueError: If not even one of the models has room for a number of frames.
    """
    free, bytes_each = room(device), getattr(torch, cost.dtype).itemsize
    geometries = {name: Geometry(config) for name, config in configurations(cost).items()}
    found: dict[tuple[str, int], tuple[Estimate, Needs, bool]] = {}
    for frames in cost.frames:
        for name, sizes in geometries.items():
            estimate = sizes(Prompt(cost.text, frames, cost.tiles))
            needs = Needs.of(estimate, cost.answer, bytes_each)
            found[name, frames] = estimate, needs, needs.total <= free
        if not any(found[name, frames][2] for name in geometries):
            name = min(geometries, key=lambda name: found[name, frames][1].total)
            needs = found[name, frames][1]
            cut = f" of {cost.tiles:,} x {cost.tiles:,} tiles" if cost.tiles > 1 else ""
            raise ValueError(
                f"cost: {cost.geometry} in {cost.dtype} over {frames:,} frame{'s' * (frames > 1)}{cut} has no room on "
                f"{device}: {name} takes least, {needs}, {(needs.total - free) / 2**30:,.3g} GiB more than the "
                f"{free / 2**30:,.3g} GiB that are free"
            )
    return found


def build(wanted: dict[str, LlavaConfig], dtype: str, device: torch.device) -> dict[str, Any]:
    """The models, on the same weights but for those that a LLaVA-Mini adds: together they take little more than one."""
    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    with torch.device(device):
        llava: Any = AutoModelForImageTextToText.from_config(wanted["LLaVA"], dtype=kind).eval()
    built: dict[str, Any] = {"LLaVA": llava}
    for name, config in wanted.items():
        if isinstance(config, LlavaMiniConfig):
            built[name] = _mini(config, llava, kind, device)
    return built


def _mini(config: LlavaMiniConfig, llava: Any, kind: torch.dtype, device: torch.device) -> PreTrainedModel:
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=kind).eval()
    share(model, llava)
    with torch.device(device):
        compressor = COMPRESSORS[config.compressor](config)
        compressor.reset_parameters()
        prefusion = Prefusion(llava.model.language_model, config.prefusion_layers)
    inner = model.model
    inner.compressor, inner.prefusion = (module.to(kind).eval() for module in (compressor, prefusion))
    return model


def share(model: Any, llava: Any) -> None:
    """Put the parts that any LLaVA has, of `llava`, into a LLaVA or LLaVA-Mini of the same sizes."""
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        setattr(model.model, name, getattr(llava.model, name))
    model.lm_head = llava.lm_head


def inputs(model: PreTrainedModel, frames: int, text: int, tiles: int = 1) -> dict[str, Any]:
    """A prompt: pictures, then the text of a question, on the model's device. The frames are all alike, and LLaVA-Mini
    gets them as a stream; LLaVA takes them as one tensor.

    A frame in `tiles` x `tiles` is its tiles and the whole of it. LLaVA takes these as so many pictures, each with all
    its tokens.
    """
    config: Any = model.config
    vision, crops = config.vision_config, crops_of(tiles)
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(config.get_text_config().vocab_size - 1, (text,), generator=draw)
    words += words >= config.image_token_index
    frame = torch.randn(crops, vision.num_channels, vision.image_size, vision.image_size, generator=draw)
    frame = frame.to(model.dtype)
    found: dict[str, Any] = {}
    if isinstance(config, LlavaMiniConfig):
        tokens = config.compressor_size**2
        found["pixel_values"] = Repeated(frame, frames)
        found["visual_layout"] = torch.tensor([[0, frames, tiles]])
    else:
        tokens = Geometry(config).patches * crops
        found["pixel_values"] = frame.repeat(frames, 1, 1, 1)
    placeholders = torch.full((tokens * frames,), config.image_token_index)
    found["input_ids"] = torch.cat([words[:1], placeholders, words[1:]])[None].to(model.device)
    return found


@dataclass(frozen=True)
class Repeated:
    """A stream of one frame again and again, which starts anew for every run."""

    frame: Tensor
    times: int

    def __iter__(self) -> Iterator[Tensor]:
        return (self.frame for _ in range(self.times))
