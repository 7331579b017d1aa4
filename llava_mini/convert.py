"""Conversion of a checkpoint in the layout of the official code (ictnlp/LLaVA-Mini, commit 47da113) to ours."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Column, Table
from safetensors import SafetensorError
from transformers import (
    AddedToken,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from .chat_templates import LLAMA_3_TEMPLATE, VICUNA_TEMPLATE
from .checkpoint import Weight, find_weights, read_json, write_weights
from .configuration import PRESETS, LlavaMiniConfig
from .modeling import LlavaMiniForConditionalGeneration
from .processing import LlavaMiniProcessor

log = logging.getLogger(__name__)

IMAGE = "<image>"
# Buffers that older versions of transformers saved and that are computed anew.
IGNORED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


class Part(NamedTuple):
    """A part of the model, and what its weights' names start with in our classes, officially, and on our disk, which
    is as on that of LLaVA."""

    title: str
    ours: str
    official: str
    disk: str


TOWER = "model.vision_tower.vision_tower.vision_model."
PARTS = (
    Part("language model", "model.language_model.", "model.", "language_model.model."),
    Part("language model", "lm_head.", "lm_head.", "language_model.lm_head."),
    Part(
        "projector", "model.multi_modal_projector.linear_1.", "model.mm_projector.0.", "multi_modal_projector.linear_1."
    ),
    Part(
        "projector", "model.multi_modal_projector.linear_2.", "model.mm_projector.2.", "multi_modal_projector.linear_2."
    ),
    Part("compressor", "model.compressor.", "model.compressor.", "model.compressor."),
    Part("pre-fusion", "model.prefusion.layers.", "model.prefusion_layers.", "model.prefusion.layers."),
    Part("vision tower", "model.vision_tower.", TOWER, "vision_tower."),
)


def convert_official(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], vision_tower: str | os.PathLike[str] | None = None
) -> dict[str, int]:
    """Writes the official checkpoint `src` as a folder `dst` for `LlavaMiniForConditionalGeneration.from_pretrained`
    and, where `src` has a tokenizer, for `LlavaMiniProcessor.from_pretrained`.

    Weights keep their dtype and are read and written file by file, so no more than one file of `dst`, a gigabyte, or
    one tensor is held at a time. `dst` appears when it is complete.

    Args:
        vision_tower: Folder of the CLIPVisionModel, or CLIPModel, to see with. By default the one that
            `mm_vision_tower` in config.json names, or else what the checkpoint itself holds of it.

    Returns:
        Number of parameters by part of the model.

    Raises:
        FileExistsError: If `dst` is anything but an empty folder.
        FileNotFoundError: If `src` lacks its config.json or weights, or no weights of a vision tower are found.
        ValueError: If `src` is not in that layout: the line lists the weights that are missing, unexpected, of another
            shape or of a dtype other than float16, bfloat16 and float32; or names the file that cannot be read, or the
            field of config.json that our model has no equivalent for.
    """
    src, dst = Path(src), Path(dst)
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise FileExistsError(f"{dst} exists and is no empty folder: name another, or remove it")
    official, tower, config = _read_config(src, vision_tower)
    tokenizer = _read_tokenizer(src, config)
    processor = None
    if tokenizer is not None:
        config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE)
        processor = _processor(official, config, tower, tokenizer)
    slots = _slots(config)
    weights = find_weights(src)
    if not weights:
        raise FileNotFoundError(f"{src} holds no model.safetensors or pytorch_model.bin, whole or with an index")
    weights = _with_tower(weights, tower)
    if not any(name.startswith(TOWER) for name in weights):
        raise FileNotFoundError(_no_tower(src, official))
    plan = _match(src, slots, weights)
    config.dtype = weights["model.embed_tokens.weight"].dtype

    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}-", dir=dst.parent) as aside:
        out = Path(aside, "model")  # the folder above is for its maker's eyes only, and stays so
        out.mkdir()
        write_weights(plan, out)
        config.architectures = [LlavaMiniForConditionalGeneration.__name__]
        config.save_pretrained(out)
        _write_generation_config(src, config, out)
        if processor is not None:
            processor.save_pretrained(out)
        os.replace(out, dst)
    if processor is None:
        log.info("%s has no tokenizer: weights and configuration are written, a processor is not", src)
    return _counts(slots)


def check_official(src: str | os.PathLike[str], vision_tower: str | os.PathLike[str] | None = None) -> dict[str, int]:
    """What [`convert_official`] would return or raise, as far as the files at hand tell, without writing anything.

    config.json alone is enough to count the parameters. Where there is an index, the names of the weights are checked
    too, and where there are weights, their shapes; their numbers are not read.
    """
    src = Path(src)
    official, tower, config = _read_config(src, vision_tower)
    slots = _slots(config)
    weights = _with_tower(find_weights(src, partial=True), tower)
    has_tower = any(name.startswith(TOWER) for name in weights)
    if not has_tower:
        log.info("%s", _no_tower(src, official))
    if any(not name.startswith(TOWER) for name in weights):
        _match(src, {name: slot for name, slot in slots.items() if has_tower or not name.startswith(TOWER)}, weights)
    else:
        log.info("%s holds no weights: the parameters are counted from its config.json", src)
    return _counts(slots)


# Configuration


def _read_config(
    src: Path, vision_tower: str | os.PathLike[str] | None
) -> tuple[dict[str, Any], Path | None, LlavaMiniConfig]:
    """The official config.json, the folder of the vision tower if there is one, and our configuration."""
    path = src / "config.json"
    official = read_json(path)
    known = {
        "model_type": ("llava_mini_llama",),
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch", None),
        "mm_use_im_start_end": (False, None),
    }
    for name, values in known.items():
        if official.get(name) not in values:
            raise ValueError(f"{path}: {name} is {official.get(name)!r}, and only {values[0]!r} can be converted")
    if "compressor_size" not in official:
        raise ValueError(f"{path} has no compressor_size: the official code makes plain LLaVA of this, not LLaVA-Mini")
    if "mm_vision_select_layer" not in official:
        raise ValueError(f"{path} has no mm_vision_select_layer")

    tower = _find_tower(src, official, vision_tower)
    if tower is not None:
        vision = read_json(tower / "config.json")
        vision = vision.get("vision_config", vision)
        if vision.get("model_type") not in ("clip", "clip_vision_model"):
            raise ValueError(
                f"{tower / 'config.json'}: model_type is {vision.get('model_type')!r}; LLaVA-Mini sees with CLIP"
            )
    elif str(official.get("mm_vision_tower")).endswith("clip-vit-large-patch14-336"):
        vision = CLIP_L_336
    else:
        raise FileNotFoundError(_no_tower(src, official))
    keeps_class_token = official.get("mm_vision_select_feature") == "cls_patch"
    try:
        text_config = LlamaConfig(**_fields_of(LlamaConfig, official))
        config = LlavaMiniConfig(
            vision_config=CLIPVisionConfig(**_fields_of(CLIPVisionConfig, vision)),
            text_config=text_config,
            image_token_index=text_config.vocab_size,
            vision_feature_layer=official["mm_vision_select_layer"],
            vision_feature_select_strategy="full" if keeps_class_token else "default",
            tie_word_embeddings=text_config.tie_word_embeddings,
            compressor_size=official["compressor_size"],
            prefusion_layers=official.get("prefusion_layer_num", 4),
            **PRESETS["code"],
        )
    except StrictDataclassError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    return official, tower, config


def _fields_of(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    """Those of the `values` that are an architecture's own, among them the names that rope parameters used to have."""
    own = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
    return {name: value for name, value in values.items() if name in own | {"rope_theta", "rope_scaling"}}


def _find_tower(src: Path, official: dict[str, Any], vision_tower: str | os.PathLike[str] | None) -> Path | None:
    if vision_tower is not None:
        if not Path(vision_tower).is_dir():
            raise FileNotFoundError(f"the vision tower {vision_tower} is no folder")
        return Path(vision_tower)
    name = official.get("mm_vision_tower")
    candidates = [Path(name), src / name] if name else []
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def _no_tower(src: Path, official: dict[str, Any]) -> str:
    return (
        f"no weights of a vision tower: name its folder (--vision-tower), have mm_vision_tower in {src / 'config.json'} "
        f"name it (it is {official.get('mm_vision_tower')!r}), or use a checkpoint with model.vision_tower.* weights"
    )


def _write_generation_config(src: Path, config: LlavaMiniConfig, out: Path) -> None:
    if (src / "generation_config.json").is_file():
        shutil.copyfile(src / "generation_config.json", out / "generation_config.json")
        return
    text = config.get_text_config()
    GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    ).save_pretrained(out)


# Tokenizer and processor


def _read_tokenizer(src: Path, config: LlavaMiniConfig) -> Any:
    """The tokenizer with `<image>` as a new token after its last, and our chat template; None if there is none."""
    if not any((src / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return None
    # The configuration is given because the one in the folder is of a model_type that transformers does not know.
    try:
        tokenizer = AutoTokenizer.from_pretrained(src, config=config.get_text_config(), local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ValueError(f"the tokenizer in {src} cannot be read: {' '.join(str(error).split())}") from error
    vocabulary = tokenizer.get_vocab()
    if IMAGE not in vocabulary:
        tokenizer.add_tokens(AddedToken(IMAGE, special=True, normalized=False), special_tokens=True)
    llama_3 = {"<|start_header_id|>", "<|eot_id|>"} <= vocabulary.keys()
    tokenizer.chat_template = LLAMA_3_TEMPLATE if llama_3 else VICUNA_TEMPLATE
    if tokenizer.pad_token is None and "<|finetune_right_pad_id|>" in vocabulary:
        tokenizer.pad_token = "<|finetune_right_pad_id|>"  # as the official code does
    return tokenizer


def _processor(
    official: dict[str, Any], config: LlavaMiniConfig, tower: Path | None, tokenizer: Any
) -> LlavaMiniProcessor:
    vision = config.vision_config
    if tower is not None and (tower / "preprocessor_config.json").is_file():
        image_processor = CLIPImageProcessorPil.from_pretrained(tower)
    else:
        side = vision.image_size
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return LlavaMiniProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=1,  # CLIP's class token
        num_visual_tokens=config.compressor_size**2,
        tiles=official.get("resolution_ratio") or 1,
        pad_to_square=official.get("image_aspect_ratio") == "pad",
    )


# Weights


@dataclass(frozen=True)
class Slot:
    """A parameter of our model: the part it belongs to, its name on disk, its shape."""

    part: str
    disk: str
    shape: tuple[int, ...]


def _slots(config: LlavaMiniConfig) -> dict[str, Slot]:
    """Our model's parameters under their official names."""
    with torch.device("meta"):
        model = LlavaMiniForConditionalGeneration(config)
    slots = {}
    for name, parameter in model.named_parameters():
        part = next(part for part in PARTS if name.startswith(part.ours))
        rest = name.removeprefix(part.ours)
        slots[part.official + rest] = Slot(part.title, part.disk + rest, tuple(parameter.shape))
    return slots


def _counts(slots: dict[str, Slot]) -> dict[str, int]:
    counts = {part.title: 0 for part in PARTS}
    for slot in slots.values():
        counts[slot.part] += math.prod(slot.shape)
    return counts


def _with_tower(weights: dict[str, Weight], tower: Path | None) -> dict[str, Weight]:
    """The checkpoint's weights with those of the tower's folder, where there are any, in the place of its own."""
    seen = {} if tower is None else find_weights(tower)
    if not seen:
        return weights
    # A whole CLIPModel has its text half beside "vision_model."; newer transformers save the tower without a prefix.
    prefix = "vision_model." if any(key.startswith("vision_model.") for key in seen) else ""
    seen = {TOWER + key.removeprefix(prefix): weight for key, weight in seen.items() if key.startswith(prefix)}
    return {name: weight for name, weight in weights.items() if not name.startswith("model.vision_tower.")} | seen


def _match(src: Path, slots: dict[str, Slot], weights: dict[str, Weight]) -> dict[str, Weight]:
    """The weights by their names on our disk; ValueError if they are not exactly those of the `slots`."""
    plan: dict[str, Weight] = {}
    faults: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": [], "of another dtype": []}
    for name, weight in weights.items():
        slot = slots.get(name)
        tied_head = name == "lm_head.weight" and slot is None
        if IGNORED.search(name) or tied_head:
            continue
        if slot is None:
            faults["unexpected"].append(f"{name} {list(weight.shape or ())}")
        elif weight.shape not in (None, slot.shape):
            faults["misshapen"].append(f"{name} {list(weight.shape or ())}, not {list(slot.shape)}")
        elif weight.dtype is None and weight.shape is not None:
            faults["of another dtype"].append(f"{name} in {weight.file.name}")
        else:
            plan[slot.disk] = weight
    faults["missing"] = [f"{name} {list(slot.shape)}" for name, slot in slots.items() if name not in weights]
    lists = [
        f"{len(names)} {fault} ({'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''})"
        for fault, names in faults.items()
        if names
    ]
    if lists:
        raise ValueError(f"the weights of {src} are not those of its config.json: {', '.join(lists)}")
    return plan


# Command line


def main(argv: Sequence[str] | None = None) -> int:
    """Converts, or checks, and prints the number of parameters of each part. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava_mini.convert", description=__doc__)
    parser.add_argument("src", type=Path, help="folder of the official checkpoint")
    parser.add_argument("dst", type=Path, nargs="?", help="folder to write; not needed with --dry-run")
    parser.add_argument("--vision-tower", type=Path, metavar="DIR", help="folder of the CLIP model to see with")
    parser.add_argument("--dry-run", action="store_true", help="check names and shapes, write nothing")
    arguments = parser.parse_args(argv)
    if arguments.dst is None and not arguments.dry_run:
        parser.error("DST is needed, or --dry-run")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.dry_run:
            counts = check_official(arguments.src, arguments.vision_tower)
        else:
            counts = convert_official(arguments.src, arguments.dst, arguments.vision_tower)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    table = Table("part", Column("parameters", justify="right"))
    for part, count in counts.items():
        table.add_row(part, f"{count:,}")
    table.add_section()
    table.add_row("without the vision tower", f"{sum(counts.values()) - counts['vision tower']:,}")
    table.add_row("all", f"{sum(counts.values()):,}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())


__all__ = ["check_official", "convert_official"]
