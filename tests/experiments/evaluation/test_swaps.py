"""Swaps of minimal pairs against plain forward passes of each question."""

from functools import partial

import numpy as np
import pytest
import torch

from experiments.config.data_schema import ShapesData
from experiments.data.encoding import IGNORE_INDEX, SampleEncoder, restrict_to_answers
from experiments.data.minimal_pairs import MinimalPair, draw_minimal_pairs
from experiments.evaluation.questions import EncodedQuestions
from experiments.evaluation.swaps import first_difference, measure_swaps, swap_pairs
from probes import reading_layer
from tests.experiments.model_families import chat_family, noise_image
from tests.probes.tokens.families.build import MODEL_FAMILIES

CPU = torch.device("cpu")


def answer_logits(model, processor, pair, image, shared):
    """Return the logits after the prompt of a question about one image and `shared` tokens of its answer."""
    (inputs,) = EncodedQuestions([pair.sample(image, answer=0)], processor, 1, CPU).batches("one")
    inputs, labels = restrict_to_answers(inputs)
    first = int((labels[0] != IGNORE_INDEX).int().argmax())
    with torch.no_grad():
        logits = model(**inputs).logits[0, -labels.shape[1] :]
    return logits[first - 1 + shared]


def noise_pairs():
    """Return five pairs of noise images of unequal size, whose answers share their first byte."""
    sizes = [(40, 24), (24, 32), (33, 30), (20, 60), (30, 30)]
    return [
        MinimalPair(
            "noise",
            f"what is it{'x' * number}?",
            ("ab", "ac") if number % 2 else ("ac", "ad"),
            (partial(noise_image, number, size), partial(noise_image, number + 10, size)),
        )
        for number, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("name", MODEL_FAMILIES)
def test_swap_pairs_of_every_family_go_from_plain_run_of_other_image_to_plain_run_of_own(name, monkeypatch):
    family, pairs = chat_family(name, monkeypatch), noise_pairs()
    model = family.model()
    swaps = swap_pairs(model, family.processor, pairs, 4, CPU)
    for number, pair in enumerate(pairs):
        ids = [family.processor.tokenizer.convert_tokens_to_ids(answer[1]) for answer in pair.answers]
        assert swaps.answers[number].tolist() == ids
        for image in (0, 1):
            # The template of BLIP-2 writes a space before an answer.
            logits = answer_logits(model, family.processor, pair, image, shared=2 if name == "blip_2" else 1)
            own = float(logits[ids[1 - image]] - logits[ids[image]])
            assert swaps.difference[-1, number, image] == pytest.approx(own, abs=5e-4)
            if name != "llava_mini":  # whose pre-fusion has put the own image into the text
                assert swaps.difference[0, number, 1 - image] == pytest.approx(-own, abs=5e-4)
    assert abs(swaps.difference[0] - swaps.difference[-1]).max() > 5e-3, "the images matter"


def test_swap_pairs_do_not_depend_on_batch_size(deep_llava, processor):
    pairs = draw_minimal_pairs(ShapesData("shapes"), 5)["relation"]
    swaps = [swap_pairs(deep_llava, processor, pairs, size, CPU) for size in (1, 4, 32)]
    for other in swaps[1:]:
        assert other.difference == pytest.approx(swaps[0].difference, abs=1e-4)
        assert (other.answers == swaps[0].answers).all()


def test_swap_pairs_reads_first_token_that_differs(deep_llava, processor):
    pairs = draw_minimal_pairs(ShapesData("shapes"), 3)["colour"]
    swaps = swap_pairs(deep_llava, processor, pairs, 6, CPU)
    words = processor.tokenizer.batch_decode(swaps.answers.reshape(-1, 1))
    answers = [answer for pair in pairs for answer in pair.answers]
    assert all(answer.startswith(word.strip()) for word, answer in zip(words, answers, strict=True))


def test_first_difference_of_answers_that_share_words_is_after_them(processor):
    encode = SampleEncoder(processor)
    image = partial(noise_image, 0, (48, 48))
    pair = MinimalPair("x", "what?", ("how many red", "how many rings"), (image, image))
    first, second = (encode(pair.sample(0, answer)) for answer in (0, 1))
    at, ids = first_difference(first, second)
    assert first["input_ids"][:at] == second["input_ids"][:at]
    assert ids.tolist() == [first["input_ids"][at], second["input_ids"][at]]
    assert ids[0] != ids[1]


def test_measure_swaps_has_reading_layer_of_each_property(deep_llava, processor):
    pairs = {name: chosen for name, chosen in draw_minimal_pairs(ShapesData("shapes"), 4).items() if name != "count"}
    part = measure_swaps(deep_llava, processor, pairs, 8, CPU)
    assert list(part["properties"]) == ["colour", "shape", "place", "relation"]
    entry = part["properties"]["place"]
    expected = reading_layer(swap_pairs(deep_llava, processor, pairs["place"], 8, CPU))
    assert (entry["layer"], entry["pairs"], entry["right"]) == (expected.layer, 4, expected.right)
    assert np.isclose(entry["chance"], expected.chance)
