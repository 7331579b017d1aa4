"""The setting that costs as much as asked, against what torch counts as each setting of a small model runs."""

from __future__ import annotations

import pytest
import torch

from experiments.config.schema import Config, ReductionConfig
from experiments.data.samples import single_questions
from experiments.evaluation.flops import forward_cost
from experiments.evaluation.questions import Questions
from experiments.models.token_reduction import in_answering
from experiments.sweeps.budget import within
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor

# Of a model of 4 layers and 9 patches: all settings that differ, cheapest first.
STEPS = sorted({round((kept / 9) ** (1 / stage), 12) for kept in range(9) for stage in (1, 2, 3)})
SETTINGS = {
    "fastv": [ReductionConfig("fastv", [1], keep=kept / 9) for kept in range(9)],
    "vtw": [ReductionConfig("vtw", [layer]) for layer in range(4)],
    "pyramid_drop": [ReductionConfig("pyramid_drop", [1, 2, 3], keep=step) for step in STEPS],
}


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("number", [0, 1, -2])
def test_the_next_dearer_reduction_is_too_dear(deep, questions, method, number):
    plain, least, dearer = (
        forward_cost(deep, questions, in_answering(Config(reduction=each)))
        for each in (ReductionConfig(), SETTINGS[method][number], SETTINGS[method][number:][1])
    )
    share = (least["flops"] + dearer["flops"]) / 2 / plain["flops"]
    found = within(deep.config, method, share, plain["text_tokens"])
    assert found.flops == pytest.approx(least["flops"], rel=0.005)
    assert found.share == pytest.approx(least["flops"] / plain["flops"], rel=0.005)
    given = {key.removeprefix("reduction."): value for key, value in found.settings.items()}
    chosen, wanted = ReductionConfig(**given), SETTINGS[method][number]
    assert (chosen.name, chosen.layers, chosen.of) == (wanted.name, wanted.layers, 0)
    assert chosen.keep == pytest.approx(wanted.keep)


def test_no_size_comes_nearer(deep, processor, questions, few):
    plain = forward_cost(deep, questions)
    costs = {}
    for size in (1, 2, 3):
        model = LlavaMiniForConditionalGeneration.from_llava(
            deep, compressor="average", compressor_size=size, prefusion_layers=0
        )
        mini = LlavaMiniProcessor.from_llava(processor, model.config)
        some = Questions(list(single_questions(few.samples))[:1], mini, 1, torch.device("cpu"))
        costs[size] = forward_cost(model, some)["flops"] / plain["flops"]
    for size in (1, 2):
        found = within(deep.config, "average", (costs[size] + costs[size + 1]) / 2, plain["text_tokens"])
        assert found.settings == {"compressor.name": "average", "compressor.size": size}
        assert found.share == pytest.approx(costs[size], rel=0.005)


@pytest.mark.parametrize(
    ("method", "share", "said"),
    [
        (
            "fastv",
            0.2,
            r"fastv cannot get down to 20.0% of LLaVA's FLOPs: its least is \d\d.\d%, with .*reduction.keep=0",
        ),
        ("query", 0.01, r"query cannot get down to 1.0% .* its least is \d\d.\d%, with .*compressor.size=1"),
        ("fastvv", 0.5, "no method 'fastvv' that fits into a budget; use fastv, vtw, pyramid_drop, average"),
    ],
)
def test_what_cannot_be_had(deep, method, share, said):
    with pytest.raises(ValueError, match=said):
        within(deep.config, method, share, 20)
