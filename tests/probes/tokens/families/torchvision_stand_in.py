"""Import of transformers' image processors that need torchvision: where it is missing, torch resizes and pads."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from enum import Enum
from itertools import pairwise
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import image_processing_backends
from transformers.image_utils import PILImageResampling


class InterpolationMode(Enum):
    BILINEAR = "bilinear"
    LANCZOS = "lanczos"


def pil_to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize(image: Tensor, size: Sequence[int], interpolation: InterpolationMode, antialias: bool) -> Tensor:
    resized = torch.nn.functional.interpolate(image.float(), list(size), mode=interpolation.value, antialias=antialias)
    return resized if image.is_floating_point() else resized.round().to(image.dtype)


def pad(image: Tensor, padding: Sequence[int], fill: Any) -> Tensor:
    left, top, right, bottom = padding
    return torch.nn.functional.pad(image, (left, right, top, bottom))


def normalize(image: Tensor, mean: Any, std: Any, inplace: bool = False) -> Tensor:
    return (image - torch.as_tensor(mean)[:, None, None]) / torch.as_tensor(std)[:, None, None]


def import_with_torchvision(name: str) -> ModuleType:
    """Return a module of transformers that imports torchvision, with a stand-in where torchvision is missing."""
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(name)
    names = (
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.v2",
        "torchvision.transforms.v2.functional",
    )
    modules = {name: ModuleType(name) for name in names}
    for parent, child in pairwise(names):
        setattr(modules[parent], child.rpartition(".")[2], modules[child])
    for function in (InterpolationMode, pil_to_tensor, resize, pad, normalize):
        setattr(modules[names[-1]], function.__name__, function)
    image_processing_backends.tvF = modules[names[-1]]
    image_processing_backends.pil_torch_interpolation_mapping = {
        PILImageResampling.BILINEAR: InterpolationMode.BILINEAR
    }
    with patch.dict(sys.modules, modules):
        return importlib.import_module(name)
