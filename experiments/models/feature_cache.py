"""What a frozen vision tower says of the pictures of a split, computed once for all cells that look at them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import BFloat16, Float
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from experiments.config.schema import Config
from experiments.data.samples import Numbered, Sample, Split, fingerprint
from llava_mini import LlavaMiniProcessor
from llava_mini.images import to_rgb

log = logging.getLogger(__name__)
_BLANK = Image.new("RGB", (8, 8))
_NOT_THE_TOWERS = ("_name_or_path", "architectures", "dtype", "transformers_version")  # fields of its configuration
_PAGE = 4096

Seen = BFloat16[Tensor, "crops layers tokens width"]


class Features:
    """Hidden states of a frozen tower at the selected layers, in bf16, in a memory-mapped file for each split.

    A picture goes through the tower when it is first asked for, alone, so that what is kept hangs on nothing but the
    picture: cells that look at different pictures in different orders fill one file together, and each finds what it
    would have computed. The file's name is a hash of the tower's weights and configuration, its layers, what is done to
    pictures ahead of it, the split, and how and with which versions it is computed.

    The file begins with a checksum for each picture and is sparse: pictures that nobody looked at take no room. What
    does not match its checksum counts as not there and is computed again. So any number of processes may read and write
    at once without a lock, and neither a kill in the middle of writing nor a garbled file does harm. Where nothing can
    be written, on a full disk, features are computed and not kept.

    Args:
        folder: Where the files are.
        model: A LLaVA or LLaVA-Mini, on the device and in the dtype that its tower will run.
        processor: Its processor.
        split: The pictures. Those that it does not number, and videos, go through the tower each time.
    """

    def __init__(
        self, folder: Path, model: LlavaForConditionalGeneration, processor: ProcessorMixin, split: Split
    ) -> None:
        self.processor = processor
        self.tower: Any = model.model.vision_tower
        self._run: Callable[..., Any] = self.tower.forward
        selected = model.config.vision_feature_layer
        self.layers: list[int] = [selected] if isinstance(selected, int) else list(selected)
        self.path = folder / f"{self._name(split)}.features"
        self._shape = self._look(self._pixels(_BLANK)).shape
        self._bytes = 2 * math.prod(self._shape)
        self._start = -(-8 * split.images // _PAGE) * _PAGE
        self._kept: tuple[np.memmap, np.memmap] | None = None  # checksums, rows
        self._file: FileIO | None = None
        if split.images:
            self._open(split.images)

    def _name(self, split: Split) -> str:
        weights = hashlib.sha256()
        for name, tensor in self.tower.state_dict().items():
            weights.update(name.encode() + str(tensor.dtype).encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        config = {k: v for k, v in self.tower.config.to_dict().items() if k not in _NOT_THE_TOWERS}
        ahead = [
            self.processor.image_processor.to_dict(),
            *(getattr(self.processor, name, default) for name, default in (("tiles", 1), ("pad_to_square", False))),
        ]
        computed = [
            self.tower.config._attn_implementation,
            self.tower.device.type,
            torch.get_num_threads(),
            torch.__version__,
            transformers.__version__,
        ]
        return fingerprint(weights.hexdigest(), config, self.layers, ahead, split.fingerprint, computed)

    def _open(self, pictures: int) -> None:
        size = self._start + pictures * self._bytes
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
            if os.fstat(self._file.fileno()).st_size != size:
                self._file.truncate(size)  # a hole holds no picture: its checksum reads as 0, which is none
        except OSError as error:
            self._keep_no_more(error)
        else:
            rows = np.memmap(self.path, np.int16, "r", self._start, (pictures, self._bytes // 2))
            self._kept = np.memmap(self.path, np.uint64, "r", 0, (pictures,)), rows

    def _keep_no_more(self, error: OSError) -> None:
        log.warning("features are computed and not kept: '%s' cannot be written (%s)", self.path, error.strerror)
        self._file = None

    def of(self, load: Callable[[], Any]) -> Seen:
        """The features of an image that `load` draws or reads, which it is not asked to if they are kept."""
        if not isinstance(load, Numbered):
            return self._look(self._pixels(load()))
        if (kept := self._read(load.number)) is not None:
            return kept
        seen = self._look(self._pixels(load()))
        if seen.shape != self._shape:
            raise ValueError(
                f"keep_features: this tower sees pictures at sizes of their own, {tuple(seen.shape)} after "
                f"{tuple(self._shape)}; leave it out"
            )
        self._write(load.number, seen)
        return seen

    def _read(self, number: int) -> Seen | None:
        if self._kept is None:
            return None
        sums, rows = self._kept
        if not (checksum := int(sums[number])):
            return None
        row = np.array(rows[number])
        return torch.from_numpy(row).view(torch.bfloat16).view(self._shape) if checksum == _checksum(row) else None

    def _write(self, number: int, seen: Seen) -> None:
        if self._file is None:
            return
        row = seen.contiguous().view(torch.int16).numpy()
        try:  # through the file: where the disk is full, writing to mapped memory would end the process
            file = self._file.fileno()
            if os.pwrite(file, row.data, self._start + number * self._bytes) == self._bytes:
                os.pwrite(file, np.uint64(_checksum(row)).tobytes(), 8 * number)
        except OSError as error:
            self._keep_no_more(error)

    def _pixels(self, picture: Image.Image) -> Float[Tensor, "crops channels height width"]:
        if isinstance(self.processor, LlavaMiniProcessor):
            return self.processor.crops(picture, squash=False)
        return self.processor.image_processor(to_rgb(picture), return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def _look(self, pixels: Float[Tensor, "crops channels height width"]) -> Seen:
        training = self.tower.training
        self.tower.eval()
        inputs = pixels.to(self.tower.device, self.tower.dtype)
        states = self._run(inputs, output_hidden_states=True, return_dict=True).hidden_states
        self.tower.train(training)
        return torch.stack([states[layer] for layer in self.layers], dim=1).to("cpu", torch.bfloat16)

    def encoded(self, encode: Callable[[Sample], dict[str, Any]], sample: Sample) -> dict[str, Any]:
        """`encode(sample)` with a stream of features in the place of its pictures. Images that may be kept are neither
        drawn nor read for it: their text is encoded around a blank image."""
        numbered = all(isinstance(load, Numbered) for load in sample.load)
        item = encode(replace(sample, load=(lambda: _BLANK,) * len(sample.load)) if numbered else sample)
        if numbered or "images" in item:
            stream = _Stream(self.of, sample.load)
        else:  # frames of videos
            stream = _Stream(self._look, item["pixel_values"])
        item.pop("images", None)
        return item | {"pixel_values": stream} if sample.load else item

    @contextlib.contextmanager
    def given(self) -> Iterator[None]:
        """While inside, the model takes features as `pixel_values`: its tower hands on what it is given."""

        def hand_on(pixel_values: Float[Tensor, "crops layers tokens width"], **_: Any) -> BaseModelOutputWithPooling:
            states = pixel_values.to(self.tower.device, self.tower.dtype).unbind(dim=1)
            return BaseModelOutputWithPooling(hidden_states=dict(zip(self.layers, states, strict=True)))  # type: ignore[arg-type]

        self.tower.forward = hand_on
        try:
            yield
        finally:
            del self.tower.forward


class _Stream:
    """What `look` makes of each of some things, made anew each time it is gone through."""

    def __init__(self, look: Callable[[Any], Seen], things: Iterable[Any]) -> None:
        self.look, self.things = look, things

    def __iter__(self) -> Iterator[Seen]:
        return map(self.look, self.things)


def _checksum(row: np.ndarray) -> int:
    """Never 0, which is what a hole in a file reads as."""
    return zlib.crc32(row.data) | 1 << 32


def keep_features(
    config: Config, model: PreTrainedModel, processor: ProcessorMixin, split: Split | None
) -> Features | None:
    """The features of a split for a cell, or None where its tower has to look at pixels: where the configuration does
    not ask for features to be kept, and where the compressor needs the tower's attention, which is not kept.

    Raises:
        ValueError: if the model is no LLaVA.
    """
    if not config.keep_features or split is None:
        return None
    if not isinstance(model, LlavaForConditionalGeneration):
        raise ValueError(f"keep_features: only a LLaVA's features are kept, and this model is a {type(model).__name__}")
    if needed := {"saliency", "keys"} & set(getattr(model.model, "needs", ())):
        log.info("no features are kept for a compressor that needs the tower's %s", " and ".join(sorted(needed)))
        return None
    return Features(Path(config.results) / "shared", model, processor, split)
