"""Scenes of coloured shapes on a grid: drawn from a seed, rendered to pixels."""

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
GRID = 3  # cells a side
CELL = 16  # pixels a side of a cell
SIDE = GRID * CELL
MIN_OBJECTS = 6
SPLITS = {"train": range(2, 10), "validation": range(1, 2), "test": range(1)}  # tenths of all layouts
_BLOCK = 4096  # scenes drawn at once: a longer split begins with the shorter one
_EMPTY = -1


@dataclass(frozen=True)
class Scenes:
    """Layouts and the numbers that draw them. Cells are in reading order; colour and shape are -1 where a cell is empty."""

    colour: Int[np.ndarray, "scenes cells"]
    shape: Int[np.ndarray, "scenes cells"]
    centre: Float[np.ndarray, "scenes cells 2"]  # pixels from the cell's upper left corner, x then y
    radius: Float[np.ndarray, "scenes cells"]  # pixels
    noise_seed: Int[np.ndarray, " scenes"]

    def __len__(self) -> int:
        return len(self.colour)

    def __getitem__(self, index: slice | np.ndarray) -> Scenes:
        return Scenes(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def split_of(
    colour: Int[np.ndarray, "scenes cells"], shape: Int[np.ndarray, "scenes cells"]
) -> Int[np.ndarray, " scenes"]:
    """The tenth (0 to 9) that a layout belongs to: a hash of the layout alone, so no two splits can share one."""
    state = np.where(colour == _EMPTY, 0, 1 + colour * len(SHAPES) + shape).astype(np.uint64)
    base = np.uint64(1 + len(COLOURS) * len(SHAPES))
    number = np.zeros(len(state), np.uint64)
    for cell in range(state.shape[1]):
        number = number * base + state[:, cell]
    number ^= number >> np.uint64(31)  # the finaliser of splitmix64 spreads neighbouring numbers
    number *= np.uint64(0xBF58476D1CE4E5B9)
    number ^= number >> np.uint64(27)
    return (number >> np.uint64(20)).astype(np.int64) % 10


def draw(split: str, seed: int, count: int) -> Scenes:
    """The first `count` scenes of a split. The same split and seed give the same scenes, whatever the count."""
    tenths = list(SPLITS[split])
    blocks: list[Scenes] = []
    while sum(map(len, blocks)) < count:
        rng = np.random.default_rng([seed, list(SPLITS).index(split), len(blocks)])
        block = _draw_block(rng)
        blocks.append(block[np.isin(split_of(block.colour, block.shape), tenths)])
    return Scenes(*(np.concatenate([getattr(b, name) for b in blocks]) for name in Scenes.__dataclass_fields__))[:count]


def _draw_block(rng: np.random.Generator) -> Scenes:
    size = (_BLOCK, GRID * GRID)
    objects = rng.integers(MIN_OBJECTS, GRID * GRID + 1, size=(_BLOCK, 1))
    filled = rng.random(size).argsort(axis=1).argsort(axis=1) < objects
    return Scenes(
        colour=np.where(filled, rng.integers(len(COLOURS), size=size), _EMPTY),
        shape=np.where(filled, rng.integers(len(SHAPES), size=size), _EMPTY),
        centre=CELL / 2 + rng.uniform(-1.5, 1.5, (*size, 2)),
        radius=rng.uniform(4.5, 6.5, size),
        noise_seed=rng.integers(2**31, size=_BLOCK),
    )


def render(scenes: Scenes) -> UInt8[np.ndarray, "scenes side side 3"]:
    """Pixels of scenes: shapes with soft edges over grey, with Gaussian noise of 6 grey levels."""
    ys, xs = np.mgrid[:CELL, :CELL].astype(np.float32) + np.float32(0.5)
    dx = xs - scenes.centre[..., 0, None, None].astype(np.float32)  # [scenes, cells, CELL, CELL]
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
    cover = np.where(shape == _EMPTY, 0, np.clip(0.5 - distance, 0, 1))[..., None]
    paint = np.array(list(COLOURS.values()), np.float32)[np.maximum(scenes.colour, 0)][:, :, None, None, :]
    cells = 235 * (1 - cover) + paint * cover
    image = cells.reshape(-1, GRID, GRID, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, SIDE, SIDE, 3)
    noise = np.stack([np.random.default_rng(s).standard_normal((SIDE, SIDE, 1), np.float32) for s in scenes.noise_seed])
    return np.clip(image + 6 * noise, 0, 255).round().astype(np.uint8)
