"""Interventions under a 4-D attention mask that the caller passes, against eager attention with the same mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from probes import BlockAttention, RemoveTokens, TokenMap, intervene
from tests.tiny_models import PATCHES

Model = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]
CUTS = {
    "block": BlockAttention("vision", "instruction", [1]),
    "mask": RemoveTokens("vision", [1, 2]),
    "drop": RemoveTokens("vision", [1, 2], how="drop"),
}
LENGTH = 13
MINIMUM = torch.finfo(torch.float32).min


@pytest.fixture
def inputs(make_rows: Callable[..., Inputs]) -> Inputs:
    return make_rows([(3, PATCHES, 6)], "left")


def visible_edges() -> Tensor:
    """Return causal edges without some of the text's, with two-way edges among visual tokens."""
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    visible[8:, 1] = False
    visible[3:7, 3:7] = True
    return visible


@pytest.mark.parametrize("hidden", [None, MINIMUM, -torch.inf], ids=["bool", "minimum", "infinite"])
def test_block_attention_given_mask_equals_eager_with_edges_cut(
    make_llava: Callable[..., Model], inputs: Inputs, hidden: float | None
) -> None:
    model, eager = make_llava(), make_llava("eager")
    tokens = TokenMap.from_inputs(model, inputs)
    visible = visible_edges()
    given = visible if hidden is None else torch.zeros(LENGTH, LENGTH).masked_fill(~visible, hidden)
    bias = torch.zeros(LENGTH, LENGTH).masked_fill(~visible, MINIMUM)

    def cut_edges(
        module: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[object, dict[str, Tensor]]:
        edges = tokens.mask("instruction")[0][:, None] & tokens.mask("vision")[0]
        return args, kwargs | {"attention_mask": kwargs["attention_mask"].masked_fill(edges, MINIMUM)}

    eager.get_decoder().layers[1].register_forward_pre_hook(cut_edges, with_kwargs=True)
    with torch.no_grad(), intervene(model, tokens, CUTS["block"]):
        actual = model(**inputs | {"attention_mask": given[None, None]}).logits
    with torch.no_grad():
        expected = eager(**inputs | {"attention_mask": bias[None, None]}).logits
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", CUTS)
def test_intervene_mask_of_each_head_raises(make_llava: Callable[..., Model], inputs: Inputs, cut: str) -> None:
    """Dropping tokens would use the first head's mask for all."""
    model = make_llava()
    mask = visible_edges().expand(1, 4, -1, -1)
    raises = pytest.raises(
        ValueError, match=r"\[1, 4, 13, 13\], not \[batch, 1, queries, keys\]; pass one mask for all"
    )
    with raises, torch.no_grad(), intervene(model, TokenMap.from_inputs(model, inputs), CUTS[cut]):
        model(**inputs | {"attention_mask": mask})


@pytest.mark.parametrize("cut", CUTS)
def test_intervene_bool_mask_under_eager_raises(make_llava: Callable[..., Model], inputs: Inputs, cut: str) -> None:
    """Eager attention adds 0 to the score of a hidden key and 1 to that of others, so nothing would be hidden."""
    model = make_llava("eager")
    mask = visible_edges()[None, None]
    raises = pytest.raises(ValueError, match=r"eager attention .* torch.bool .* pass an additive mask")
    with raises, torch.no_grad(), intervene(model, TokenMap.from_inputs(model, inputs), CUTS[cut]):
        model(**inputs | {"attention_mask": mask})
