"""Scores of answers in batches that are padded on either side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from probes import TokenMap
from probes.fusion.curves import ScoreFunction, answer_logprob, knockout_curve, removal_curve
from probes.fusion.planted_models import planted

Make = Callable[..., LlavaForConditionalGeneration]
CURVES = [removal_curve, knockout_curve]


def padded_right(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same rows with their left padding moved to the right."""
    moved = {name: value.clone() for name, value in inputs.items()}
    for row, pads in enumerate((inputs["attention_mask"] == 0).sum(1).tolist()):
        for name in ("input_ids", "attention_mask"):
            moved[name][row] = inputs[name][row].roll(-pads)
    return moved


@pytest.mark.parametrize("measure", CURVES)
@pytest.mark.parametrize("by_mask", [True, False])
def test_curve_with_answer_logprob_is_equal_for_both_paddings(measure: Callable[..., object], by_mask: bool) -> None:
    reference = planted(layer=2, layers=4)
    samples, curves = reference.samples(16), []
    for inputs in (samples.inputs, padded_right(samples.inputs)):
        tokens = TokenMap.from_inputs(reference.model, inputs)
        score = answer_logprob(inputs["attention_mask"] if by_mask else tokens, samples.answers)
        curves.append(torch.from_numpy(measure(reference.model, tokens, inputs, score)))
    torch.testing.assert_close(curves[1], curves[0])
    torch.testing.assert_close(
        curves[0],
        torch.from_numpy(
            measure(
                reference.model, TokenMap.from_inputs(reference.model, samples.inputs), samples.inputs, samples.score
            )
        ),
    )


@torch.no_grad()
def test_answer_logprob_with_response_reads_position_before_it(make_llava: Make, make_inputs: Make) -> None:
    model, inputs = make_llava(), make_inputs("right")
    labels, first = torch.full_like(inputs["input_ids"], -100), [11, 6, 4]
    for row, position in enumerate(first):
        labels[row, position : position + 2] = inputs["input_ids"][row, position : position + 2]
    answers, logits = torch.tensor([5, 6, 7]), model(**inputs).logits
    score = answer_logprob(TokenMap.from_inputs(model, {**inputs, "labels": labels}), answers)
    expected = [logits[row, position - 1].log_softmax(-1)[answers[row]] for row, position in enumerate(first)]
    torch.testing.assert_close(score(logits), torch.stack(expected))
    from_list = answer_logprob(TokenMap.from_inputs(model, {**inputs, "labels": labels}), answers.tolist())
    torch.testing.assert_close(from_list(logits), torch.stack(expected))


@pytest.mark.parametrize("measure", CURVES)
@pytest.mark.parametrize(
    "score",
    [
        lambda logits: logits[:, -1].log_softmax(-1)[:, 5],
        lambda logits: logits[:, -1].argmax(-1) == 11,
        lambda logits: logits[:, -1, 5],
    ],
)
def test_curve_score_reads_padding_raises(measure: Callable[..., object], score: ScoreFunction) -> None:
    reference = planted(layer=2, layers=4)
    inputs = padded_right(reference.samples(16).inputs)
    with pytest.raises(ValueError, match=r"rows \[0, .*depends on the logits of padding.*answer_logprob"):
        measure(reference.model, TokenMap.from_inputs(reference.model, inputs), inputs, score)


def test_answer_logprob_wrong_answers_or_logits_raises(make_llava: Make, make_inputs: Make) -> None:
    model, inputs = make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    for answers in (torch.tensor([1, 2]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2, -100])):
        with pytest.raises(ValueError, match="one token id for each of 3 samples"):
            answer_logprob(tokens, answers)
    with pytest.raises(ValueError, match="vocabulary with token 64"):
        answer_logprob(tokens, torch.tensor([1, 2, 64]))(model(**inputs).logits)
    with pytest.raises(ValueError, match=r"logits have shape \[3, 1, 64\]"):
        answer_logprob(tokens, torch.tensor([1, 2, 3]))(model(**inputs).logits[:, -1:])
    with pytest.raises(ValueError, match=r"rows \[1\] have no position"):
        answer_logprob(torch.tensor([[1, 1], [0, 0]]), torch.tensor([1, 2]))
