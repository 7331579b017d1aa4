"""The reader of LLaVA-format JSON files with folders of images and videos."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from experiments.data.annotators import annotators_answers, check_all_or_none
from experiments.data.bad_entries import BadEntry, EntryError, entry_name
from experiments.data.conversation_forms import parse_entries, to_llava_form
from experiments.data.file_shares import draw_entries
from experiments.data.media_files import MediaFile, find_faults
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
_KINDS: dict[str, Literal["image", "video"]] = {IMAGE_PLACEHOLDER: "image", VIDEO_PLACEHOLDER: "video"}


class LlavaJsonSamples(Sequence[Sample]):
    """Samples of checked entries. Images and videos are read when a sample's visual inputs are accessed.

    Args:
        entries: Entries as `check_entry` returns them, with "id", "folder", where their paths begin, and "where", their
            name in errors.
        frames: How many frames of each video the model gets, evenly spaced.
    """

    def __init__(self, entries: list[dict[str, Any]], frames: int) -> None:
        self.entries, self.frames = entries, frames
        paths = dict.fromkeys(entry["folder"] / path for entry in entries for path in entry["image"])
        self.image_indices = {path: index for index, path in enumerate(paths)}

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        entry = self.entries[index]
        turns = entry["conversations"]
        loaders: dict[str, Iterator[Callable[[], VisualInput]]] = {
            IMAGE_PLACEHOLDER: (
                IndexedImageLoader(self.image_indices[file.path], file)  # type: ignore[arg-type]
                for file in _files(entry, "image", self.frames)
            ),
            VIDEO_PLACEHOLDER: _files(entry, "video", self.frames),
        }
        placeholders = [placeholder for turn in turns for placeholder in PLACEHOLDER.findall(turn["value"])]
        return Sample(
            entry["id"],
            tuple(next(loaders[placeholder]) for placeholder in placeholders),
            turns,
            entry["kinds"],
            entry["system"],
            entry["answers"],
        )

    def media(self) -> list[list[str]]:
        """Return what ties each entry to others: the paths of its images and videos, and its own place in its file."""
        return [
            [entry["where"], *(str(entry["folder"] / path) for kind in _KINDS.values() for path in entry[kind])]
            for entry in self.entries
        ]


def load_llava_json(
    path: str | Sequence[str],
    images: str | Sequence[str],
    split: str,
    count: int = 0,
    frames: int = 8,
    shares: Sequence[float] = (),
    seed: int = 0,
    bad: str = "stop",
    cache: Path | None = None,
    annotators: bool = False,
) -> Split:
    """Load the first `count` conversations of LLaVA-format files, JSON or JSON Lines.

    Other published forms are accepted too (`experiments.data.conversation_forms`). Each entry has "conversations":
    alternating turns from "human" and "gpt", after a system turn if there is one. It has an "image" or a "video" (a path
    below `images`, or a list of paths) unless it is text alone. A video may be a folder of its frames. An entry may have an
    "id", and "kinds", the type of each of its questions. The questions hold `<image>` or `<video>` where the images and
    videos belong. In an entry with only a "video", `<image>` means the video.

    Args:
        path: The file, or several.
        images: The folder of images and videos, for all files or one for each.
        split: Name of the split.
        count: How many conversations; 0 for all.
        frames: How many frames of each video the model gets, evenly spaced.
        shares: How often each file's entries are taken (`experiments.data.file_shares`); empty for once.
        seed: Seed of the shares.
        bad: "stop" raises at the first entry that cannot be used, as far as this is known without decoding images.
            "skip" decodes all images and videos, and leaves out every entry that cannot be used.
        cache: Folder that keeps which files could be decoded.
        annotators: Whether "answers", ten annotators' answers to each question, are read.

    Returns:
        The split. Its fingerprint covers the bytes of the files, the names and sizes of images and videos, and the
        entries that were left out.

    Raises:
        FileNotFoundError: If a file or a folder of images is missing.
        ValueError: If a file is not JSON, an entry cannot be used, or none is left. A file that is not an image raises
            when it is read, unless `bad` is "skip".

    Example:
        >>> turns = '[{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]'
        >>> _ = Path("questions.json").write_text('[{"id": 7, "conversations": ' + turns + "}]")
        >>> split = load_llava_json("questions.json", images=".", split="test")
        >>> split.samples[0].id, split.samples[0].questions
        ('7', ['Why?'])
    """
    files = [Path(file) for file in _as_list(path)]
    folders = _one_for_each("data.images", [Path(folder) for folder in _as_list(images)], files)
    shares = _one_for_each("data.shares", list(shares) or [1.0], files)
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"data.path: no file '{file}'")
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"data.images: no folder '{folder}'")
    if frames < 1:
        raise ValueError(f"data.frames: must be at least 1 frame of each video, found {frames}")
    texts = [file.read_bytes() for file in files]
    parsed = [parse_entries(text, file) for text, file in zip(texts, files, strict=True)]
    drawn = draw_entries([len(entries) for entries in parsed], shares, seed)[: count or None]
    if not drawn:
        raise ValueError(f"data.shares: {shares} draw no entry of {', '.join(map(str, files))}")
    checked: dict[tuple[int, int], dict[str, Any] | BadEntry] = {}
    for source, number in dict.fromkeys(drawn):
        entry = checked[source, number] = _checked_or_bad(
            parsed[source][number], files[source], number, folders[source], split != "train", annotators
        )
        if isinstance(entry, BadEntry) and bad == "stop":
            raise ValueError(f"{entry}; data.bad=skip leaves such entries out")
    if bad == "skip":
        _mark_faults(checked, frames, cache)
    kept = [entry for key in drawn if not isinstance(entry := checked[key], BadEntry)]
    skipped = {key: entry for key in sorted(checked) if isinstance(entry := checked[key], BadEntry)}
    if not kept:
        raise ValueError(
            f"data.bad: of {len(checked)} entries none can be used; the first: {next(iter(skipped.values()))}"
        )
    check_all_or_none(kept)
    samples = LlavaJsonSamples(kept, frames)
    return Split(
        split,
        samples,
        _fingerprint(texts, kept, count, frames, [shares, seed], list(skipped)),
        len(samples.image_indices),
        tuple(skipped.values()) if bad == "skip" else None,
        tuple(samples.image_indices),
    )


def _as_list(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _one_for_each(setting: str, values: list[Any], files: Sequence[Path]) -> list[Any]:
    """Return a value for each file; one alone holds for all."""
    if len(values) not in (1, len(files)):
        raise ValueError(f"{setting}: must be one, or one for each of the {len(files)} files, found {len(values)}")
    return values * len(files) if len(values) == 1 else values


def _checked_or_bad(
    entry: Any, file: Path, number: int, folder: Path, is_measured: bool, annotators: bool
) -> dict[str, Any] | BadEntry:
    given = entry.get("id") if isinstance(entry, dict) else None
    name = None if given is None else str(given)
    origin: dict[str, Any] = {"file": str(file), "entry": number, "id": name}
    try:
        checked = check_entry(entry, folder, is_measured, annotators)
    except EntryError as error:
        return BadEntry(**origin, path=error.path, reason=str(error))
    return checked | {"id": name or str(number), "where": entry_name(**origin), "origin": origin, "folder": folder}


def _mark_faults(checked: dict[tuple[int, int], dict[str, Any] | BadEntry], frames: int, cache: Path | None) -> None:
    """Replace, in place, the entries whose images or videos cannot be decoded."""
    files = [
        (key, path, file)
        for key, entry in checked.items()
        if not isinstance(entry, BadEntry)
        for kind in _KINDS.values()
        for path, file in zip(entry[kind], _files(entry, kind, frames), strict=True)
    ]
    faults = find_faults([file for _, _, file in files], cache)
    for key, path, file in files:
        entry = checked[key]
        if file.path in faults and not isinstance(entry, BadEntry):
            checked[key] = BadEntry(**entry["origin"], path=path, reason=faults[file.path])


def _fingerprint(
    texts: list[bytes],
    entries: list[dict[str, Any]],
    count: int,
    frames: int,
    draw: list[Any],
    skipped: list[tuple[int, int]],
) -> str:
    sizes = {
        kind: [size for e in entries for size in zip(e[kind], e["sizes"][kind], strict=True)]
        for kind in _KINDS.values()
    }
    videos = [sizes["video"], frames] if sizes["video"] else []
    shares = draw if draw[0] != [1.0] else []
    return fingerprint(*texts, sizes["image"], count, *videos, *shares, *([skipped] if skipped else []))


def _files(entry: dict[str, Any], kind: Literal["image", "video"], frames: int) -> Iterator[MediaFile]:
    """Yield the images or videos of a checked entry."""
    return (MediaFile(entry["folder"] / path, kind, entry["where"], frames) for path in entry[kind])


def check_entry(entry: Any, folder: Path, is_measured: bool, annotators: bool = False) -> dict[str, Any]:
    """Check an entry without decoding its images and videos.

    Args:
        entry: The entry, in any published form.
        folder: The folder that its paths begin at.
        is_measured: Whether each question is measured alone, so that each needs an answer. In training one is enough.
        annotators: Whether its "answers" are read.

    Returns:
        A copy in LLaVA's form: "image" and "video" as lists, "sizes" of these files in bytes, "system", "kinds", "answers"
        (a list for each question, or None), and `<video>` for each video.

    Raises:
        EntryError: If it is no conversation, its placeholders do not match its images and videos, or one of these is
            missing.
    """
    entry = to_llava_form(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise EntryError(f'expected an object with a list of "conversations", found {str(entry)[:80]}')
    turns = _checked_turns(entry["conversations"], is_measured)
    system = entry.get("system")
    if system is not None and not isinstance(system, str):
        raise EntryError(f'"system" must be text, found {str(system)[:80]}')
    files: dict[str, list[str]] = {kind: _media_paths(entry, kind) for kind in _KINDS.values()}
    if files["video"] and not files["image"]:  # the released video data has `<image>` there
        turns = [turn | {"value": turn["value"].replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)} for turn in turns]
    _check_placeholders(turns, files, system)
    sizes = {kind: [_file_size(folder / path, kind, path) for path in paths] for kind, paths in files.items()}
    answers = annotators_answers(entry.get("answers"), len(turns) // 2) if annotators else None
    return {
        **files,
        "conversations": turns,
        "kinds": _question_types(entry, len(turns) // 2),
        "system": system or None,
        "answers": answers,
        "sizes": sizes,
    }


def _checked_turns(turns: list[Any], is_measured: bool) -> list[dict[str, str]]:
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") != _SPEAKERS[i % 2] or not isinstance(turn.get("value"), str):
            raise EntryError(
                f'turn {i}: expected {{"from": "{_SPEAKERS[i % 2]}", "value": text}}, found {str(turn)[:80]}'
            )
        if any("\ud800" <= character <= "\udfff" for character in turn["value"]):
            raise EntryError(f"turn {i}: its text has half a character (a lone surrogate), which is not valid Unicode")
    if not turns or len(turns) % 2:
        raise EntryError(f"a conversation needs an answer to each question, found {len(turns)} turns")
    empty = [2 * i + 1 for i, turn in enumerate(turns[1::2]) if not turn["value"].strip()]
    if len(empty) == len(turns) // 2:
        raise EntryError("all its answers are empty, so that nothing can be trained on or measured")
    if empty and is_measured:
        raise EntryError(f"turn {empty[0]}: the answer is empty, so that its question cannot be measured")
    return turns


def _question_types(entry: dict[str, Any], count: int) -> list[str]:
    """Return the type of each of an entry's `count` questions, "question" where it names none."""
    types = entry.get("kinds", ["question"] * count)
    if not isinstance(types, list) or len(types) != count:
        raise EntryError(f'"kinds" must list the type of each of its {count} questions, found {str(types)[:80]}')
    for i, question_type in enumerate(types):
        if not isinstance(question_type, str):
            raise EntryError(f'"kinds": the type of question {i} must be text, found {json.dumps(question_type)[:80]}')
    return types


def _check_placeholders(turns: list[dict[str, str]], files: dict[str, list[str]], system: str | None) -> None:
    """Check that questions, and nothing else, hold one placeholder for each image and video."""
    for placeholder, kind in _KINDS.items():
        found = sum(turn["value"].count(placeholder) for turn in turns[::2])
        if found != len(files[kind]):
            raise EntryError(
                f"its questions need one {placeholder} for each of its {len(files[kind])} {kind}s, found {found}"
            )
    for i, turn in enumerate(turns[1::2]):
        if match := PLACEHOLDER.search(turn["value"]):
            raise EntryError(f"turn {2 * i + 1}: an answer holds {match[0]}; images and videos belong to questions")
    if match := PLACEHOLDER.search(system or ""):
        raise EntryError(f"the system prompt holds {match[0]}; images and videos belong to questions")


def _media_paths(entry: dict[str, Any], kind: str) -> list[str]:
    """Return the paths under "image" or "video", which may be absent, one path or a list of paths."""
    value = entry.get(kind)
    paths = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise EntryError(f'"{kind}" must be a path or a list of paths, found {str(value)[:80]!r}')
    for path in paths:
        if "://" in path[:16] or path.startswith("data:"):
            raise EntryError(
                f"{kind} '{path[:80]}' is an address; download it and give its path below data.images", path
            )
    return paths


def _file_size(path: Path, kind: str, given: str) -> Any:
    """Return the size of a file in bytes, or name and size of each file in a folder of frames."""
    try:
        status = os.stat(path)
        if kind == "video" and stat.S_ISDIR(status.st_mode):
            return sorted((file.name, file.stat().st_size) for file in path.iterdir())
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise EntryError(f"no {kind} '{path}'", given) from error
    if not stat.S_ISREG(status.st_mode):
        raise EntryError(f"{kind} '{path}' is not a file", given)
    if not status.st_size:
        raise EntryError(f"{kind} '{path}' is empty (0 bytes)", given)
    return status.st_size
