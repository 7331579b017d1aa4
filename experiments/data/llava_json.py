"""Your own data: a LLaVA-format JSON file and a folder of images and videos."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.data.samples import IMAGE_SLOT, SLOT, VIDEO_SLOT, Numbered, Picture, Sample, Split, fingerprint

_FROM = ("human", "gpt")
_KIND = {IMAGE_SLOT: "image", VIDEO_SLOT: "video"}


def _files(entry: dict[str, Any], kind: str, where: str) -> list[str]:
    """The paths under "image" or "video", which is absent, one path or a list of them."""
    given = entry.get(kind)
    paths = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(path, str) for path in paths):
        raise ValueError(f'{where}: "{kind}" is a path or a list of paths, found {str(given)[:80]}')
    return paths


def _entry(entry: Any, index: int, source: Path, folder: Path) -> dict[str, Any]:
    """An entry of the file, checked; "image" and "video" become lists, and a video's slot `<video>`."""
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
    files = {kind: _files(entry, kind, where) for kind in _KIND.values()}
    if files["video"] and not files["image"]:  # the released video data has `<image>` there
        turns = [turn | {"value": turn["value"].replace(IMAGE_SLOT, VIDEO_SLOT)} for turn in turns]
    for slot, kind in _KIND.items():
        slots = sum(turn["value"].count(slot) for turn in turns[::2])
        if slots != len(files[kind]):
            raise ValueError(
                f"{where}: its questions need one {slot} for each of its {len(files[kind])} {kind}s, found {slots}"
            )
    for i, turn in enumerate(turns[1::2]):
        if found := SLOT.search(turn["value"]):
            raise ValueError(f"{where}, turn {2 * i + 1}: an answer holds {found[0]}, and pictures belong to questions")
    for kind, paths in files.items():
        for path in paths:
            if not (folder / path).is_file():
                raise FileNotFoundError(f"{where}: no {kind} '{folder / path}'")
    kinds = entry.get("kinds", ["question"] * (len(turns) // 2))
    if not isinstance(kinds, list) or len(kinds) != len(turns) // 2:
        raise ValueError(f'{where}: "kinds" names the type of each question, and there are {len(turns) // 2} questions')
    return entry | files | {"conversations": turns, "kinds": kinds}


def _image(path: Path) -> Image.Image:
    from llava_mini.images import to_rgb  # takes seconds, which data that is only fingerprinted need not

    return to_rgb(path)


def _video(path: Path, frames: int) -> Picture:
    from llava_mini.video import Video

    return Video(path, frames=frames)


class JsonSamples(Sequence[Sample]):
    """Checked entries; pictures are read when they are asked for."""

    def __init__(self, entries: list[dict[str, Any]], folder: Path, frames: int) -> None:
        self.entries, self.folder, self.frames = entries, folder, frames
        self.first_image = [0, *accumulate(len(entry["image"]) for entry in entries)]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        entry = self.entries[index]
        turns = entry["conversations"]
        readers: dict[str, Iterator[Callable[[], Picture]]] = {
            IMAGE_SLOT: (
                Numbered(number, partial(_image, self.folder / path))
                for number, path in enumerate(entry["image"], self.first_image[index])
            ),
            VIDEO_SLOT: (partial(_video, self.folder / path, self.frames) for path in entry["video"]),
        }
        slots = [slot for turn in turns for slot in SLOT.findall(turn["value"])]
        return Sample(str(entry.get("id", index)), tuple(next(readers[slot]) for slot in slots), turns, entry["kinds"])


def load_llava_json(path: str, images: str, split: str, count: int = 0, frames: int = 8) -> Split:
    """The first `count` conversations of a LLaVA-format JSON file, or all for 0.

    Each entry has "conversations" (turns from "human" and "gpt", alternating), an "image" or a "video" (a path below
    `images`, or a list of them) unless it is text alone, and may have an "id" and "kinds", the type of each of its
    questions. The questions hold `<image>` or `<video>` where the pictures are; beside a "video" alone, `<image>` means
    the video. Of each video `frames` are taken, spread evenly. The fingerprint covers the file's bytes and the names and
    sizes of its pictures.

    Raises:
        FileNotFoundError: if the file, the folder or a picture is missing.
        ValueError: if the file is no JSON, an entry is no conversation, its slots are not those of its pictures, or (when
            it is read) a picture is none.
    """
    source, folder = Path(path), Path(images)
    if not source.is_file():
        raise FileNotFoundError(f"data.path: no file '{source}'")
    if not folder.is_dir():
        raise FileNotFoundError(f"data.images: no folder '{folder}'")
    if frames < 1:
        raise ValueError(f"data.frames: {frames} frames of a video show nothing; use 1 or more")
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
    sizes = {kind: [(p, (folder / p).stat().st_size) for e in checked for p in e[kind]] for kind in _KIND.values()}
    videos = [sizes["video"], frames] if sizes["video"] else []
    whole = fingerprint(text, sizes["image"], count, *videos)
    return Split(split, JsonSamples(checked, folder, frames), whole, len(sizes["image"]))
