"""Registry of visual layouts: for each model type, the function that arranges its visual tokens in grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PretrainedConfig

from probes.tokens.grid import Grid
from probes.tokens.model_inputs import ImageSizes

# Arguments: the model's config, the inputs of its call, the sizes of the original images, and the processor or None.
# Returns None for a variant whose layout is unknown.
LayoutFunction = Callable[[PretrainedConfig, Mapping[str, Any], ImageSizes, Any], list[Grid] | None]
LAYOUTS: dict[str, LayoutFunction] = {}


def register_layout(*model_types: str) -> Callable[[LayoutFunction], LayoutFunction]:
    """Register the decorated function as the visual layout of these model types.

    Args:
        model_types: Values of `config.model_type`; "TYPE/prefusion" names the pre-fusion layers of such a model.

    Returns:
        A decorator that returns the function unchanged.

    Example:
        >>> from probes.tokens.grid import Grid
        >>> @register_layout("one_square")
        ... def one_square_layout(config, inputs, sizes, processor):
        ...     return [Grid(image, 4, 4) for image in range(len(inputs["pixel_values"]))]
        >>> LAYOUTS.pop("one_square") is one_square_layout
        True
    """

    def register(function: LayoutFunction) -> LayoutFunction:
        LAYOUTS.update(dict.fromkeys(model_types, function))
        return function

    return register
