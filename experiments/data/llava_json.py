"""Your own data: a LLaVA-format JSON file and a folder of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from experiments.data.samples import IMAGE_SLOT, Sample, Split, fingerprint

_FROM = ("human", "gpt")


def open_image(path: Path) -> Image.Image:
    """An image as RGB.

    Raises:
        ValueError: if the file is no image, or a broken one.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"'{path}' cannot be read as an image: {str(error).splitlines()[0]}") from error


def _entry(entry: Any, index: int, source: Path, images: Path) -> dict[str, Any]:
    """An entry of the file, checked."""
    where = f"'{source}', entry {index}"
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise ValueError(f'{where}: not an object with a list of "conversations"')
    turns = entry["conversations"]
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") != _FROM[i % 2] or not isinstance(turn.get("value"), str):
            raise ValueError(
                f'{where}, turn {i}: expected {{"from": "{_FROM[i % 2]}", "value": text}}, found {str(turn)[:80]}'
            )
    if not turns or len(turns) % 2:
        raise ValueError(
            f"{where}: a conversation needs an answer to each question, and this one has {len(turns)} turns"
        )
    slots = sum(turn["value"].count(IMAGE_SLOT) for turn in turns)
    image = entry.get("image")
    if slots != (image is not None) or (slots and IMAGE_SLOT not in turns[0]["value"]):
        raise ValueError(
            f"{where}: needs one {IMAGE_SLOT} in its first turn if it has an image and none if not, found {slots}"
        )
    if image is not None and not (isinstance(image, str) and (images / image).is_file()):
        raise FileNotFoundError(f"{where}: no image '{images / str(image)}'")
    kinds = entry.get("kinds", ["question"] * (len(turns) // 2))
    if not isinstance(kinds, list) or len(kinds) != len(turns) // 2:
        raise ValueError(f'{where}: "kinds" names the type of each question, and there are {len(turns) // 2} questions')
    return entry | {"kinds": kinds}


class JsonSamples(Sequence[Sample]):
    """Checked entries; images are read when they are asked for."""

    def __init__(self, entries: list[dict[str, Any]], images: Path) -> None:
        self.entries, self.images = entries, images

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        entry = self.entries[index]
        load = partial(open_image, self.images / entry["image"]) if "image" in entry else None
        return Sample(str(entry.get("id", index)), load, entry["conversations"], entry["kinds"])


def load_llava_json(path: str, images: str, split: str, count: int = 0) -> Split:
    """The first `count` conversations of a LLaVA-format JSON file, or all for 0.

    Each entry has "conversations" (turns from "human" and "gpt", alternating), an "image" (a path below `images`) unless
    it is text alone, and may have an "id" and "kinds", the type of each of its questions. The fingerprint covers the
    file's bytes and the names and sizes of its images.

    Raises:
        FileNotFoundError: if the file, the folder or an image is missing.
        ValueError: if the file is no JSON, an entry is no conversation, or an image is none (when it is read).
    """
    source, folder = Path(path), Path(images)
    if not source.is_file():
        raise FileNotFoundError(f"data.path: no file '{source}'")
    if not folder.is_dir():
        raise FileNotFoundError(f"data.images: no folder '{folder}'")
    text = source.read_bytes()
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ValueError(f"'{source}' is not JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"'{source}': expected a list of conversations, found {type(entries).__name__ if entries else 'none'}"
        )
    checked = [_entry(entry, i, source, folder) for i, entry in enumerate(entries[: count or None])]
    sizes = [(e["image"], (folder / e["image"]).stat().st_size) for e in checked if "image" in e]
    return Split(split, JsonSamples(checked, folder), fingerprint(text, sizes, count))
