"""The model and processor of a cell, built from its configuration."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    set_seed,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
from experiments.files import file_stamps
from experiments.models import from_parts, lora, scratch
from experiments.models.blip_2_prompts import Blip2ChatProcessor
from experiments.models.model_files import shipped_folder
from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration, LlavaMiniProcessor
from llava_mini.checkpoint_files import MODEL_FILES, PROCESSOR_FILES, name_damaged_file
from llava_mini.older_processors import complete_from_config
from probes.loading import HUB_NAME

MAX_CACHED_BYTES = 4 * 2**30  # a larger model is read again for each cell: its memory is worth more than the time
VOCABULARY_SAMPLES = 1000  # of questions and of descriptions, that a new tokenizer is trained on
_cached_llava: dict[str, tuple[PreTrainedModel, ProcessorMixin]] = {}  # at most one: that of this process's last cell


def build_model(config: Config, train: Split | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Build the model that a cell starts from, in eval mode, and its processor.

    New weights are drawn from the seed. A compressor or pre-fusion layers make a LLaVA-Mini of the configured LLaVA. A
    LLaVA of up to `MAX_CACHED_BYTES` is cached for the next cell of this process, and each cell gets a copy of it.

    Args:
        config: The cell's configuration.
        train: The training split, from which a model from scratch gets its vocabulary.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ImportError: If this machine cannot run the model's attention.
        ValueError: If a checkpoint lacks weights, its vision tower has another grid than the configuration, or a model
            from scratch has no scenes to train on.
    """
    new_fields = _llava_mini_fields(config.compressor, config.prefusion)
    if new_fields is not None:
        # refuses a wrong value before anything is loaded; the depth that limits prefusion_layers is not known yet
        LlavaMiniConfig(**new_fields | {"prefusion_layers": min(new_fields["prefusion_layers"], 1)})
    set_seed(config.seed)
    with _name_attention(config.model.attention):
        model, processor, is_cached = _base_llava(config, train)
    set_seed(config.seed)  # the next draws are the same whether the LLaVA was read or cached
    patches, grid = getattr(model.config, "image_seq_length", None), config.model.grid
    if grid is not None and patches is not None and patches != grid * grid:
        raise ValueError(f"model.grid: expected {grid} x {grid} patches, but the vision tower has {patches} per image")
    if new_fields is not None:
        model, processor = _build_llava_mini(model, processor, new_fields, config.tiles)
    elif config.tiles > 1:
        raise ValueError(
            f"tiles: only a LLaVA-Mini accepts {config.tiles} x {config.tiles} tiles; set a compressor, or tiles=1"
        )
    elif is_cached:
        model = copy.deepcopy(model)
    model.eval()
    return model, processor


def clear_model_cache() -> None:
    """Drop the cached LLaVA, so that the next cell reads its own."""
    _cached_llava.clear()


def load_checkpoint(
    path: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa"
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a saved model and its processor.

    Args:
        path: A folder, a model hub name, or `asset:NAME` for a model that ships with the project.
        dtype: Floating type of the weights.
        attention: Attention implementation: sdpa, eager or flash_attention_2.

    Raises:
        FileNotFoundError: If there is no such folder and the path is not a hub name.
        ValueError: If it holds no vision-language model, its language model is an encoder-decoder, or a weight of the
            model is not in the checkpoint.
    """
    name = _resolve_source(path, "path")
    try:
        with name_damaged_file(name, MODEL_FILES + PROCESSOR_FILES):
            processor = AutoProcessor.from_pretrained(name)
            model, info = AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, attn_implementation=attention, output_loading_info=True, use_safetensors=True
            )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.path: '{path}' is neither a folder nor a hub name that holds a vision-language model: {first_line}"
        ) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ValueError(f"model.path: checkpoint '{path}' lacks {len(missing)} weights, the first is {missing[0]}")
    if getattr(model.config, "keep_patches", False):
        raise ValueError(
            f"model.path: '{path}' was trained with prefusion.location=inside, and its files do not say how many layers see "
            "the patches; run the cell that trained it again, or save a model with prefusion.location=outside"
        )
    if getattr(model.config.get_text_config(), "is_encoder_decoder", False):
        raise ValueError(
            f"model.path: the language model of '{path}', a {model.config.get_text_config().model_type}, is an "
            "encoder-decoder; use a model whose language model is a decoder, such as BLIP-2 with OPT"
        )
    if isinstance(processor, Blip2Processor):
        processor = Blip2ChatProcessor.from_pretrained(name)
        processor.num_query_tokens = model.config.num_query_tokens
    if isinstance(processor, LlavaProcessor) and isinstance(model.config, LlavaConfig):
        complete_from_config(processor, model.config)
    return model, processor


def _base_llava(config: Config, train: Split | None) -> tuple[PreTrainedModel, ProcessorMixin, bool]:
    """Return the LLaVA that a cell's model is made of, its processor, and whether it is cached and must not change."""
    if isinstance(config.model, ScratchModel):
        return *_build_llava(config, train), False
    folders = file_stamps(getattr(config.model, name, None) for name in ("path", "vision", "language", "adapter"))
    key = repr([config.model, folders, isinstance(config.model, JoinedModel) and config.seed])
    base = _cached_llava.get(key)
    if base is None:
        clear_model_cache()
        base = _build_llava(config, train)
        if sum(p.nbytes for p in base[0].parameters()) <= MAX_CACHED_BYTES:
            _cached_llava[key] = base
    return *base, key in _cached_llava


def _build_llava(config: Config, train: Split | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    source = config.model
    dtype = getattr(torch, source.dtype, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"model.dtype: '{source.dtype}' is not a floating type of torch; use float32, bfloat16 or float16"
        )
    if source.attention not in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()) and "/" not in source.attention:
        # with a slash it is a kernel of the hub
        raise ValueError(f"model.attention: unknown '{source.attention}'; use sdpa, eager or flash_attention_2")
    if isinstance(source, CheckpointModel):
        return load_checkpoint(source.path, dtype, source.attention)
    if isinstance(source, JoinedModel):
        model, processor = from_parts.build_llava_from_parts(
            _resolve_source(source.vision, "vision"),
            _resolve_source(source.language, "language"),
            source.vision_layer,
            source.grid,
            dtype,
            source.attention,
        )
        if source.adapter is not None:
            lora.merge_saved_adapter(model, _resolve_source(source.adapter, "adapter"))
        return model, processor
    if isinstance(source, ScratchModel):
        questions = shapes.require_shape_samples(train)
        texts = (
            samples[i]
            for samples in (questions, questions.with_descriptions())
            for i in range(min(VOCABULARY_SAMPLES, len(samples)))
        )
        tokenizer = scratch.train_tokenizer(texts, source.vocabulary)
        model = scratch.build_llava(tokenizer, scenes.IMAGE_SIZE, source.patch, source.width, source.layers)
        model.set_attn_implementation(source.attention)
        return model, scratch.build_processor(tokenizer, scenes.IMAGE_SIZE, source.patch)
    raise TypeError(f"model: no builder for a {type(source).__name__}; add one to build.py")


def _llava_mini_fields(compressor: CompressorConfig, prefusion: PrefusionConfig) -> dict[str, Any] | None:
    """Return the fields that a cell's LLaVA-Mini adds to its LLaVA's configuration, or None for a LLaVA."""
    if compressor.name == "none" and not prefusion.layers:
        return None
    inside = prefusion.location == "inside"
    if inside and (compressor.name == "none" or not compressor.size):
        raise ValueError(
            "prefusion.location=inside: later layers need compressed tokens; choose a compressor with at least one token"
        )
    return {
        "compressor": compressor.name,
        "compressor_size": compressor.size,
        "compress_before_projection": compressor.before_projection,
        "compressor_attention": compressor.attention,
        "compressor_positions": compressor.positions,
        "prefusion_layers": 0 if inside else prefusion.layers,
        "prefusion_init": prefusion.init,
        "prefuse_visual_tokens": prefusion.visual_tokens,
        "keep_patches": inside,
    }


def _build_llava_mini(
    model: PreTrainedModel, processor: ProcessorMixin, new_fields: dict[str, Any], tiles: int
) -> tuple[PreTrainedModel, ProcessorMixin]:
    if not isinstance(model, LlavaForConditionalGeneration) or isinstance(model, LlavaMiniForConditionalGeneration):
        raise ValueError(
            f"compressor, prefusion: they are added to a LLaVA, and this model is a {type(model).__name__}; "
            "choose a LLaVA, or compressor=none prefusion.layers=0"
        )
    mini = LlavaMiniForConditionalGeneration.from_llava(model, **new_fields)
    return mini, LlavaMiniProcessor.from_llava(processor, mini.config, tiles=tiles)


@contextlib.contextmanager
def _name_attention(attention: str) -> Iterator[None]:
    """Name the setting where transformers refuses flash attention: its package is not installed, or there is no GPU."""
    try:
        yield
    except ImportError as error:
        if "FlashAttention" not in str(error):
            raise
        reason = str(error).rpartition("following error: ")[2]
        raise ImportError(f"model.attention: '{attention}' cannot run here; use sdpa or eager: {reason}") from error


def _resolve_source(path: str, field: str) -> str:
    """Return a folder or a hub name; `asset:NAME` becomes the folder of a shipped model."""
    path = shipped_folder(path)
    if not Path(path).is_dir() and not HUB_NAME.fullmatch(path):
        raise FileNotFoundError(f"model.{field}: no folder '{path}'")
    return path
