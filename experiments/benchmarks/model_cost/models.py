"""LLaVA and LLaVA-Mini of one architecture with random weights, their memory needs, and prompts for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaConfig, PreTrainedModel

from experiments.config.benchmark_schema import CostConfig
from experiments.cost.architectures import llava_config, llava_mini_config
from experiments.cost.estimate import CostEstimate, CostModel, Prompt
from llava_mini import LlavaMiniConfig
from llava_mini.chunk_size import MOST_FRAMES
from llava_mini.compressors import COMPRESSORS
from llava_mini.prefusion import Prefusion
from llava_mini.visual_layout import crops_per_frame

GIB = 2**30


@dataclass(frozen=True)
class MemoryNeeds:
    """Approximate bytes that one answer needs.

    Args:
        weights: Weights of the model.
        cache: Keys and values of the prompt and the answer.
        activations: The largest activations that any one component holds at once.
    """

    weights: float
    cache: float
    activations: float

    @classmethod
    def of(cls, estimate: CostEstimate, answer: int, bytes_each: int) -> MemoryNeeds:
        """Return the needs of an estimated prompt.

        Args:
            estimate: The estimate of the prompt.
            answer: Tokens of the answer.
            bytes_each: Bytes of one number.
        """
        config, prompt, cost_model = estimate.cost_model.config, estimate.prompt, estimate.cost_model
        text, vision = config.get_text_config(), config.vision_config
        length = estimate.visual_tokens + prompt.text
        crops = crops_per_frame(prompt.tiles)
        frames_at_once, other_tokens = prompt.frames, 0  # tokens beside the patches in pre-fusion
        if isinstance(config, LlavaMiniConfig):
            frames_at_once = min(prompt.frames, config.frames_per_chunk or MOST_FRAMES)
            other_tokens = config.num_visual_tokens(cost_model.patches * prompt.tiles**2) + int(prompt.text)
        vision_states = vision.num_hidden_layers + 8  # the vision tower returns the output of every layer
        vision_numbers = frames_at_once * crops * (cost_model.patches + 1) * vision.hidden_size * vision_states
        numbers_per_token = 6 * text.hidden_size + 2 * text.intermediate_size  # in a layer of the language model
        prefusion_tokens = crops * cost_model.patches + other_tokens if cost_model.prefusion_layers else 0
        prefusion_numbers = frames_at_once * prefusion_tokens * numbers_per_token
        pixels = estimate.pixel_bytes(1) * frames_at_once / prompt.frames
        return cls(
            sum(cost_model.parameter_counts().values()) * bytes_each,
            estimate.cache_bytes(bytes_each) * (length + answer) / length,
            (pixels + max(vision_numbers, prefusion_numbers, length * numbers_per_token)) * bytes_each,
        )

    @property
    def total(self) -> float:
        """Bytes of all parts together."""
        return self.weights + self.cache + self.activations

    def __str__(self) -> str:
        parts = {name: f"{value / GIB:,.3g} GiB of {name}" for name, value in vars(self).items()}
        largest = max(parts, key=lambda name: getattr(self, name))
        return f"about {self.total / GIB:,.3g} GiB, {parts[largest]} alone"


@dataclass(frozen=True)
class RepeatedFrame:
    """A stream that yields one frame several times, and starts again for every run."""

    frame: Tensor
    times: int

    def __iter__(self) -> Iterator[Tensor]:
        return (self.frame for _ in range(self.times))


def model_configs(cost: CostConfig) -> dict[str, LlavaConfig]:
    """Return the configurations of LLaVA and of a LLaVA-Mini for each of `cost.sizes`, by their names in tables.

    Raises:
        ValueError: If `cost.geometry` is unknown, or names a LLaVA-Mini.
    """
    llava = llava_config(cost.geometry, setting="cost.geometry")
    if isinstance(llava, LlavaMiniConfig):
        raise ValueError(f"cost.geometry: {cost.geometry} is a LLaVA-Mini; give the LLaVA to compare it with")
    layers = cost.prefusion or max(1, round(llava.get_text_config().num_hidden_layers / 8))
    configs = {"LLaVA": llava}
    for size in cost.sizes:
        name = f"LLaVA-Mini, {size**2} token{'s' * (size > 1)}"
        configs[name] = llava_mini_config(llava, compressor_size=size, prefusion_layers=layers)
    return configs


def free_memory(device: torch.device) -> int:
    """Return the free bytes of the GPU, or of the machine for any other device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def estimate_models(
    cost: CostConfig, device: torch.device
) -> dict[tuple[str, int], tuple[CostEstimate, MemoryNeeds, bool]]:
    """Estimate cost and memory needs of each model for each number of frames, without building a model.

    Returns:
        By model name and frames: the estimate, the memory needs, and whether they fit into the free memory.

    Raises:
        ValueError: If no model fits for one of the numbers of frames.
    """
    free, bytes_each = free_memory(device), getattr(torch, cost.dtype).itemsize
    cost_models = {name: CostModel(config) for name, config in model_configs(cost).items()}
    estimates: dict[tuple[str, int], tuple[CostEstimate, MemoryNeeds, bool]] = {}
    for frames in cost.frames:
        for name, cost_model in cost_models.items():
            estimate = cost_model(Prompt(cost.text, frames, cost.tiles))
            needs = MemoryNeeds.of(estimate, cost.answer, bytes_each)
            estimates[name, frames] = estimate, needs, needs.total <= free
        if not any(estimates[name, frames][2] for name in cost_models):
            name = min(cost_models, key=lambda name: estimates[name, frames][1].total)
            needs = estimates[name, frames][1]
            tiles = f" of {cost.tiles:,} x {cost.tiles:,} tiles" if cost.tiles > 1 else ""
            raise ValueError(
                f"cost: {cost.geometry} in {cost.dtype} over {frames:,} frame{'s' * (frames > 1)}{tiles} does not fit "
                f"into the memory of {device}: {name} needs least, {needs}, which is "
                f"{(needs.total - free) / GIB:,.3g} GiB more than the {free / GIB:,.3g} GiB that are free"
            )
    return estimates


def build_models(configs: dict[str, LlavaConfig], dtype: str, device: torch.device) -> dict[str, Any]:
    """Build the models on shared weights, so together they take little more memory than one.

    Args:
        configs: Configurations by name, with "LLaVA" among them.
        dtype: Name of the dtype.
        device: The device to build on.

    Returns:
        The models by name. A LLaVA-Mini has a compressor and pre-fusion layers of its own.
    """
    torch.manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    with torch.device(device):
        llava: Any = AutoModelForImageTextToText.from_config(configs["LLaVA"], dtype=torch_dtype).eval()
    models: dict[str, Any] = {"LLaVA": llava}
    for name, config in configs.items():
        if isinstance(config, LlavaMiniConfig):
            models[name] = _build_llava_mini(config, llava, torch_dtype, device)
    return models


def share_llava_parts(model: Any, llava: Any) -> None:
    """Replace vision tower, projector, language model and head of a model by those of `llava`.

    Args:
        model: A LLaVA or LLaVA-Mini.
        llava: A LLaVA of the same sizes.
    """
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        setattr(model.model, name, getattr(llava.model, name))
    model.lm_head = llava.lm_head


def prompt_inputs(model: PreTrainedModel, frames: int, text: int, tiles: int = 1) -> dict[str, Any]:
    """Return the inputs of a prompt: images first, then the text of a question.

    All frames are equal. A frame in `tiles` x `tiles` comes as its tiles and the whole frame. LLaVA-Mini gets the frames
    as a stream. LLaVA gets one tensor, and takes each crop as an image with all of its tokens.

    Args:
        model: A LLaVA or LLaVA-Mini.
        frames: Number of frames.
        text: Text tokens.
        tiles: Tiles along each side of a frame.
    """
    config: Any = model.config
    vision, crops = config.vision_config, crops_per_frame(tiles)
    generator = torch.Generator().manual_seed(0)
    text_ids = torch.randint(config.get_text_config().vocab_size - 1, (text,), generator=generator)
    text_ids += text_ids >= config.image_token_index
    frame = torch.randn(crops, vision.num_channels, vision.image_size, vision.image_size, generator=generator)
    frame = frame.to(model.dtype)
    inputs: dict[str, Any] = {}
    if isinstance(config, LlavaMiniConfig):
        tokens = config.compressor_size**2
        inputs["pixel_values"] = RepeatedFrame(frame, frames)
        inputs["visual_layout"] = torch.tensor([[0, frames, tiles]])
    else:
        tokens = CostModel(config).patches * crops
        inputs["pixel_values"] = frame.repeat(frames, 1, 1, 1)
    placeholders = torch.full((tokens * frames,), config.image_token_index)
    inputs["input_ids"] = torch.cat([text_ids[:1], placeholders, text_ids[1:]])[None].to(model.device)
    return inputs


def _build_llava_mini(config: LlavaMiniConfig, llava: Any, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    share_llava_parts(model, llava)
    with torch.device(device):
        compressor = COMPRESSORS[config.compressor](config)
        compressor.reset_parameters()
        prefusion = Prefusion(llava.model.language_model, config.prefusion_layers)
    inner = model.model
    inner.compressor, inner.prefusion = (module.to(dtype).eval() for module in (compressor, prefusion))
    return model
