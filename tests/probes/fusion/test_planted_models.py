from __future__ import annotations

import math
import re

import pytest
import torch

from probes.attention.recording import record_attention
from probes.fusion.planted_models import ANSWER_IDS, COLOURS, PATCHES_PER_IMAGE, planted
from probes.tokens.token_map import TokenMap


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [1, 3, 5, (1, 2), (2, 5), None])
def test_planted_model_answers_correctly_with_certainty(
    layer: int | tuple[int, int] | None, implementation: str
) -> None:
    model = planted(layer, layers=5)
    model.model.set_attn_implementation(implementation)
    samples = model.samples(32)
    logits = model.model(**samples.inputs).logits
    assert (logits[:, -1].argmax(-1) == samples.answers).all()
    assert samples.score(logits).min() > -1e-6
    assert (samples.answers == ANSWER_IDS.start + (samples.hints if layer is None else samples.colours)).all()


@pytest.mark.parametrize("layer", [1, 4, (2, 4), None])
def test_planted_text_attends_to_image_only_in_planted_layers(layer: int | tuple[int, int] | None) -> None:
    """Measured on the attention matrices that transformers returns."""
    model = planted(layer, layers=4)
    model.model.set_attn_implementation("eager")
    samples = model.samples(8)
    tokens = TokenMap.from_inputs(model.model, samples.inputs)
    vision, text = tokens.mask("vision"), tokens.mask("instruction")
    weights = model.model(**samples.inputs, output_attentions=True).attentions
    for number, layer_weights in enumerate(weights, start=1):
        mass = (layer_weights[:, 0] * vision[:, None, :]).sum(-1)
        assert mass[text] == pytest.approx(float(number in model.reads), abs=1e-6)
        assert mass[~text & ~tokens.mask("pad")].max() == 0, (
            "neither visual tokens nor earlier text attend to the image"
        )


def test_planted_model_with_changed_image_changes_answer() -> None:
    """An inverted image inverts the answer; a grey one makes the four colours equally likely. The hint has no effect."""
    model = planted(2, layers=4)
    samples = model.samples(8)
    inverted = samples.inputs | {"pixel_values": -samples.inputs["pixel_values"]}
    assert (model.model(**inverted).logits[:, -1].argmax(-1) == ANSWER_IDS.stop - 1 - samples.colours).all()
    grey = samples.inputs | {"pixel_values": torch.zeros_like(samples.inputs["pixel_values"])}
    assert samples.score(model.model(**grey).logits) == pytest.approx(-math.log(4), abs=1e-5)


def test_planted_pair_without_second_layer_reads_one_colour() -> None:
    """The second reading layer gets the attention weights of a layer that does not read, so blue is not read."""
    model, single = planted((2, 4), layers=5), planted(1, layers=5)
    samples = model.samples(16)
    for name in ("q_proj", "k_proj"):
        not_reading = single.model.get_parameter(f"model.language_model.layers.2.self_attn.{name}.weight")
        model.model.get_parameter(f"model.language_model.layers.3.self_attn.{name}.weight").copy_(not_reading)
    logits = model.model(**samples.inputs).logits
    assert samples.score(logits) == pytest.approx(-math.log(2), abs=1e-4)
    red = samples.colours % 2
    assert ((logits[:, -1, ANSWER_IDS.start :].argmax(-1) % 2) == red).all()


def test_planted_control_with_other_image_gives_identical_logits() -> None:
    control = planted(None, layers=4)
    samples = control.samples(8)
    other_images = samples.inputs | {"pixel_values": torch.randn(8, 3, 8, 8)}
    first, second = control.model(**samples.inputs).logits, control.model(**other_images).logits
    assert torch.equal(first[:, -1], second[:, -1])
    assert control.reads == ()


def test_samples_with_seed_are_balanced_padded_and_reproducible() -> None:
    model = planted(1, layers=1)
    samples, same_seed, other_seed = model.samples(40, seed=1), model.samples(40, seed=1), model.samples(40, seed=2)
    assert torch.equal(samples.colours.bincount(), torch.full((len(COLOURS),), 10))
    tokens = TokenMap.from_inputs(model.model, samples.inputs)
    assert (tokens.mask("vision").sum(1) == PATCHES_PER_IMAGE).all()
    assert len(tokens.mask("pad").sum(1).unique()) == 4, "texts of four lengths"
    assert not tokens.mask("pad")[:, -1].any(), "padding is on the left"
    for name, values in samples.inputs.items():
        assert torch.equal(values, same_seed.inputs[name])
        assert name == "attention_mask" or not torch.equal(values, other_seed.inputs[name])
    images = samples.inputs["pixel_values"].flatten(1)
    assert len(images.unique(dim=0)) == 40, "all images differ"


def test_planted_model_without_padding_gives_same_logits() -> None:
    model = planted(3, layers=4)
    samples = model.samples(8)
    together = model.model(**samples.inputs).logits[:, -1]
    for row, real in enumerate(samples.inputs["attention_mask"].bool()):
        alone = {
            "input_ids": samples.inputs["input_ids"][row, real][None],
            "pixel_values": samples.inputs["pixel_values"][row][None],
        }
        assert model.model(**alone).logits[0, -1] == pytest.approx(together[row], abs=1e-4)


def test_planted_model_generate_returns_answer() -> None:
    model = planted(2, layers=3)
    samples = model.samples(8)
    generated = model.model.generate(**samples.inputs, max_new_tokens=1, do_sample=False)
    assert torch.equal(generated[:, -1], samples.answers)


def test_planted_leaves_random_state_unchanged() -> None:
    before = torch.random.get_rng_state()
    planted(1, layers=2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("layer", [0, 5, (2, 2), (3, 1), (1, 2, 3), (0, 2)])
def test_planted_with_invalid_layer_raises_value_error(layer: int | tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"layer is {re.escape(str(layer))}.*1 to 4"):
        planted(layer, layers=4)  # type: ignore[arg-type]


def test_planted_text_with_long_prompt_attends_to_image_alone() -> None:
    """Attention does not depend on distance: 500 more words after the image change nothing."""
    model = planted(2, layers=3)
    samples = model.samples(2)
    words = torch.full((2, 500), 3)
    longer = samples.inputs | {
        "input_ids": torch.cat([samples.inputs["input_ids"], words], 1),
        "attention_mask": torch.cat([samples.inputs["attention_mask"], torch.ones_like(words)], 1),
    }
    tokens = TokenMap.from_inputs(model.model, longer)
    with record_attention(model.model, tokens, targets=["instruction"]) as record:
        logits = model.model(**longer).logits
    mass = record.mass[:, :, 0, 0, tokens.index("vision")]
    assert mass == pytest.approx(torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), abs=1e-6)
    assert (logits[:, -1].argmax(-1) == samples.answers).all()
