"""Visual tokens that leave the language model on the way: in-LLM reduction, and pre-fusion within its first layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from experiments.config.schema import Config, ReductionConfig
from experiments.models.reduction_schedule import first_layers, visual_inside
from probes.interventions import Receipt, RemoveTokens, intervene
from probes.pruning import How, fastv, pyramid_drop, vtw
from probes.tokens.token_map import TokenMap, visual_token_ids

# What goes around a forward call with these inputs: it gives the receipt of what it took out, if anything.
Around = Callable[[PreTrainedModel, Mapping[str, Any]], AbstractContextManager[Receipt | None]]


def untouched(model: PreTrainedModel, inputs: Mapping[str, Any]) -> AbstractContextManager[Receipt | None]:
    """Around a call from which nothing is taken out."""
    return nullcontext()


def in_training(config: Config) -> Around:
    """What goes around the forward calls of training.

    FastV, VTW and PyramidDrop were published as methods for trained models: a row of theirs is trained without them, as
    long as the others, and answers with them. Pre-fusion within the language model is part of the model.
    """
    if config.prefusion.place == "outside":
        return untouched
    return _where_vision_is(lambda model, tokens: fusing_inside(model, tokens, config.prefusion.layers), places=True)


def in_answering(config: Config) -> Around:
    """What goes around the forward calls in which questions are answered."""
    if config.reduction.name == "none":
        return in_training(config)
    return _where_vision_is(lambda model, tokens: reducing(model, tokens, config.reduction), places=False)


def _where_vision_is(
    context: Callable[[PreTrainedModel, TokenMap], AbstractContextManager[Receipt | None]], places: bool
) -> Around:
    def around(model: PreTrainedModel, inputs: Mapping[str, Any]) -> AbstractContextManager[Receipt | None]:
        visual = torch.tensor(visual_token_ids(model.config), device=inputs["input_ids"].device)
        if not torch.isin(inputs["input_ids"], visual).any():
            return nullcontext()
        # what stands in the place of pixels may be kept features, whose shape tells a LLaVA's layout nothing
        known = {name: value for name, value in inputs.items() if places or name != "pixel_values"}
        return context(model, TokenMap.from_inputs(model, known))

    return around


def reducing(
    model: PreTrainedModel, tokens: TokenMap, config: ReductionConfig, how: How = "drop"
) -> AbstractContextManager[Receipt | None]:
    """Runs forward calls on fewer and fewer visual tokens; see probes/pruning.py for the methods and their papers.

    Raises:
        ValueError: As `first_layers`.
    """
    if config.name == "none":
        return nullcontext()
    layers = first_layers(config, model.config.get_text_config().num_hidden_layers)
    if config.name == "vtw":
        return vtw(model, tokens, layers[0], how=how)
    if config.name == "fastv":
        return fastv(model, tokens, layers[0], config.keep, how=how)
    return pyramid_drop(model, tokens, layers, config.keep, how=how)


def fusing_inside(
    model: PreTrainedModel, tokens: TokenMap, layers: int, how: How = "drop"
) -> AbstractContextManager[Receipt]:
    """Pre-fusion within the language model (LLaVA-Mini, appendix E.3 and Table 12): its own first `layers` layers see
    the patches, those after do not. All text, answers too, is fused there, since it goes through the same causal layers.
    Positions stay what they were.

    Args:
        tokens: Of a LLaVA-Mini with `keep_patches`, with their places.
    """
    depth = model.config.get_text_config().num_hidden_layers
    return intervene(model, tokens, RemoveTokens(patches(tokens), range(layers, depth), how=how))


def patches(tokens: TokenMap) -> Bool[Tensor, "batch positions"]:
    """Which visual tokens of a LLaVA-Mini with `keep_patches` are patches: all but the last tile of every frame, which
    is that of its compressed tokens.

    Raises:
        ValueError: If the map has no places.
    """
    places, found = tokens.require_places(), tokens.mask("vision")
    row, tile = found.nonzero()[:, 0], places.tile[found]
    _, frame = torch.stack([row, places.image[found], places.frame[found]]).unique(dim=1, return_inverse=True)
    last = torch.zeros_like(tile).scatter_reduce(0, frame, tile, "amax")
    found[found.clone()] = tile < last[frame]
    return found


def check(model: PreTrainedModel, config: Config) -> None:
    """Before anything runs: can it be done?

    Raises:
        ValueError: If layers are outside the model, there are no visual tokens to drop, or the cell wants a probe that
            is not defined where tokens leave on the way.
    """
    reduction, prefusion = config.reduction, config.prefusion
    inside = prefusion.place == "inside"
    if reduction.name == "none" and not inside:
        return
    wanted = f"reduction={reduction.name}" if reduction.name != "none" else "prefusion.place=inside"
    depth = model.config.get_text_config().num_hidden_layers
    if inside and reduction.name != "none":
        raise ValueError(f"{wanted}: prefusion.place=inside takes patches out itself; leave out one of the two")
    if inside:
        visual_inside(prefusion.layers, depth, 1, 1)
    else:
        first_layers(reduction, depth)
    if getattr(model.config, "compressor", "none") != "none" and not model.config.compressor_size:
        raise ValueError(f"{wanted}: with compressor.size=0 the language model sees no visual token to drop")
    probes: Sequence[str] = ("attention", "removal", "knockout", "readout", "lens")
    for name in probes:
        if getattr(config.probe, name):
            raise ValueError(f"probe.{name} looks at a model that keeps its visual tokens: leave it out with {wanted}")
