"""Visual tokens dropped inside the language model: reduction methods, and pre-fusion within its first layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from experiments.config.schema import Config, ReductionConfig
from experiments.models.reduction_schedule import inside_prefusion_token_shares, reduction_layers
from probes.interventions import Receipt, RemoveTokens, intervene
from probes.pruning import RemovalMode, dart, fastv, pyramid_drop, random_drop, sparsevlm, vtw
from probes.tokens.token_map import TokenMap, visual_token_ids

TokenDropper = Callable[[PreTrainedModel, Mapping[str, Any]], AbstractContextManager[Receipt | None]]
"""Makes the context of one forward call from the model and its inputs. The context drops visual tokens inside the language
model and yields the receipt, or None if it drops nothing."""


def keep_all_tokens(model: PreTrainedModel, inputs: Mapping[str, Any]) -> AbstractContextManager[Receipt | None]:
    """Return a context in which forward calls keep all tokens."""
    return nullcontext()


def token_dropper_for_training(config: Config) -> TokenDropper:
    """Return what drops visual tokens in the forward calls of training.

    Reductions were published as methods for trained models. Their rows are trained without them, as long as the others,
    and use them only to answer. Pre-fusion within the language model is part of the model.
    """
    if config.prefusion.location == "outside":
        return keep_all_tokens
    return _for_visual_inputs(
        lambda model, tokens: prefuse_inside(model, tokens, config.prefusion.layers), needs_places=True
    )


def token_dropper_for_inference(config: Config) -> TokenDropper:
    """Return what drops visual tokens in the forward calls that answer questions."""
    if config.reduction.name == "none":
        return token_dropper_for_training(config)
    return _for_visual_inputs(
        lambda model, tokens: reduce_visual_tokens(model, tokens, config.reduction, seed=config.seed),
        needs_places=False,
    )


def _for_visual_inputs(
    make_context: Callable[[PreTrainedModel, TokenMap], AbstractContextManager[Receipt | None]], needs_places: bool
) -> TokenDropper:
    """Return a token dropper that leaves batches of text alone unchanged.

    Args:
        make_context: Makes the context of a batch with visual tokens.
        needs_places: Whether the token map must know where in the image each token lies.
    """

    def drop_tokens(model: PreTrainedModel, inputs: Mapping[str, Any]) -> AbstractContextManager[Receipt | None]:
        visual_ids = torch.tensor(visual_token_ids(model.config), device=inputs["input_ids"].device)
        if not torch.isin(inputs["input_ids"], visual_ids).any():
            return nullcontext()
        # `pixel_values` may be cached features, and a LLaVA's image layout cannot be derived from their shape.
        map_inputs = {name: value for name, value in inputs.items() if needs_places or name != "pixel_values"}
        return make_context(model, TokenMap.from_inputs(model, map_inputs))

    return drop_tokens


def reduce_visual_tokens(
    model: PreTrainedModel, tokens: TokenMap, config: ReductionConfig, how: RemovalMode = "drop", seed: int = 0
) -> AbstractContextManager[Receipt | None]:
    """Return a context in which forward calls run on fewer and fewer visual tokens.

    The methods and their papers are described in probes/pruning/.

    Args:
        model: The model.
        tokens: Token map of the inputs.
        config: Method, layers and share of kept tokens.
        how: "drop" tokens, or "mask" them.
        seed: Seed of random_drop.

    Raises:
        ValueError: As `reduction_layers`.
    """
    if config.name == "none":
        return nullcontext()
    layers = reduction_layers(config, model.config.get_text_config().num_hidden_layers)
    if config.name == "vtw":
        return vtw(model, tokens, layers[0], how=how)
    if config.name == "fastv":
        return fastv(model, tokens, layers[0], config.keep, how=how)
    if config.name == "dart":
        return dart(model, tokens, layers[0], config.keep, how=how)
    if config.name == "sparsevlm":
        return sparsevlm(model, tokens, layers, config.keep, how=how)
    if config.name == "random_drop":
        return random_drop(model, tokens, layers[0], config.keep, seed, how=how)
    return pyramid_drop(model, tokens, layers, config.keep, how=how)


def prefuse_inside(
    model: PreTrainedModel, tokens: TokenMap, layers: int, how: RemovalMode = "drop"
) -> AbstractContextManager[Receipt]:
    """Return a context of pre-fusion within the language model (LLaVA-Mini, appendix E.3 and Table 12).

    The language model's first `layers` layers get the patches, and later layers do not. All text is fused there, answers
    too, since it passes through the same causal layers. Position ids do not change.

    Args:
        model: A LLaVA-Mini with `keep_patches`.
        tokens: Token map of its inputs, with places.
        layers: How many first layers get the patches.
        how: "drop" the patches in later layers, or "mask" them.
    """
    depth = model.config.get_text_config().num_hidden_layers
    return intervene(model, tokens, RemoveTokens(patch_mask(tokens), range(layers, depth), how=how))


def patch_mask(tokens: TokenMap) -> Bool[Tensor, "batch positions"]:
    """Return which tokens of a LLaVA-Mini with `keep_patches` are patches.

    Patches are the visual tokens of all but the last tile of every frame. The last tile holds the compressed tokens.

    Raises:
        ValueError: If the map has no places.
    """
    places, vision = tokens.require_places(), tokens.mask("vision")
    row, tile = vision.nonzero()[:, 0], places.tile[vision]
    _, frame = torch.stack([row, places.image[vision], places.frame[vision]]).unique(dim=1, return_inverse=True)
    last_tile = torch.zeros_like(tile).scatter_reduce(0, frame, tile, "amax")
    patches = vision.clone()
    patches[vision] = tile < last_tile[frame]
    return patches


def check_token_reduction(model: PreTrainedModel, config: Config) -> None:
    """Check, before anything runs, that the cell's reduction or inside pre-fusion can run.

    Raises:
        ValueError: If layers are outside the model, there are no visual tokens to drop, or the cell wants a probe that is
            undefined for a model that drops tokens.
    """
    reduction, prefusion = config.reduction, config.prefusion
    inside = prefusion.location == "inside"
    if reduction.name == "none" and not inside:
        return
    setting = f"reduction={reduction.name}" if reduction.name != "none" else "prefusion.location=inside"
    depth = model.config.get_text_config().num_hidden_layers
    if inside and reduction.name != "none":
        raise ValueError(f"{setting}: prefusion.location=inside drops patches itself; leave out one of the two")
    if inside:
        inside_prefusion_token_shares(prefusion.layers, depth, 1, 1)
    else:
        reduction_layers(reduction, depth)
    if getattr(model.config, "compressor", "none") != "none" and not model.config.compressor_size:
        raise ValueError(
            f"{setting}: with compressor.size=0 the language model gets no visual token to drop; set it to at least 1"
        )
    probes: Sequence[str] = ("attention", "removal", "onset", "knockout", "readout", "lens", "view_questions")
    for name in probes:
        if getattr(config.probe, name):
            raise ValueError(
                f"probe.{name}: it needs a model that keeps its visual tokens; set probe.{name}=false with {setting}"
            )
