"""How many visual tokens a method keeps, and the text tokens that it may consult."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from probes.hooks.decoder import select_layers
from probes.tokens.text_after_image import text_after_image
from probes.tokens.token_map import TokenMap

RemovalMode = Literal["mask", "drop"]
PositionMode = Literal["keep", "renumber"]


def count_kept_tokens(counts: Int[Tensor, "*rows"], keep: float) -> Int[Tensor, "*rows"]:
    """Return the share `keep` of each number of tokens, rounded down.

    Computed on the CPU in double precision: in single precision 1/3 of 9 may be less than 3.
    """
    return (counts.cpu().double() * keep + 1e-6).floor().long()


def check_share(keep: float) -> None:
    """Check that `keep` is a share that drops tokens.

    Raises:
        ValueError: It is not in 0 to below 1.
    """
    if not 0 <= keep < 1:
        raise ValueError(f"keep={keep} does not drop anything: it must be a share from 0 to below 1")


def check_layers(decoder: PreTrainedModel, layers: Sequence[int]) -> tuple[int, ...]:
    """Check that tokens can be dropped at `layers` by what the layers before them compute, and return the layers.

    Args:
        decoder: The stack of decoder layers.
        layers: Layers where tokens are dropped.

    Raises:
        ValueError: They are not ascending from 1, or one is outside the model.
    """
    starts = select_layers(decoder, layers)
    if not starts or list(layers) != list(starts) or starts[0] == 0:
        raise ValueError(
            f"layers {list(layers)} cannot drop by the attention of the layer before: name ascending layers from 1 on"
        )
    return starts


def prompt_tokens(tokens: TokenMap) -> Bool[Tensor, "batch positions"]:
    """Return the positions of the prompt: no padding, and no response, which does not exist yet when tokens are chosen."""
    prompt = tokens.labels != tokens.index(tokens.generated)
    if "pad" in tokens.groups:
        prompt &= ~tokens.mask("pad")
    return prompt


def question_tokens(tokens: TokenMap) -> Bool[Tensor, "batch positions"]:
    """Return the text tokens of the prompt that follow the first visual token of their row."""
    return prompt_tokens(tokens) & text_after_image(tokens)
