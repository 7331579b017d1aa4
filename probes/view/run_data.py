"""What the page shows of one run of a model, as plain data."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from probes.tokens.tile_panels import find_tile_panels
from probes.tokens.token_map import TokenMap
from probes.view.encoding import encode_floats, encode_indices, encode_rows
from probes.view.words import Words

LONGEST_SIDE = 1024  # pixels of an image in the page; larger ones are shown smaller
_LOSSLESS_SIDE = 256  # pixels up to which an image is stored without loss


@dataclass(frozen=True)
class PatchMap:
    """Values that the page can show over the patches.

    Args:
        key: Its name in the address of the page.
        label: Its name in the menu.
        unit: What a value is.
        values: By layer, head, word and position of the prompt. The axes of heads and words may have length 1.
        signed: Whether values may be negative.
    """

    key: str
    label: str
    unit: str
    values: Float[Tensor, "layers heads words positions"]
    signed: bool = False


@dataclass(frozen=True)
class PatchTexts:
    """Texts that the page can show on the patches, such as the readings of a logit lens.

    Args:
        key: Its name in the address of the page.
        label: Its name in the menu.
        texts: By depth (0 is the embeddings) and visual token.
    """

    key: str
    label: str
    texts: Sequence[Sequence[str]]


@dataclass(frozen=True)
class LayerCurve:
    """One number for each layer, beside the image.

    Args:
        label: What is drawn.
        layers: Layer of each value.
        values: The values.
    """

    label: str
    layers: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class ViewRun:
    """Everything that a page shows of one run.

    Args:
        name: Name of the run on the page.
        model: Facts of the model, shown as they are: type, device, dtype.
        tokens: Map of the prompt, with `places` where they are known.
        words: The words, and the text that they stand in.
        layers: Recorded layers.
        heads: Recorded heads.
        mass: Attention of each word on the image; NaN where undefined.
        uniform: The same for attention spread evenly over the keys that a word can attend to.
        maps: What can be shown on the patches; the first is shown first.
        images: The images in reading order: PIL images, or arrays with values in 0 to 255, or floats in 0 to 1. A video is
            a list of its frames.
        sinks: Which positions are visual sinks in each layer, and the rule that found them.
        removal: Score of the answer without the image from each layer on.
    """

    name: str
    model: Mapping[str, str]
    tokens: TokenMap
    words: Words
    layers: Sequence[int]
    heads: Sequence[int]
    mass: Float[Tensor, "layers heads words"]
    uniform: Float[Tensor, "layers words"]
    maps: Sequence[PatchMap | PatchTexts]
    images: Sequence[Any] = ()
    sinks: tuple[Bool[Tensor, "layers positions"], str] | None = None
    removal: LayerCurve | None = None

    def data(self) -> dict[str, Any]:
        """Return the run as the page reads it."""
        positions = self.tokens.mask("vision")[0].nonzero().flatten().cpu()
        patches, panels, note = _patches(self.tokens, positions)
        return {
            "name": self.name,
            "model": {**self.model, "layers": list(self.layers), "heads": list(self.heads)},
            "images": [_image_data(image, f"image {number + 1}") for number, image in enumerate(self.images)],
            "patches": patches,
            "panels": panels,
            "boxes_note": note,
            "text": [{"text": part.text, "group": part.group, "word": part.word} for part in self.words.text],
            "words": [
                {"text": word.text, "group": word.group, "positions": list(word.positions)} for word in self.words.words
            ],
            "maps": [_map_data(part, positions) for part in self.maps],
            "mass": {"values": encode_floats(self.mass.numpy()), "uniform": encode_floats(self.uniform.numpy())},
            "sinks": self._sink_data(positions),
            "removal": None
            if self.removal is None
            else {
                "label": self.removal.label,
                "layers": list(self.removal.layers),
                "values": [float(value) for value in self.removal.values],
            },
        }

    def _sink_data(self, positions: Tensor) -> dict[str, Any] | None:
        if self.sinks is None:
            return None
        by_layer = [layer[positions].nonzero().flatten().tolist() for layer in self.sinks[0].cpu()]
        return {"patches": by_layer, "rule": self.sinks[1]}


def _map_data(part: PatchMap | PatchTexts, positions: Tensor) -> dict[str, Any]:
    if isinstance(part, PatchMap):
        rows = part.values[..., positions].float().numpy()
        encoded = encode_rows(rows, part.signed)
        return {"key": part.key, "kind": "heat", "label": part.label, "unit": part.unit, **encoded}
    vocabulary = list(dict.fromkeys(text for row in part.texts for text in row))
    index = {text: number for number, text in enumerate(vocabulary)}
    numbers = np.array([[index[text] for text in row] for row in part.texts])
    return {
        "key": part.key,
        "kind": "words",
        "label": part.label,
        "shape": list(numbers.shape),
        "vocabulary": vocabulary,
        "values": encode_indices(numbers),
    }


def _patches(tokens: TokenMap, positions: Tensor) -> tuple[dict[str, Any], list[str], str | None]:
    """Return the coordinates of the visual tokens, the names of their panels, and why boxes are absent if they are."""
    count = len(positions)
    if tokens.places is None:
        side = max(round(count**0.5), 1)
        index = torch.arange(count)
        row, column = (index // side).tolist(), (index % side).tolist()
        zeros = [0] * count
        family = f" of model type {tokens.model_type!r}" if tokens.model_type else ""
        unknown = (
            f"Where the visual tokens{family} lie in the image is not known. They are drawn in reading order, "
            f"{side} to a row."
        )
        patches = {"image": zeros, "frame": zeros, "tile": zeros, "row": row, "column": column}
        return {**patches, "position": positions.tolist(), "box": [None] * count, "panel": zeros}, [""], unknown
    places = tokens.places[0]
    columns = {name: getattr(places, name).cpu()[positions] for name in ("image", "frame", "tile", "row", "column")}
    box = places.box.cpu()[positions]
    panel, names = torch.full((count,), -1), [""]
    in_pixels = torch.zeros(count, dtype=torch.bool)
    slot = torch.full((tokens.labels.shape[1],), -1)
    slot[positions] = torch.arange(count)
    for image, frame in torch.stack([columns["image"], columns["frame"]], -1).unique(dim=0).tolist():
        has_place = (columns["image"] == image) & (columns["frame"] == frame) & (columns["column"] >= 0)
        if not has_place.any():
            continue
        panels, has_boxes = find_tile_panels(tokens, 0, image, frame)
        for number, part in enumerate(panels):
            panel[slot[part.positions]] = number
            in_pixels[slot[part.positions]] = has_boxes
            names = names if number < len(names) else [*names, ""]
            names[number] = part.name
    boxes = [edges if known else None for edges, known in zip(box.tolist(), in_pixels.tolist(), strict=True)]
    note: str | None = None
    if not in_pixels[panel >= 0].all():
        note = "The boxes of the visual tokens in the image are not known. They are drawn by row and column."
    data = {name: values.tolist() for name, values in columns.items()}
    return {**data, "position": positions.tolist(), "box": boxes, "panel": panel.tolist()}, names, note


def _image_data(image: Any, label: str) -> dict[str, Any]:
    if getattr(image, "ndim", 0) == 4:  # an array of frames
        image = list(image)
    frames = [_as_pil(frame) for frame in image] if isinstance(image, (list, tuple)) else [_as_pil(image)]
    width, height = frames[0].size
    return {"label": label, "width": width, "height": height, "frames": [_data_uri(frame) for frame in frames]}


def rgb_on_white(image: Image.Image) -> Image.Image:
    """Return an image in RGB, on white where it is transparent, as transformers' processors and LLaVA-Mini's show it."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _as_pil(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return rgb_on_white(image)
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):  # channels first, as in `TokenMap.from_inputs`
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and array.shape[2:] not in ((3,), (4,)):
        raise ValueError(
            f"images: an array of shape {list(np.shape(image))} is no image; pass [height, width, 1, 3 or 4 channels]"
        )
    if np.issubdtype(array.dtype, np.floating) and ((array >= 0) & (array <= 1)).all():
        array = (array * 255).round()
    if not ((array >= 0) & (array <= 255)).all():
        raise ValueError(
            f"images: an array has values from {array.min():g} to {array.max():g}; pass values in 0 to 255, or floats in "
            "0 to 1"
        )
    return rgb_on_white(Image.fromarray(array.astype(np.uint8)))


def _data_uri(image: Image.Image) -> str:
    if max(image.size) > LONGEST_SIDE:
        image = image.copy()
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    lossless = max(image.size) <= _LOSSLESS_SIDE
    buffer = io.BytesIO()
    image.save(buffer, format="PNG" if lossless else "JPEG", **({} if lossless else {"quality": 88}))
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
