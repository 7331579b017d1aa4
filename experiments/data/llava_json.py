"""The reader of LLaVA-format JSON files with a folder of images and videos."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.data.conversation_forms import parse_entries, to_llava_form
from experiments.data.samples import (
    IMAGE_PLACEHOLDER,
    PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    IndexedImageLoader,
    Sample,
    Split,
    VisualInput,
    fingerprint,
)

_SPEAKERS = ("human", "gpt")
_MEDIA = {IMAGE_PLACEHOLDER: "image", VIDEO_PLACEHOLDER: "video"}


class LlavaJsonSamples(Sequence[Sample]):
    """Samples of checked JSON entries. Images and videos are read when a sample's visual inputs are accessed.

    Args:
        entries: Entries as `_check_entry` returns them.
        folder: The folder that the paths of the entries are relative to.
        frames: How many frames of each video the model gets, evenly spaced.
    """

    def __init__(self, entries: list[dict[str, Any]], folder: Path, frames: int) -> None:
        self.entries, self.folder, self.frames = entries, folder, frames
        self.first_image = [0, *accumulate(len(entry["image"]) for entry in entries)]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        entry = self.entries[index]
        turns = entry["conversations"]
        loaders: dict[str, Iterator[Callable[[], VisualInput]]] = {
            IMAGE_PLACEHOLDER: (
                IndexedImageLoader(number, partial(_read_image, self.folder / path))
                for number, path in enumerate(entry["image"], self.first_image[index])
            ),
            VIDEO_PLACEHOLDER: (partial(_open_video, self.folder / path, self.frames) for path in entry["video"]),
        }
        placeholders = [placeholder for turn in turns for placeholder in PLACEHOLDER.findall(turn["value"])]
        return Sample(
            str(entry.get("id", index)),
            tuple(next(loaders[placeholder]) for placeholder in placeholders),
            turns,
            entry["kinds"],
        )


def load_llava_json(path: str, images: str, split: str, count: int = 0, frames: int = 8) -> Split:
    """Load the first `count` conversations of a LLaVA-format file, JSON or JSON Lines.

    Other published forms are accepted too (`experiments.data.conversation_forms`). Each entry has "conversations": alternating turns from "human" and "gpt". It has an "image" or a "video" (a path
    below `images`, or a list of paths) unless it is text alone. It may have an "id", and "kinds", the type of each of its
    questions. The questions hold `<image>` or `<video>` where the images and videos belong. In an entry with only a
    "video", `<image>` means the video.

    Args:
        path: The file.
        images: The folder of images and videos.
        split: Name of the split.
        count: How many conversations; 0 for all.
        frames: How many frames of each video the model gets, evenly spaced.

    Returns:
        The split. Its fingerprint covers the file's bytes and the names and sizes of images and videos.

    Raises:
        FileNotFoundError: If the file, the folder, an image or a video is missing.
        ValueError: If the file is not JSON, an entry is not a conversation, or its placeholders do not match its images
            and videos. A file that is not an image raises when it is read.
    """
    source, folder = Path(path), Path(images)
    if not source.is_file():
        raise FileNotFoundError(f"data.path: no file '{source}'")
    if not folder.is_dir():
        raise FileNotFoundError(f"data.images: no folder '{folder}'")
    if frames < 1:
        raise ValueError(f"data.frames: must be at least 1 frame of each video, found {frames}")
    text = source.read_bytes()
    entries = parse_entries(text, source)
    checked = [_check_entry(entry, i, source, folder) for i, entry in enumerate(entries[: count or None])]
    sizes = {kind: [(p, (folder / p).stat().st_size) for e in checked for p in e[kind]] for kind in _MEDIA.values()}
    videos = [sizes["video"], frames] if sizes["video"] else []
    digest = fingerprint(text, sizes["image"], count, *videos)
    return Split(split, LlavaJsonSamples(checked, folder, frames), digest, len(sizes["image"]))


def _check_entry(entry: Any, index: int, source: Path, folder: Path) -> dict[str, Any]:
    """Return a checked copy of an entry: "image" and "video" as lists, and `<video>` for each video."""
    where = f"'{source}', entry {index}"
    entry = to_llava_form(entry, where)
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise ValueError(f'{where}: expected an object with a list of "conversations", found {str(entry)[:80]}')
    turns = entry["conversations"]
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") != _SPEAKERS[i % 2] or not isinstance(turn.get("value"), str):
            raise ValueError(
                f'{where}, turn {i}: expected {{"from": "{_SPEAKERS[i % 2]}", "value": text}}, found {str(turn)[:80]}'
            )
    if not turns or len(turns) % 2:
        raise ValueError(f"{where}: a conversation needs an answer to each question, found {len(turns)} turns")
    files = {kind: _media_paths(entry, kind, where) for kind in _MEDIA.values()}
    if files["video"] and not files["image"]:  # the released video data has `<image>` there
        turns = [turn | {"value": turn["value"].replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)} for turn in turns]
    for placeholder, kind in _MEDIA.items():
        found = sum(turn["value"].count(placeholder) for turn in turns[::2])
        if found != len(files[kind]):
            raise ValueError(
                f"{where}: its questions need one {placeholder} for each of its {len(files[kind])} {kind}s, found {found}"
            )
    for i, turn in enumerate(turns[1::2]):
        if match := PLACEHOLDER.search(turn["value"]):
            raise ValueError(
                f"{where}, turn {2 * i + 1}: an answer holds {match[0]}; images and videos belong to questions"
            )
    if not any(turn["value"].strip() for turn in turns[1::2]):
        raise ValueError(f"{where}: all its answers are empty, so that nothing can be trained on or measured")
    for kind, paths in files.items():
        for path in paths:
            if not (folder / path).is_file():
                raise FileNotFoundError(f"{where}: no {kind} '{folder / path}'")
    question_types = entry.get("kinds", ["question"] * (len(turns) // 2))
    if not isinstance(question_types, list) or len(question_types) != len(turns) // 2:
        raise ValueError(
            f'{where}: "kinds" must list the type of each of its {len(turns) // 2} questions, '
            f"found {str(question_types)[:80]}"
        )
    return entry | files | {"conversations": turns, "kinds": question_types}


def _media_paths(entry: dict[str, Any], kind: str, where: str) -> list[str]:
    """Return the paths under "image" or "video", which may be absent, one path or a list of paths."""
    value = entry.get(kind)
    paths = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) for path in paths):
        raise ValueError(f'{where}: "{kind}" must be a path or a list of paths, found {str(value)[:80]}')
    return paths


def _read_image(path: Path) -> Image.Image:
    # Importing llava_mini takes seconds, and computing a fingerprint does not need it.
    from llava_mini.images import to_rgb

    return to_rgb(path)


def _open_video(path: Path, frames: int) -> VisualInput:
    from llava_mini.video import Video

    return Video(path, frames=frames)
