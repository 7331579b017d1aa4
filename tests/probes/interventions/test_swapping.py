"""`swap_images` against a decoder in plain tensor operations, closed forms, and models with a known answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llava_mini import LlavaMiniConfig, LlavaMiniForConditionalGeneration
from probes import planted
from probes.interventions.swapping import Swaps, swap_images
from probes.tokens.token_map import TokenMap
from tests.probes import reference_llama
from tests.tiny_models import LAYERS, PATCHES, tiny_llava, tiny_llava_config

ROWS = [(3, PATCHES, 6), (0, PATCHES, 4), (2, PATCHES, 9)]
ANSWERS = torch.tensor([[5, 7], [9, 5], [11, 12]])


@pytest.fixture
def make_pairs(make_rows: Callable[..., dict[str, Tensor]]) -> Callable[[str], dict[str, Tensor]]:
    """Factory of three pairs: one text and two images each."""

    def make(side: str) -> dict[str, Tensor]:
        inputs = {name: value.repeat_interleave(2, dim=0) for name, value in make_rows(ROWS, side).items()}
        return inputs | {"pixel_values": torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))}

    return make


def reference_logits(model: Any, inputs: dict[str, Tensor], row: int, other: int, start: int) -> Tensor:
    """Return the last logits of a row's run whose visual states are those of the row `other` from layer `start` on."""
    embeddings = [reference_llama.embed_row(model, inputs, i) for i in (row, other)]
    if start == 0:
        return reference_llama.run_decoder(model, embeddings[1])[0][-1]
    vision = inputs["input_ids"][row, reference_llama.unpadded(inputs, row)] == reference_llama.IMAGE_TOKEN
    _, states = reference_llama.run_decoder(model, embeddings[1])

    def patch(layer: int, name: str, hidden: Tensor) -> Tensor:
        is_last_own = name == "residual" and layer == start - 1
        return torch.where(vision[None, :, None], states[layer], hidden) if is_last_own else hidden

    return reference_llama.run_decoder(model, embeddings[0], patch=patch)[0][-1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_swap_images_equals_decoder_with_patched_visual_states(side: str, make_pairs: Any) -> None:
    model, inputs = tiny_llava(), make_pairs(side)
    swaps = swap_images(model, TokenMap.from_inputs(model, inputs), inputs, ANSWERS)
    assert swaps.difference.shape == swaps.predicted.shape == (LAYERS + 1, 3, 2)
    for start in range(LAYERS + 1):
        for row in range(6):
            pair, image = divmod(row, 2)
            logits = reference_logits(model, inputs, row, row ^ 1, start).log_softmax(-1)
            expected = logits[ANSWERS[pair, 1 - image]] - logits[ANSWERS[pair, image]]
            assert swaps.difference[start, pair, image] == pytest.approx(float(expected), abs=2e-4)
            assert swaps.predicted[start, pair, image] == int(logits.argmax())
    assert (abs(swaps.difference[1:] - swaps.difference[:-1]) > 1e-3).all(), "each layer reads something"


def test_swap_images_with_other_image_in_all_layers_is_run_of_other_image(make_pairs: Any) -> None:
    model, inputs = tiny_llava(), make_pairs("left")
    swaps = swap_images(model, TokenMap.from_inputs(model, inputs), inputs, ANSWERS)
    assert swaps.difference[0] == pytest.approx(-swaps.difference[-1][:, ::-1], abs=1e-4)
    assert (swaps.predicted[0] == swaps.predicted[-1][:, ::-1]).all()


def test_swap_images_of_llava_mini_keeps_text_that_prefusion_read(make_pairs: Any) -> None:
    """Pre-fusion has put the own image into the text, so the other visual token from layer 0 on is not the whole move."""
    torch.manual_seed(0)
    fields = {"compressor_size": 1, "compressor_heads": 2, "prefusion_layers": 2}
    model = LlavaMiniForConditionalGeneration(tiny_llava_config(LlavaMiniConfig, **fields)).eval()
    inputs = make_pairs("left")
    image = inputs["input_ids"] == reference_llama.IMAGE_TOKEN
    extra = image & (image.cumsum(1) > 1)  # one visual token remains of each image
    inputs = {
        name: value[~extra].view(6, -1) if value.shape == extra.shape else value for name, value in inputs.items()
    }
    swaps = swap_images(model, TokenMap.from_inputs(model, inputs), inputs, ANSWERS)
    with torch.no_grad():
        logits = model(**inputs).logits[:, -1]
    own = ANSWERS.flatten()
    intact = logits.gather(1, ANSWERS.flip(1).reshape(-1, 1))[:, 0] - logits.gather(1, own[:, None])[:, 0]
    assert swaps.difference[-1].flatten() == pytest.approx(intact.numpy(), abs=1e-4)
    assert (abs(swaps.difference[0] + swaps.difference[-1][:, ::-1]) > 1e-2).all()


def test_swap_images_leaves_model_and_logits_as_they_were(make_pairs: Any) -> None:
    model, inputs = tiny_llava(), make_pairs("left")
    with torch.no_grad():
        before = model(**inputs).logits
        swap_images(model, TokenMap.from_inputs(model, inputs), inputs, ANSWERS)
        assert torch.equal(model(**inputs).logits, before)


def test_swap_images_encodes_images_once(make_pairs: Any) -> None:
    model, inputs = tiny_llava(), make_pairs("left")
    runs: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda tower, args, output: runs.append(1))
    swap_images(model, TokenMap.from_inputs(model, inputs), inputs, ANSWERS)
    assert len(runs) == 1


def test_swap_images_with_last_logits_alone_equals_all_logits(make_pairs: Any) -> None:
    model, inputs = tiny_llava(), make_pairs("left")
    tokens = TokenMap.from_inputs(model, inputs)
    swaps = [swap_images(model, tokens, inputs | keep, ANSWERS) for keep in ({}, {"logits_to_keep": 1})]
    assert swaps[0].difference == pytest.approx(swaps[1].difference, abs=1e-5)
    mask = torch.zeros_like(tokens.mask("pad"))
    mask[:, -2:] = True
    with pytest.raises(ValueError, match=r"last 1 positions.*3 before"):
        swap_images(model, tokens.relabel({"response": mask}), inputs | {"logits_to_keep": 1}, ANSWERS)


def test_swap_images_reads_position_before_response(make_pairs: Any) -> None:
    """Later tokens of the response change nothing, as attention is causal."""
    model, inputs = tiny_llava(), make_pairs("left")
    short = {name: value[:, :-2] if value.ndim == 2 else value for name, value in inputs.items()}
    mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    mask[:, -2:] = True
    tokens = TokenMap.from_inputs(model, inputs).relabel({"response": mask})
    expected = swap_images(model, TokenMap.from_inputs(model, short), short, ANSWERS)
    assert swap_images(model, tokens, inputs, ANSWERS).difference == pytest.approx(expected.difference, abs=1e-4)


def test_swaps_join_equals_one_batch(make_pairs: Any) -> None:
    model, inputs = tiny_llava(), make_pairs("left")
    whole = swap_images(model, TokenMap.from_inputs(model, inputs), inputs, ANSWERS)
    parts = []
    for rows, answers in ((slice(0, 2), ANSWERS[:1]), (slice(2, 6), ANSWERS[1:])):
        part = {name: value[rows] for name, value in inputs.items()}
        parts.append(swap_images(model, TokenMap.from_inputs(model, part), part, answers))
    joined = Swaps.join(parts)
    assert joined.difference == pytest.approx(whole.difference, abs=1e-4)
    assert (joined.answers == ANSWERS.numpy()).all()
    assert (joined.predicted == whole.predicted).all()


def test_swap_images_of_planted_model_flips_answers_before_its_layer() -> None:
    for layer in range(1, 6):
        swaps = swap_images(*planted(layer, layers=5).pairs(8, changed="blue").arguments)
        assert swaps.flipped[:layer].all()
        assert not swaps.flipped[layer:].any()
        assert swaps.right.all()


def test_swap_images_of_text_only_control_moves_nothing() -> None:
    swaps = swap_images(*planted(None, layers=4).pairs(8, changed="red").arguments)
    assert (swaps.predicted == swaps.predicted[0]).all()
    assert not swaps.right.any(), "the hint is no answer to both images"


@pytest.mark.parametrize(
    ("rows", "answers", "message"),
    [
        (slice(0, 3), ANSWERS, r"\[3, 2\].*3 rows"),
        (slice(0, 6), ANSWERS[:2], r"\[2, 2\].*6 rows"),
        (slice(0, 6), ANSWERS.float(), r"torch.float32"),
        (slice(0, 2), torch.tensor([[5, 5]]), r"pair 0 are both token 5"),
        (slice(1, 5), ANSWERS[:2], r"rows 0 and 1 have different prompts"),
    ],
)
def test_swap_images_of_rows_that_are_no_pairs_raises_value_error(
    rows: slice, answers: Tensor, message: str, make_pairs: Any
) -> None:
    model = tiny_llava()
    inputs = {name: value[rows] for name, value in make_pairs("left").items()}
    with pytest.raises(ValueError, match=message):
        swap_images(model, TokenMap.from_inputs(model, inputs), inputs, answers)


def test_swap_images_of_rows_without_image_raises_value_error(make_rows: Any) -> None:
    model, inputs = tiny_llava(), make_rows([(0, PATCHES, 4), (0, 0, 5)], "left")
    inputs = {name: value.repeat_interleave(2, dim=0) for name, value in inputs.items()}
    with pytest.raises(ValueError, match=r"rows \[2, 3\] have no visual token"):
        swap_images(model, TokenMap.from_inputs(model, inputs), inputs, ANSWERS[:2])
