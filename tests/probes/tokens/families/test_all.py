"""Token maps, recording and interventions on every model family, with its own mask, cache and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from probes import RemoveTokens, TokenMap, intervene, record_attention
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.interventions import BlockAttention
from tests.probes.tokens.families.boxes import CoordinateImage
from tests.probes.tokens.families.build import LAYERS, MODEL_FAMILIES, tiny
from tests.probes.tokens.families.tiny_family import attentions

TEXTS = ["see # ?", "there is nothing to see", "the first # and then # of these"]
IMAGES = [[CoordinateImage(40, 24)], [], [CoordinateImage(24, 32), CoordinateImage(33, 30)]]
STEPS = 3


def make_inputs(family: str, side: str) -> dict[str, Any]:
    images = [[image.image for image in row] for row in IMAGES]
    return dict(tiny(family)(TEXTS, images, side))


def statistics_from_matrices(
    weights: Tensor, labels: Tensor, tokens: TokenMap, targets: Sequence[str]
) -> dict[str, Tensor]:
    """Return the statistics of full attention `[layers, batch, heads, positions, positions]`; hidden edges are 0."""
    visible = (weights > 0).any(2).float()
    weights = weights.double()
    in_source = torch.stack([labels == tokens.index(group) for group in tokens.groups]).double()
    in_target = torch.stack([labels == tokens.index(group) for group in targets]).double()
    attends = torch.einsum("lbqk,sbk->lbqs", visible.double(), in_source) > 0
    mass = torch.einsum("lbhqk,sbk->lbhqs", weights, in_source)
    inside = weights[..., None, :] * in_source.transpose(0, 1)[None, :, None, None] / mass[..., None].clamp(min=1e-300)
    entropy = -torch.xlogy(inside, inside).sum(-1)
    count = torch.einsum("tbq,lbqs->lbts", in_target, attends.double())[:, :, None]
    receivers = torch.einsum("tbq,lbqk->lbtk", in_target, visible.double())[:, :, None]
    return {
        "mass": torch.einsum("tbq,lbhqs->lbhts", in_target, mass * attends[:, :, None]) / count,
        "entropy": torch.einsum("tbq,lbhqs->lbhts", in_target, entropy * attends[:, :, None]) / count,
        "received": torch.einsum("tbq,lbhqk->lbhtk", in_target, weights) / receivers,
    }


def check_statistics(record: Any, expected: dict[str, Tensor]) -> None:
    for name, values in expected.items():
        values = values.float()
        if name == "received":  # a position without attending queries has no mean
            values = values.masked_fill(values.isinf(), float("nan"))
        torch.testing.assert_close(getattr(record, name), values, atol=1e-5, rtol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_from_inputs_returns_partition_of_every_row(family: str, side: str) -> None:
    """Image tokens of the processor are vision; the markers around them are text."""
    inputs, model, processor = make_inputs(family, side), tiny(family).model(), tiny(family).processor
    tokens = TokenMap.from_inputs(model, inputs)
    visual = getattr(model.config, "image_token_id", None)
    memberships = torch.stack([tokens.mask(group) for group in tokens.groups])
    assert (memberships.sum(0) == 1).all()
    assert torch.equal(tokens.mask("pad"), inputs["attention_mask"] == 0)
    assert tokens.mask("pad")[1, 0 if side == "left" else -1], "the row without an image is the shortest"
    assert torch.equal(tokens.mask("vision"), inputs["input_ids"] == visual)
    assert torch.equal(tokens.require_places().image >= 0, tokens.mask("vision"))
    assert tokens.require_places().image.amax(1).tolist() == [0, -1, 1]

    def decoded(row: int, group: str) -> str:
        return processor.tokenizer.decode(inputs["input_ids"][row][tokens.mask(group)[row]])

    assert decoded(0, "system").startswith("see ")
    assert decoded(0, "instruction").strip().endswith("?")
    assert decoded(1, "system") == ""
    assert decoded(1, "instruction").replace("<bos>", "").strip() == TEXTS[1]
    assert decoded(2, "system").startswith("the first ")
    assert " and then " in decoded(2, "instruction")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_record_attention_equals_eager_attention(family: str, side: str) -> None:
    inputs, model = make_inputs(family, side), tiny(family).model()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        plain = model(**inputs).logits
        with record_attention(model, tokens) as attention:
            recorded = model(**inputs).logits
        weights = attentions(tiny(family).model("eager")(**inputs, output_attentions=True))
    assert torch.equal(plain, recorded), "recording does not change the output"
    assert len(weights) == LAYERS
    check_statistics(
        attention, statistics_from_matrices(torch.stack(weights), tokens.labels, tokens, attention.targets)
    )
    image_mass = attention.mass[..., attention.targets.index("instruction"), tokens.index("vision")]
    assert image_mass[:, [0, 2]].isfinite().all()
    assert image_mass[:, 1].isnan().all(), "a row without an image has no attention to vision"


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_record_attention_in_generation_equals_eager_attention(family: str) -> None:
    inputs = make_inputs(family, "left")
    generation = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True}
    model = tiny(family).model()
    tokens = TokenMap.from_inputs(model, inputs)
    plain = model.generate(**inputs, **generation)
    with record_attention(model, tokens) as attention:
        recorded = model.generate(**inputs, **generation)
    eager = tiny(family).model("eager").generate(**inputs, **generation, output_attentions=True)
    assert torch.equal(plain.sequences, recorded.sequences)
    assert torch.equal(plain.sequences, eager.sequences)

    length = inputs["input_ids"].shape[1]
    weights = torch.stack([join_steps(layer, length) for layer in zip(*eager.attentions, strict=True)])
    labels = torch.nn.functional.pad(tokens.labels, (0, STEPS - 1), value=tokens.index("response"))
    assert "response" in attention.targets
    check_statistics(attention, statistics_from_matrices(weights, labels, tokens, attention.targets))


def join_steps(steps: Sequence[Tensor], length: int) -> Tensor:
    """Return one layer's attention over all steps as one square matrix; a sliding cache keeps only the last keys."""
    square = torch.zeros(*steps[0].shape[:2], length + len(steps) - 1, length + len(steps) - 1)
    for step, weights in enumerate(steps):
        queries, keys = weights.shape[2:]
        stop = length + step
        square[:, :, stop - queries : stop, stop - keys : stop] = weights
    return square


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_remove_tokens_in_last_layer_changes_only_that_layer(family: str) -> None:
    """The last layer has no attention to the removed tokens; earlier layers are unchanged."""
    inputs, model = make_inputs(family, "left"), tiny(family).model()
    tokens = TokenMap.from_inputs(model, inputs)
    vision, last = tokens.index("vision"), LAYERS - 1
    with torch.no_grad():
        with record_attention(model, tokens, targets=["instruction"]) as before:
            plain = model(**inputs).logits
        removal = RemoveTokens("vision", layers=[last])
        with (
            intervene(model, tokens, removal) as receipt,
            record_attention(model, tokens, targets=["instruction"]) as after,
        ):
            removed = model(**inputs).logits
    assert receipt[0].tokens == {last: int(tokens.mask("vision").sum())}
    torch.testing.assert_close(after.mass[:last], before.mass[:last], atol=0, rtol=0, equal_nan=True)
    assert after.mass[last, ..., vision].isnan().all()
    assert not torch.allclose(plain[:, -1], removed[:, -1])


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_block_attention_of_text_to_images_equals_masked_eager_attention(family: str) -> None:
    """The mask of the eager model blocks the same edges."""
    inputs, model, middle = make_inputs(family, "left"), tiny(family).model(), 1
    tokens = TokenMap.from_inputs(model, inputs)
    edges = tokens.mask("instruction")[:, None, :, None] & tokens.mask("vision")[:, None, None, :]
    eager = tiny(family).model("eager")

    def block(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": kwargs["attention_mask"].masked_fill(edges, -torch.inf)}

    with torch.no_grad():
        with intervene(model, tokens, BlockAttention("vision", "instruction", layers=[middle])) as receipt:
            blocked = model(**inputs).logits
        unblocked = eager(**inputs).logits
        decoder_layers(find_decoder(eager))[middle].register_forward_pre_hook(block, with_kwargs=True)
        expected = eager(**inputs).logits
    assert receipt[0].mass == {middle: 0.0}
    real = ~tokens.mask("pad")
    torch.testing.assert_close(blocked[real], expected[real], atol=1e-4, rtol=0)
    assert (expected[real] - unblocked[real]).abs().max() > 1e-2


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_find_decoder_returns_language_model(family: str) -> None:
    model: PreTrainedModel = tiny(family).model()
    decoder = find_decoder(model)
    assert decoder.config.model_type == model.config.get_text_config(decoder=True).model_type
    assert len(decoder_layers(decoder)) == LAYERS
    names = {module: name for name, module in model.named_modules()}
    assert not any(tiny(family).vision in names[layer] for layer in decoder_layers(decoder))
    assert all(
        hasattr(layer.self_attn, "out_proj" if family == "blip_2" else "o_proj") for layer in decoder_layers(decoder)
    )
