"""From a model config to a model and its processor."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    ProcessorMixin,
    set_seed,
)

from experiments.config.schema import (
    CheckpointModel,
    CompressorConfig,
    Config,
    JoinedModel,
    PrefusionConfig,
    ScratchModel,
)
from experiments.data import scenes, shapes
from experiments.data.samples import Split
from experiments.files import ASSETS, stamps
from experiments.models import from_parts, lora, scratch
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor

KEPT_BYTES = 4 * 2**30  # a larger one is read anew: the memory is worth more


_last: dict[str, tuple[PreTrainedModel, ProcessorMixin]] = {}  # the LLaVA that this process's last cell was made of


_SHIPPED = "asset:"


_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def build_model(config: Config, train: Split | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model that a cell starts from, in eval mode, with its processor. What is new in it is drawn from the seed.

    The LLaVA below it is kept for the next cell of this process, up to 4 GiB of it, and each cell gets a copy. A model
    from scratch learns its vocabulary from the training split. A compressor or pre-fusion layers make a
    LLaVA-Mini of the LLaVA that the model config names.

    Raises:
        FileNotFoundError: if a folder does not exist.
        ValueError: if a checkpoint lacks weights, its tower has another grid than the config says, or a model from
            scratch has no scenes to learn from.
    """
    set_seed(config.seed)
    model, processor, kept = _base(config, train)
    set_seed(config.seed)  # what comes next is drawn alike whether the LLaVA was read or at hand
    patches, grid = getattr(model.config, "image_seq_length", None), config.model.grid
    if grid is not None and patches is not None and patches != grid * grid:
        raise ValueError(f"model.grid: {grid} x {grid} patches, but the vision tower makes {patches} of an image")
    if config.compressor.name != "none" or config.prefusion.layers:
        model, processor = _mini(model, processor, config.compressor, config.prefusion, config.tiles)
    elif config.tiles > 1:
        raise ValueError(f"tiles: only a LLaVA-Mini takes {config.tiles} x {config.tiles} tiles; give it a compressor")
    elif kept:
        model = copy.deepcopy(model)
    model.eval()
    return model, processor


def forget() -> None:
    """Let go of the LLaVA that is kept: the next cell reads its own."""
    _last.clear()


def _base(config: Config, train: Split | None) -> tuple[PreTrainedModel, ProcessorMixin, bool]:
    """The LLaVA that a cell's model is made of, and whether it is kept for other cells, which must find it as it is."""
    if isinstance(config.model, ScratchModel):
        return *_llava(config, train), False
    folders = stamps(getattr(config.model, name, None) for name in ("path", "vision", "language", "adapter"))
    name = repr([config.model, folders, isinstance(config.model, JoinedModel) and config.seed])
    base = _last.get(name)
    if base is None:
        forget()
        base = _llava(config, train)
        if sum(p.nbytes for p in base[0].parameters()) <= KEPT_BYTES:
            _last[name] = base
    return *base, name in _last


def _llava(config: Config, train: Split | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    source = config.model
    dtype = getattr(torch, source.dtype, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"model.dtype: '{source.dtype}' is no floating type of torch; use float32, bfloat16 or float16"
        )
    if isinstance(source, CheckpointModel):
        return load(source.path, dtype, source.attention)
    if isinstance(source, JoinedModel):
        vision = _folder_or_hub_name(source.vision, "vision")
        language = _folder_or_hub_name(source.language, "language")
        model, processor = from_parts.join(vision, language, source.vision_layer, source.grid, dtype, source.attention)
        if source.adapter is not None:
            lora.apply(model, _folder_or_hub_name(source.adapter, "adapter"))
        return model, processor
    if isinstance(source, ScratchModel):
        seen = shapes.scenes_of(train)
        told = (seen, seen.described())
        text = scratch.tokenizer((samples[i] for samples in told for i in range(1000)), source.vocabulary)
        model = scratch.llava(text, scenes.SIDE, source.patch, source.width, source.layers)
        return model, scratch.processor(text, scenes.SIDE, source.patch)
    raise TypeError(f"no way to build a {type(source).__name__}")


def _mini(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    compressor: CompressorConfig,
    prefusion: PrefusionConfig,
    tiles: int,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    if not isinstance(model, LlavaForConditionalGeneration) or isinstance(model, LlavaMiniForConditionalGeneration):
        raise ValueError(
            f"a compressor or pre-fusion is put into a LLaVA, and this model is a {type(model).__name__}; "
            "choose a LLaVA, or compressor=none prefusion.layers=0"
        )
    inside = prefusion.place == "inside"
    if inside and (compressor.name == "none" or not compressor.size):
        raise ValueError(
            "prefusion.place=inside leaves compressed tokens to later layers: choose a compressor with at least one token"
        )
    mini = LlavaMiniForConditionalGeneration.from_llava(
        model,
        compressor=compressor.name,
        compressor_size=compressor.size,
        compress_before_projection=compressor.before_projection,
        compressor_attention=compressor.attention,
        compressor_positions=compressor.positions,
        prefusion_layers=0 if inside else prefusion.layers,
        prefusion_init=prefusion.init,
        prefuse_visual_tokens=prefusion.visual_tokens,
        keep_patches=inside,
    )
    return mini, LlavaMiniProcessor.from_llava(processor, mini.config, tiles=tiles)


def _folder_or_hub_name(path: str, field: str) -> str:
    if path.startswith(_SHIPPED):  # a name and no path, so that a cell is the same in every clone
        path = str(ASSETS / path.removeprefix(_SHIPPED))
    if not Path(path).is_dir() and (Path(path).is_absolute() or not _HUB_NAME.fullmatch(path)):
        raise FileNotFoundError(f"model.{field}: no folder '{path}'")
    return path


def load(
    path: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A saved model and its processor; every weight must come from the checkpoint."""
    name = _folder_or_hub_name(path, "path")
    try:
        processor = AutoProcessor.from_pretrained(name)
        model, info = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, attn_implementation=attention, output_loading_info=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.path: '{path}' is neither a folder nor a hub name that holds a vision-language model: {first}"
        ) from error
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise ValueError(f"model.path: checkpoint '{path}' lacks {len(lacking)} weights, the first is {lacking[0]}")
    return model, processor
