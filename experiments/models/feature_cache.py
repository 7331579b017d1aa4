"""A disk cache of the vision features of one data split, shared by all cells with the same frozen vision tower."""

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
from experiments.data.media_files import with_orientation_of
from experiments.data.samples import IndexedImageLoader, Sample, Split, fingerprint
from experiments.files import file_stamps
from llava_mini import LlavaMiniProcessor
from llava_mini.images import to_rgb

VisionFeatures = BFloat16[Tensor, "crops layers tokens width"]

log = logging.getLogger(__name__)
_BLANK_IMAGE = Image.new("RGB", (8, 8))
_UNHASHED_CONFIG_FIELDS = ("_name_or_path", "architectures", "dtype", "transformers_version")  # do not change features
_PAGE_BYTES = 4096
_CHECKSUM_BYTES = 8


class VisionFeatureCache:
    """Hidden states of a frozen vision tower at the selected layers, in bf16, in one memory-mapped file per split.

    An image is encoded at its first use, alone, so its features depend on nothing but the image. Cells that use different
    images in different orders fill one file together, and each reads what it would have computed. The file's name is a
    hash of the vision tower's weights and configuration, its layers, the image processing, the split, and the device,
    attention implementation, threads and versions that compute the features.

    The file begins with a checksum for each image. It is sparse: images that were never used take no disk space. A row
    that does not match its checksum counts as missing and is computed again. So any number of processes can read and
    write at once without a lock, and neither a kill in the middle of a write nor a corrupt file does harm. Where the file
    cannot be written, for example on a full disk, features are computed and not cached.

    Args:
        folder: The folder of the files.
        model: A LLaVA or LLaVA-Mini, on the device and in the dtype that its vision tower will run in.
        processor: Its processor.
        split: The images. Videos, and images without an `IndexedImageLoader`, are encoded each time.
    """

    def __init__(
        self, folder: Path, model: LlavaForConditionalGeneration, processor: ProcessorMixin, split: Split
    ) -> None:
        self.processor = processor
        self.vision_tower: Any = model.model.vision_tower
        self._forward: Callable[..., Any] = self.vision_tower.forward
        selected = model.config.vision_feature_layer
        self.layers: list[int] = [selected] if isinstance(selected, int) else list(selected)
        self.path = folder / f"{self._file_stem(split)}.features"
        self._shape = self._encode(self._pixel_values(_BLANK_IMAGE)).shape
        self._row_bytes = 2 * math.prod(self._shape)
        self._rows_start = -(-_CHECKSUM_BYTES * split.image_count // _PAGE_BYTES) * _PAGE_BYTES
        self._checksums_and_rows: tuple[np.memmap, np.memmap] | None = None
        self._file: FileIO | None = None
        if split.image_count:
            self._open(split.image_count)

    def get(self, load: Callable[[], Any]) -> VisionFeatures:
        """Return the features of an image. The image is loaded only if its features are not cached.

        Args:
            load: Reads or renders the image.

        Raises:
            ValueError: If the vision tower encodes images of different sizes to different shapes.
        """
        if not isinstance(load, IndexedImageLoader):
            return self._encode(self._pixel_values(load()))
        if (cached := self._read(load.index)) is not None:
            return cached
        features = self._encode(self._pixel_values(load()))
        if features.shape != self._shape:
            raise ValueError(
                f"keep_features: the vision tower encodes images to different shapes, {tuple(features.shape)} after "
                f"{tuple(self._shape)}; set keep_features=false"
            )
        self._write(load.index, features)
        return features

    def encode_sample(self, encode: Callable[[Sample], dict[str, Any]], sample: Sample) -> dict[str, Any]:
        """Return `encode(sample)` with a stream of features as its `pixel_values`.

        The images of a sample whose images can be cached are not loaded here. The text is encoded around blank images.
        """
        sample = with_orientation_of(self.processor, sample)
        cacheable = all(isinstance(load, IndexedImageLoader) for load in sample.loaders)
        blank = (lambda: _BLANK_IMAGE,) * len(sample.loaders)
        item = encode(replace(sample, loaders=blank) if cacheable else sample)
        if cacheable or "images" in item:
            stream = _FeatureStream(self.get, sample.loaders)
        else:  # frames of videos
            stream = _FeatureStream(self._encode, item["pixel_values"])
        item.pop("images", None)
        return item | {"pixel_values": stream} if sample.loaders else item

    @contextlib.contextmanager
    def as_pixel_values(self) -> Iterator[None]:
        """Make the model accept features as `pixel_values` inside the block: its vision tower returns its input."""

        def return_input(
            pixel_values: Float[Tensor, "crops layers tokens width"], **_: Any
        ) -> BaseModelOutputWithPooling:
            states = pixel_values.to(self.vision_tower.device, self.vision_tower.dtype).unbind(dim=1)
            return BaseModelOutputWithPooling(hidden_states=dict(zip(self.layers, states, strict=True)))  # type: ignore[arg-type]

        previous = vars(self.vision_tower).get("forward")  # another split's block may be open around this one
        self.vision_tower.forward = return_input
        try:
            yield
        finally:
            del self.vision_tower.forward
            if previous is not None:
                self.vision_tower.forward = previous

    def _file_stem(self, split: Split) -> str:
        weights = hashlib.sha256()
        for name, tensor in self.vision_tower.state_dict().items():
            weights.update(name.encode() + str(tensor.dtype).encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        config = {k: v for k, v in self.vision_tower.config.to_dict().items() if k not in _UNHASHED_CONFIG_FIELDS}
        image_processing = [
            self.processor.image_processor.to_dict(),
            *(
                getattr(self.processor, name, default)
                for name, default in (("tiles", 1), ("pad_to_square", False), ("ignore_orientation", False))
            ),
        ]
        computation = [
            self.vision_tower.config._attn_implementation,
            self.vision_tower.device.type,
            torch.get_num_threads(),
            torch.__version__,
            transformers.__version__,
        ]
        pixels = self._first_pixels(split).contiguous().numpy().tobytes()  # differ if code that makes images does
        files = file_stamps(map(str, split.image_files))  # an image may be replaced by another of the same size
        parts = [weights.hexdigest(), config, self.layers, image_processing, split.fingerprint, computation, pixels]
        return fingerprint(*parts, *([files] if files else []))

    def _first_pixels(self, split: Split) -> Float[Tensor, "crops channels height width"]:
        """Return the pixels of the first image that the file would hold; those of a blank image if there is none."""
        loaders = (load for sample in split.samples if split.image_count for load in sample.loaders)
        first = next((load for load in loaders if isinstance(load, IndexedImageLoader)), None)
        return self._pixel_values(_BLANK_IMAGE if first is None else first())

    def _open(self, image_count: int) -> None:
        size = self._rows_start + image_count * self._row_bytes
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
            if os.fstat(self._file.fileno()).st_size != size:
                self._file.truncate(size)  # new bytes read as 0, which is the checksum of no row
        except OSError as error:
            self._stop_writing(error)
        else:
            row_shape = (image_count, self._row_bytes // 2)
            rows = np.memmap(self.path, np.int16, "r", self._rows_start, row_shape)
            self._checksums_and_rows = np.memmap(self.path, np.uint64, "r", 0, (image_count,)), rows

    def _stop_writing(self, error: OSError) -> None:
        log.warning("features are computed and not cached: '%s' cannot be written (%s)", self.path, error.strerror)
        self._file = None

    def _read(self, index: int) -> VisionFeatures | None:
        if self._checksums_and_rows is None:
            return None
        checksums, rows = self._checksums_and_rows
        if not (checksum := int(checksums[index])):
            return None
        row = np.array(rows[index])
        return torch.from_numpy(row).view(torch.bfloat16).view(self._shape) if checksum == _checksum(row) else None

    def _write(self, index: int, features: VisionFeatures) -> None:
        if self._file is None:
            return
        row = features.contiguous().view(torch.int16).numpy()
        try:  # through the file: on a full disk, writing to mapped memory would end the process
            file = self._file.fileno()
            if os.pwrite(file, row.data, self._rows_start + index * self._row_bytes) == self._row_bytes:
                os.pwrite(file, np.uint64(_checksum(row)).tobytes(), _CHECKSUM_BYTES * index)
        except OSError as error:
            self._stop_writing(error)

    def _pixel_values(self, image: Image.Image) -> Float[Tensor, "crops channels height width"]:
        if isinstance(self.processor, LlavaMiniProcessor):
            return self.processor.crops(image, squash=False)
        return self.processor.image_processor(to_rgb(image), return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def _encode(self, pixels: Float[Tensor, "crops channels height width"]) -> VisionFeatures:
        was_training = self.vision_tower.training
        self.vision_tower.eval()
        inputs = pixels.to(self.vision_tower.device, self.vision_tower.dtype)
        # Training in bfloat16 measures inside autocast, and the next cell may read these features outside.
        with torch.autocast(inputs.device.type, enabled=False):
            states = self._forward(inputs, output_hidden_states=True, return_dict=True).hidden_states
        self.vision_tower.train(was_training)
        return torch.stack([states[layer] for layer in self.layers], dim=1).to("cpu", torch.bfloat16)


class _FeatureStream:
    """Features of some images, computed each time the stream is iterated.

    Args:
        encode: Returns the features of one of `inputs`.
        inputs: Image loaders, or pixels of video frames.
    """

    def __init__(self, encode: Callable[[Any], VisionFeatures], inputs: Iterable[Any]) -> None:
        self.encode, self.inputs = encode, inputs

    def __iter__(self) -> Iterator[VisionFeatures]:
        return map(self.encode, self.inputs)


def _checksum(row: np.ndarray) -> int:
    """Return a CRC that is never 0, since unwritten parts of the file read as 0."""
    return zlib.crc32(row.data) | 1 << 32


def open_feature_cache(
    config: Config, model: PreTrainedModel, processor: ProcessorMixin, split: Split | None
) -> VisionFeatureCache | None:
    """Open the feature cache of a split.

    Returns:
        The cache. None if `config.keep_features` is off, there is no split, or the compressor needs the vision tower's
        attention or features of smaller images, which are not cached.

    Raises:
        ValueError: If the model is not a LLaVA.
    """
    if not config.keep_features or split is None:
        return None
    if not isinstance(model, LlavaForConditionalGeneration):
        raise ValueError(
            f"keep_features: only a LLaVA's features can be cached, and this model is a {type(model).__name__}; "
            "set keep_features=false"
        )
    if needed := {"saliency", "keys"} & set(getattr(model.model, "needs", ())):
        log.info("no features are cached: the compressor needs the vision tower's %s", " and ".join(sorted(needed)))
        return None
    if getattr(model.config, "encoded_side", None) is not None:
        log.info("no features are cached: the compressor '%s' encodes small images", model.config.compressor)
        return None
    return VisionFeatureCache(Path(config.results) / "shared", model, processor, split)
