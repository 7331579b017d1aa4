"""Checks of the files in a checkpoint folder, so that an error names the damaged one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import GenerationConfig

# `transformers.AutoImageProcessor` of version 5.17 needs torchvision; the class itself does not.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .checkpoint import find_weights, read_json
from .configuration import LlavaMiniConfig

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
PROCESSOR_FILES = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "chat_template.jinja",
)


def check_json_files(folder: Path, files: tuple[str, ...]) -> None:
    """Check that those of `files` that a checkpoint folder has and that end in .json hold a JSON object.

    transformers raises errors that do not name the file, and ignores a generation_config.json that it cannot parse.

    Raises:
        ValueError: If a file is not valid JSON or holds another value than an object.
    """
    for file in files:
        if file.endswith(".json") and (folder / file).exists():
            read_json(folder / file)


@contextmanager
def name_damaged_file(
    name: str | os.PathLike[str] | None, files: tuple[str, ...], subfolder: str = ""
) -> Iterator[None]:
    """Check the JSON files of a checkpoint; if reading it fails in the block, find the file that is to blame.

    Args:
        name: A checkpoint folder. The name of a model on the hub is not checked, nor is None, which stands for weights
            that are given themselves.
        files: `MODEL_FILES`, `PROCESSOR_FILES` or both.
        subfolder: Folder within the folder that holds them.

    Raises:
        ValueError: If a file is damaged or holds a value that its reader rejects. An error with another cause than a
            file keeps its type and message.
    """
    if name is None:
        yield
        return
    folder = Path(name, subfolder)
    check_json_files(folder, files)
    try:
        yield
    except Exception as error:  # the tokenizers library raises no narrower class
        for file, read in _READERS.items():
            if file in files and (folder / file).is_file():
                try:
                    read(folder)
                except Exception as reason:
                    one_line = " ".join(str(reason).split()) or type(reason).__name__
                    raise ValueError(f"{folder / file} cannot be read: {one_line}") from error
        if set(MODEL_FILES) <= set(files):
            find_weights(folder)  # names a damaged file itself
        raise


def _read_config(folder: Path) -> None:
    values = read_json(folder / "config.json")
    if values.get("model_type") in ("llava", LlavaMiniConfig.model_type):
        LlavaMiniConfig.from_dict(values)


def _read_image_processor(folder: Path) -> None:
    if "image_processor" in read_json(folder / "processor_config.json"):
        AutoImageProcessor.from_pretrained(folder, local_files_only=True)


# Readers of files that can be wrong although they are valid JSON, or that are not JSON.
_READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": _read_config,
    "generation_config.json": lambda folder: GenerationConfig.from_pretrained(folder, local_files_only=True),
    "tokenizer.json": lambda folder: Tokenizer.from_file(str(folder / "tokenizer.json")),
    "chat_template.jinja": lambda folder: (folder / "chat_template.jinja").read_text(encoding="utf-8"),
    "processor_config.json": _read_image_processor,
    "preprocessor_config.json": lambda folder: AutoImageProcessor.from_pretrained(folder, local_files_only=True),
}


__all__ = ["MODEL_FILES", "PROCESSOR_FILES", "check_json_files", "name_damaged_file"]
