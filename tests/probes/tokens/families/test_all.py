"""What every probe promises, on every family: its mask, its cache and its positions are its own."""

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
from tests.probes.tokens.families.boxes import Picture
from tests.probes.tokens.families.build import FAMILIES, LAYERS, tiny

TEXTS = ["see # ?", "there is nothing to see", "the first # and then # of these"]
PICTURES = [[Picture(40, 24)], [], [Picture(24, 32), Picture(33, 30)]]
STEPS = 3


def make_inputs(family: str, side: str) -> dict[str, Any]:
    images = [[picture.image for picture in row] for row in PICTURES]
    return dict(tiny(family)(TEXTS, images, side))


def from_matrices(weights: Tensor, labels: Tensor, tokens: TokenMap, targets: Sequence[str]) -> dict[str, Tensor]:
    """The statistics from full attention `[layers, batch, heads, positions, positions]`; what is hidden has none."""
    visible = (weights > 0).any(2).float()
    weights = weights.double()
    of_source = torch.stack([labels == tokens.index(group) for group in tokens.groups]).double()
    of_target = torch.stack([labels == tokens.index(group) for group in targets]).double()
    sees = torch.einsum("lbqk,sbk->lbqs", visible.double(), of_source) > 0
    mass = torch.einsum("lbhqk,sbk->lbhqs", weights, of_source)
    inside = weights[..., None, :] * of_source.transpose(0, 1)[None, :, None, None] / mass[..., None].clamp(min=1e-300)
    entropy = -torch.xlogy(inside, inside).sum(-1)
    count = torch.einsum("tbq,lbqs->lbts", of_target, sees.double())[:, :, None]
    receivers = torch.einsum("tbq,lbqk->lbtk", of_target, visible.double())[:, :, None]
    return {
        "mass": torch.einsum("tbq,lbhqs->lbhts", of_target, mass * sees[:, :, None]) / count,
        "entropy": torch.einsum("tbq,lbhqs->lbhts", of_target, entropy * sees[:, :, None]) / count,
        "received": torch.einsum("tbq,lbhqk->lbhtk", of_target, weights) / receivers,
    }


def check(record: Any, expected: dict[str, Tensor]) -> None:
    for name, values in expected.items():
        values = values.float()
        if name == "received":  # nobody's attention on a position that nobody sees
            values = values.masked_fill(values.isinf(), float("nan"))
        torch.testing.assert_close(getattr(record, name), values, atol=1e-5, rtol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_groups_partition_every_row(family: str, side: str) -> None:
    """Against the processor's own text: what it made of a picture's mark is vision, with its frame around it text."""
    inputs, model, processor = make_inputs(family, side), tiny(family).model(), tiny(family).processor
    tokens = TokenMap.from_inputs(model, inputs)
    visual = getattr(model.config, "image_token_id", None)
    members = torch.stack([tokens.mask(group) for group in tokens.groups])
    assert (members.sum(0) == 1).all()
    assert torch.equal(tokens.mask("pad"), inputs["attention_mask"] == 0)
    assert tokens.mask("pad")[1, 0 if side == "left" else -1], "the row without a picture is the shortest"
    assert torch.equal(tokens.mask("vision"), inputs["input_ids"] == visual)
    assert torch.equal(tokens.require_places().image >= 0, tokens.mask("vision"))
    assert tokens.require_places().image.amax(1).tolist() == [0, -1, 1]

    def said(row: int, group: str) -> str:
        return processor.tokenizer.decode(inputs["input_ids"][row][tokens.mask(group)[row]])

    assert said(0, "system").startswith("see ")
    assert said(0, "instruction").strip().endswith("?")
    assert said(1, "system") == ""
    assert said(1, "instruction").replace("<bos>", "").strip() == TEXTS[1]
    assert said(2, "system").startswith("the first ")
    assert " and then " in said(2, "instruction")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recording_agrees_with_eager_attention(family: str, side: str) -> None:
    inputs, model = make_inputs(family, side), tiny(family).model()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        plain = model(**inputs).logits
        with record_attention(model, tokens) as attention:
            recorded = model(**inputs).logits
        attentions = tiny(family).model("eager")(**inputs, output_attentions=True).attentions
    assert torch.equal(plain, recorded), "recording changes no bit of the output"
    assert len(attentions) == LAYERS
    check(attention, from_matrices(torch.stack(attentions), tokens.labels, tokens, attention.targets))
    of_pictures = attention.mass[..., attention.targets.index("instruction"), tokens.index("vision")]
    assert of_pictures[:, [0, 2]].isfinite().all()
    assert of_pictures[:, 1].isnan().all(), "a row without a picture has no attention to one"


@pytest.mark.parametrize("family", FAMILIES)
def test_recording_while_generating_agrees_with_eager_attention(family: str) -> None:
    inputs = make_inputs(family, "left")
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True}
    model = tiny(family).model()
    tokens = TokenMap.from_inputs(model, inputs)
    plain = model.generate(**inputs, **settings)
    with record_attention(model, tokens) as attention:
        recorded = model.generate(**inputs, **settings)
    eager = tiny(family).model("eager").generate(**inputs, **settings, output_attentions=True)
    assert torch.equal(plain.sequences, recorded.sequences)
    assert torch.equal(plain.sequences, eager.sequences)

    length = inputs["input_ids"].shape[1]
    weights = torch.stack([joined(layer, length) for layer in zip(*eager.attentions, strict=True)])
    labels = torch.nn.functional.pad(tokens.labels, (0, STEPS - 1), value=tokens.index("response"))
    assert "response" in attention.targets
    check(attention, from_matrices(weights, labels, tokens, attention.targets))


def joined(steps: Sequence[Tensor], length: int) -> Tensor:
    """One layer's attention over all steps as one square; a sliding cache has kept the last keys alone."""
    square = torch.zeros(*steps[0].shape[:2], length + len(steps) - 1, length + len(steps) - 1)
    for step, weights in enumerate(steps):
        queries, keys = weights.shape[2:]
        stop = length + step
        square[:, :, stop - queries : stop, stop - keys : stop] = weights
    return square


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_the_pictures_late(family: str) -> None:
    """In the last layer nothing looks at them any more; the layers before are as they were."""
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


@pytest.mark.parametrize("family", FAMILIES)
def test_blocking_the_view_of_the_pictures(family: str) -> None:
    """As eager attention under a mask from which these edges were taken by hand."""
    inputs, model, middle = make_inputs(family, "left"), tiny(family).model(), 1
    tokens = TokenMap.from_inputs(model, inputs)
    edges = tokens.mask("instruction")[:, None, :, None] & tokens.mask("vision")[:, None, None, :]
    eager = tiny(family).model("eager")

    def cut(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attention_mask": kwargs["attention_mask"].masked_fill(edges, -torch.inf)}

    with torch.no_grad():
        with intervene(model, tokens, BlockAttention("vision", "instruction", layers=[middle])) as receipt:
            blocked = model(**inputs).logits
        uncut = eager(**inputs).logits
        decoder_layers(find_decoder(eager))[middle].register_forward_pre_hook(cut, with_kwargs=True)
        expected = eager(**inputs).logits
    assert receipt[0].mass == {middle: 0.0}
    said = ~tokens.mask("pad")
    torch.testing.assert_close(blocked[said], expected[said], atol=1e-4, rtol=0)
    assert (expected[said] - uncut[said]).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_the_language_model(family: str) -> None:
    model: PreTrainedModel = tiny(family).model()
    decoder = find_decoder(model)
    assert decoder.config.model_type == model.config.get_text_config(decoder=True).model_type
    assert len(decoder_layers(decoder)) == LAYERS
    names = {module: name for name, module in model.named_modules()}
    assert not any(tiny(family).vision in names[layer] for layer in decoder_layers(decoder))
    assert all(layer.self_attn.o_proj is not None for layer in decoder_layers(decoder))
