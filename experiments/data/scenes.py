"""Scenes of coloured shapes on a grid: layouts drawn from a seed, and their pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8

COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 174, 96),
    "blue": (41, 98, 255),
    "yellow": (241, 196, 15),
    "purple": (142, 68, 173),
}
SHAPES = ("square", "triangle", "ring", "cross")
GRID_SIZE = 4  # grid cells per side
CELL_SIZE = 12  # pixels per side of a grid cell; no multiple of the tiny LLaVA's patches, so patches cut objects
IMAGE_SIZE = GRID_SIZE * CELL_SIZE  # pixels per side
MIN_OBJECTS, MAX_OBJECTS = 5, 9  # of five objects on four rows, two share a row: every scene has neighbours
MIN_RADIUS, MAX_RADIUS = 3.5, 5.0  # pixels
SPLIT_TENTHS = {"train": range(2, 10), "validation": range(1, 2), "test": range(1)}  # tenths of all layouts
_BLOCK = 4096  # scenes per block of draws; blocks have a fixed size so that a longer split begins with the shorter one
_EMPTY = -1
_BACKGROUND = 235  # grey level
_NOISE_STD = 6  # grey levels
_SOFT_EDGE = 0.5  # pixels


@dataclass(frozen=True)
class Scenes:
    """Layouts of scenes and the numbers that determine their pixels.

    Grid cells are in reading order. Colour and shape are indices of `COLOURS` and `SHAPES`, and -1 in empty cells.
    """

    colour: Int[np.ndarray, "scenes cells"]
    shape: Int[np.ndarray, "scenes cells"]
    centre: Float[np.ndarray, "scenes cells 2"]  # pixels from the cell's upper left corner, x then y
    radius: Float[np.ndarray, "scenes cells"]  # pixels
    noise_seed: Int[np.ndarray, " scenes"]

    def __len__(self) -> int:
        return len(self.colour)

    def __getitem__(self, index: slice | np.ndarray) -> Scenes:
        return Scenes(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def layout_tenth(
    colour: Int[np.ndarray, "scenes cells"], shape: Int[np.ndarray, "scenes cells"]
) -> Int[np.ndarray, " scenes"]:
    """Return the tenth (0 to 9) of all layouts that each scene belongs to.

    The tenth is a hash of the layout alone, so no two splits can share a layout.
    """
    state = np.where(colour == _EMPTY, 0, 1 + colour * len(SHAPES) + shape).astype(np.uint64)
    base = np.uint64(1 + len(COLOURS) * len(SHAPES))
    number = np.zeros(len(state), np.uint64)
    for cell in range(state.shape[1]):
        number = number * base + state[:, cell]
    number ^= number >> np.uint64(31)  # the finaliser of splitmix64 spreads neighbouring numbers
    number *= np.uint64(0xBF58476D1CE4E5B9)
    number ^= number >> np.uint64(27)
    return (number >> np.uint64(20)).astype(np.int64) % 10


def draw_scenes(split: str, seed: int, count: int) -> Scenes:
    """Draw the first `count` scenes of a split.

    Args:
        split: A key of `SPLIT_TENTHS`.
        seed: The same split and seed give the same scenes, whatever the count.
        count: How many scenes.
    """
    tenths = list(SPLIT_TENTHS[split])
    blocks: list[Scenes] = []
    while sum(map(len, blocks)) < count:
        rng = np.random.default_rng([seed, list(SPLIT_TENTHS).index(split), len(blocks)])
        block = _draw_block(rng)
        blocks.append(block[np.isin(layout_tenth(block.colour, block.shape), tenths)])
    return Scenes(*(np.concatenate([getattr(b, name) for b in blocks]) for name in Scenes.__dataclass_fields__))[:count]


def _draw_block(rng: np.random.Generator) -> Scenes:
    size = (_BLOCK, GRID_SIZE * GRID_SIZE)
    objects = rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1, size=(_BLOCK, 1))
    filled = rng.random(size).argsort(axis=1).argsort(axis=1) < objects
    radius = rng.uniform(MIN_RADIUS, MAX_RADIUS, size)
    shift = CELL_SIZE / 2 - _SOFT_EDGE - radius[..., None]  # an object of any size stays in its grid cell
    return Scenes(
        colour=np.where(filled, rng.integers(len(COLOURS), size=size), _EMPTY),
        shape=np.where(filled, rng.integers(len(SHAPES), size=size), _EMPTY),
        centre=CELL_SIZE / 2 + shift * rng.uniform(-1, 1, (*size, 2)),
        radius=radius,
        noise_seed=rng.integers(2**31, size=_BLOCK),
    )


def render_scenes(scenes: Scenes) -> UInt8[np.ndarray, "scenes side side 3"]:
    """Render scenes to pixels: shapes with soft edges on grey, with Gaussian noise of 6 grey levels."""
    ys, xs = np.mgrid[:CELL_SIZE, :CELL_SIZE].astype(np.float32) + np.float32(0.5)
    dx = xs - scenes.centre[..., 0, None, None].astype(np.float32)  # [scenes, cells, CELL_SIZE, CELL_SIZE]
    dy = ys - scenes.centre[..., 1, None, None].astype(np.float32)
    radius = scenes.radius[..., None, None].astype(np.float32)
    shape = scenes.shape[..., None, None]
    # signed distances in pixels, negative inside
    box = np.maximum(abs(dx), abs(dy))
    square = box - 0.9 * radius
    triangle = np.maximum(dy - 0.8 * radius, 0.894 * abs(dx) - 0.447 * (dy + radius))
    ring = abs(np.hypot(dx, dy) - 0.75 * radius) - 0.25 * radius
    cross = np.maximum(box - radius, np.minimum(abs(dx), abs(dy)) - 0.3 * radius)
    distance = np.choose(np.maximum(shape, 0), [square, triangle, ring, cross])
    opacity = np.where(shape == _EMPTY, 0, np.clip(_SOFT_EDGE - distance, 0, 1))[..., None]
    paint = np.array(list(COLOURS.values()), np.float32)[np.maximum(scenes.colour, 0)][:, :, None, None, :]
    cells = _BACKGROUND * (1 - opacity) + paint * opacity
    image = cells.reshape(-1, GRID_SIZE, GRID_SIZE, CELL_SIZE, CELL_SIZE, 3).transpose(0, 1, 3, 2, 4, 5)
    image = image.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)
    noise_shape = (IMAGE_SIZE, IMAGE_SIZE, 1)
    noise = np.stack([np.random.default_rng(s).standard_normal(noise_shape, np.float32) for s in scenes.noise_seed])
    return np.clip(image + _NOISE_STD * noise, 0, 255).round().astype(np.uint8)
