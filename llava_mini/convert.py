"""Convert a checkpoint in the layout of the official code (ictnlp/LLaVA-Mini, commit 47da113) to ours."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from safetensors import SafetensorError

from .checkpoint import find_weights, write_weights
from .modeling import LlavaMiniForConditionalGeneration
from .official_config import (
    IMAGE_TOKEN,
    build_processor,
    describe_missing_vision_tower,
    read_config,
    read_tokenizer,
    write_generation_config,
)
from .official_weights import (
    OFFICIAL_VISION_TOWER,
    count_parameters,
    list_parameters,
    match_weights,
    replace_vision_tower,
)

log = logging.getLogger(__name__)


def convert_official(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], vision_tower: str | os.PathLike[str] | None = None
) -> dict[str, int]:
    """Convert the official checkpoint in `src` to a folder `dst` in transformers' layout.

    `LlavaMiniForConditionalGeneration.from_pretrained` loads that folder. If `src` has a tokenizer, so does
    `LlavaMiniProcessor.from_pretrained`.

    Weights keep their dtype. They are read and written file by file, so memory holds at most one output file, a
    gigabyte, or one larger tensor. `dst` appears only when it is complete.

    Args:
        src (`str` or `os.PathLike`):
            Folder of the official checkpoint.
        dst (`str` or `os.PathLike`):
            Folder to write.
        vision_tower (`str` or `os.PathLike`, *optional*):
            Folder of the CLIPVisionModel or CLIPModel to use as vision tower. Defaults to the folder that
            `mm_vision_tower` in config.json names, or else to the vision tower's weights in the checkpoint itself.

    Returns:
        `dict[str, int]`: Number of parameters by part of the model.

    Raises:
        FileExistsError: If `dst` exists and is not an empty folder.
        FileNotFoundError: If `src` lacks its config.json or weights, or no weights of a vision tower are found.
        ValueError: If `src` is not in the official layout. The message lists the weights that are missing, unexpected,
            of another shape or of a dtype other than float16, bfloat16 and float32. Or it names the file that cannot be
            read, or the field of config.json that our model does not support.

    Example:
        >>> counts = convert_official("llava-mini-llama-3.1-8b", "llava-mini")  # doctest: +SKIP
        >>> LlavaMiniForConditionalGeneration.from_pretrained("llava-mini")  # doctest: +SKIP
    """
    src, dst = Path(src), Path(dst)
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())):
        raise FileExistsError(f"{dst} exists and is not an empty folder: name another one or remove it")
    official, vision_folder, config = read_config(src, vision_tower)
    tokenizer = read_tokenizer(src, config)
    processor = None
    if tokenizer is not None:
        config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        processor = build_processor(official, config, vision_folder, tokenizer)
    parameters = list_parameters(config)
    weights = find_weights(src)
    if not weights:
        raise FileNotFoundError(f"{src} holds no model.safetensors or pytorch_model.bin, whole or with an index")
    weights = replace_vision_tower(weights, vision_folder)
    if not any(name.startswith(OFFICIAL_VISION_TOWER) for name in weights):
        raise FileNotFoundError(describe_missing_vision_tower(src, official))
    plan = match_weights(src, parameters, weights)
    config.dtype = weights["model.embed_tokens.weight"].dtype

    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}-", dir=dst.parent) as temporary:
        out = Path(temporary, "model")  # not the temporary folder itself: only its owner may read that
        out.mkdir()
        write_weights(plan, out)
        config.architectures = [LlavaMiniForConditionalGeneration.__name__]
        config.save_pretrained(out)
        write_generation_config(src, config, out)
        if processor is not None:
            processor.save_pretrained(out)
        os.replace(out, dst)
    if processor is None:
        log.info("%s has no tokenizer: wrote weights and configuration, but no processor", src)
    return count_parameters(parameters)


def check_official(src: str | os.PathLike[str], vision_tower: str | os.PathLike[str] | None = None) -> dict[str, int]:
    """Check an official checkpoint as [`convert_official`] does, without writing anything.

    A config.json alone is enough to count the parameters. If there is an index, the names of the weights are checked,
    and if there are weights, their shapes. Weight values are not read.

    Args:
        src (`str` or `os.PathLike`): Folder of the official checkpoint.
        vision_tower (`str` or `os.PathLike`, *optional*): Folder of the vision tower; see [`convert_official`].

    Returns:
        `dict[str, int]`: Number of parameters by part of the model.

    Raises:
        FileNotFoundError, ValueError: As [`convert_official`], as far as the existing files show.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> fields = {"model_type": "llava_mini_llama", "mm_projector_type": "mlp2x_gelu", "compressor_size": 1}
        >>> fields |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2}
        >>> _ = Path("config.json").write_text(json.dumps(fields))
        >>> check_official(".")["compressor"]
        4204544
    """
    src = Path(src)
    official, vision_folder, config = read_config(src, vision_tower)
    parameters = list_parameters(config)
    weights = replace_vision_tower(find_weights(src, partial=True), vision_folder)
    has_vision_tower = any(name.startswith(OFFICIAL_VISION_TOWER) for name in weights)
    if not has_vision_tower:
        log.info("%s", describe_missing_vision_tower(src, official))
    if any(not name.startswith(OFFICIAL_VISION_TOWER) for name in weights):
        expected = {
            name: parameter
            for name, parameter in parameters.items()
            if has_vision_tower or not name.startswith(OFFICIAL_VISION_TOWER)
        }
        match_weights(src, expected, weights)
    else:
        log.info("%s holds no weights: parameters are counted from its config.json", src)
    return count_parameters(parameters)


def main(argv: Sequence[str] | None = None) -> int:
    """Convert or check a checkpoint, print the number of parameters of each part, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m llava_mini.convert", description=__doc__)
    parser.add_argument("src", type=Path, help="folder of the official checkpoint")
    parser.add_argument("dst", type=Path, nargs="?", help="folder to write; not needed with --dry-run")
    parser.add_argument(
        "--vision-tower", type=Path, metavar="DIR", help="folder of the CLIP model with the vision tower"
    )
    parser.add_argument("--dry-run", action="store_true", help="check names and shapes, write nothing")
    arguments = parser.parse_args(argv)
    if arguments.dst is None and not arguments.dry_run:
        parser.error("DST is missing: name the folder to write, or give --dry-run")
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


__all__ = ["check_official", "convert_official"]


if __name__ == "__main__":
    sys.exit(main())
