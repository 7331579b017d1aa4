"""Image and video files of samples: opened on access, and checked all at once before they are needed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tqdm.auto import tqdm

from experiments.data.samples import IndexedImageLoader, Sample, Split, VisualInput, fingerprint
from experiments.files import file_stamps, write_atomically

_FILES_AT_ONCE = 1000  # handed to the threads together: a million waiting tasks would take a gigabyte
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MediaFile:
    """Loads an image or a video of an entry. Loaders of the same file are equal, whatever entry they are of.

    Args:
        path: The file. A video may also be a folder of its frames.
        kind: What the entry calls it.
        where: File, number and id of the entry, for errors.
        frames: How many frames of a video are sampled, evenly spaced.
        ignore_orientation: Whether an image keeps the pixels as stored, instead of being turned upright.
    """

    path: Path
    kind: Literal["image", "video"]
    where: str = field(compare=False)
    frames: int = 8
    ignore_orientation: bool = False

    def __call__(self) -> VisualInput:
        """Return an image in RGB, or a video whose frames are decoded when it is iterated.

        Raises:
            ValueError: If it cannot be read, with the entry.
        """
        try:
            return self._open()
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.where}: {error}") from error

    def fault(self) -> str | None:
        """Decode the image, or all sampled frames of the video, and return why this fails; None if it does not.

        Raises:
            ImportError: If a package that reads videos is not installed. That is no fault of the file.
        """
        try:
            visual = self._open()
            for _ in () if isinstance(visual, Image.Image) else visual:
                pass
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())
        return None

    def _open(self) -> VisualInput:
        # Importing llava_mini takes seconds, and computing a fingerprint does not need it.
        if self.kind == "image":
            from llava_mini.images import to_rgb

            return to_rgb(self.path, self.ignore_orientation)
        from llava_mini.video import Video

        return Video(self.path, frames=self.frames)


def with_orientation_of(processor: Any, sample: Sample) -> Sample:
    """Return a sample whose image files keep the pixels as stored, if the processor's `ignore_orientation` asks for it.

    Args:
        processor: A processor. LLaVA-Mini's has the setting, and applies it to the frames of videos itself.
        sample: The sample. No image is loaded.
    """
    if not getattr(processor, "ignore_orientation", False):
        return sample
    return replace(sample, loaders=tuple(_as_stored(load) for load in sample.loaders))


def _as_stored(load: Any) -> Any:
    if isinstance(load, IndexedImageLoader):
        return replace(load, make=_as_stored(load.make))
    return replace(load, ignore_orientation=True) if isinstance(load, MediaFile) else load


def find_faults(files: Sequence[MediaFile], cache: Path | None = None) -> dict[Path, str]:
    """Decode files, in a thread for each CPU, and return those that cannot be decoded.

    Args:
        files: Images and videos. A path that occurs repeatedly is decoded once.
        cache: Folder that keeps the result until a file changes in size or time, or a package that decodes in version.

    Returns:
        What is wrong with each, by path.

    Raises:
        ImportError: If a package that reads videos is not installed.
    """
    distinct = list({file.path: file for file in files}.values())
    cached = None
    if cache is not None:
        readers = [_version(package) for package in ("pillow", "av")]
        stamps = [file_stamps([str(file.path)]) for file in distinct]
        frames = sorted({file.frames for file in distinct if file.kind == "video"})
        cached = cache / f"{fingerprint(stamps, frames, readers)}.faults.json"
        try:
            return {Path(path): reason for path, reason in json.loads(cached.read_text())}
        except (OSError, ValueError):  # not there, or not whole
            pass
    faults: dict[Path, str] = {}
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        tqdm(total=len(distinct), desc="checking files", leave=False) as bar,
    ):
        for start in range(0, len(distinct), _FILES_AT_ONCE):
            part = distinct[start : start + _FILES_AT_ONCE]
            for file, fault in zip(part, threads.map(MediaFile.fault, part), strict=True):
                bar.update()
                if fault is not None:
                    faults[file.path] = fault
    if cached is not None:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cached, json.dumps([[str(path), fault] for path, fault in faults.items()]))
        except OSError as error:
            log.warning("files are checked again next time: '%s' cannot be written (%s)", cached, error.strerror)
    return faults


def check_decodable(split: Split) -> None:
    """Decode all image and video files of a split. Generated images are not made.

    Raises:
        ValueError: If one cannot be decoded, with its entry, path and reason.
        ImportError: If a package that reads videos is not installed.
    """
    files = list(_media_files(split.samples))
    faults = find_faults(files)
    for file in files:
        if file.path in faults:
            raise ValueError(f"{file.where}: {faults[file.path]}")


def _media_files(samples: Iterable[Sample]) -> Iterable[MediaFile]:
    for sample in samples:
        for load in sample.loaders:
            file = load.make if isinstance(load, IndexedImageLoader) else load
            if isinstance(file, MediaFile):
                yield file


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
