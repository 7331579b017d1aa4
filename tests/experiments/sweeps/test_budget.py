"""The most costly setting within a FLOPs budget, against the FLOPs that torch counts for each setting of a small model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from omegaconf import OmegaConf

from experiments.config.schema import Config, ReductionConfig
from experiments.cost.architectures import llava_config
from experiments.cost.estimate import CostModel, Prompt
from experiments.cost.reduced_prompts import estimate_with_reduction
from experiments.data.samples import single_questions
from experiments.evaluation.flops import forward_cost
from experiments.evaluation.questions import EncodedQuestions
from experiments.models.token_reduction import token_dropper_for_inference
from experiments.sweeps.budget import budget_settings, most_costly_within
from llava_mini import LlavaMiniForConditionalGeneration, LlavaMiniProcessor

# All different settings of a model of 4 layers and 9 patches, cheapest first.
PYRAMID_SHARES = sorted({round((kept / 9) ** (1 / stage), 12) for kept in range(9) for stage in (1, 2, 3)})
SETTINGS = {
    "fastv": [ReductionConfig("fastv", [1], keep=kept / 9) for kept in range(9)],
    "vtw": [ReductionConfig("vtw", [layer]) for layer in range(4)],
    "pyramid_drop": [ReductionConfig("pyramid_drop", [1, 2, 3], keep=share) for share in PYRAMID_SHARES],
}


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("number", [0, 1, -2])
def test_most_costly_within_for_reduction_takes_the_last_setting_below_the_budget(
    deep_llava, questions, method, number
):
    """The budget lies halfway between the FLOPs of a setting and those of the next more costly one."""
    full, chosen, next_one = (
        forward_cost(deep_llava, questions, token_dropper_for_inference(Config(reduction=reduction)))
        for reduction in (ReductionConfig(), SETTINGS[method][number], SETTINGS[method][number:][1])
    )
    share = (chosen["flops"] + next_one["flops"]) / 2 / full["flops"]
    result = most_costly_within(deep_llava.config, method, share, full["text_tokens"])
    assert result.flops == pytest.approx(chosen["flops"], rel=0.005)
    assert result.share == pytest.approx(chosen["flops"] / full["flops"], rel=0.005)
    settings = {key.removeprefix("reduction."): value for key, value in result.settings.items()}
    actual, expected = ReductionConfig(**settings), SETTINGS[method][number]
    assert (actual.name, actual.layers, actual.reference_depth) == (expected.name, expected.layers, 0)
    assert actual.keep == pytest.approx(expected.keep)


def test_most_costly_within_for_compressor_takes_the_largest_size_below_the_budget(
    deep_llava, processor, questions, shapes_split
):
    full = forward_cost(deep_llava, questions)
    shares = {}
    for size in (1, 2, 3):
        model = LlavaMiniForConditionalGeneration.from_llava(
            deep_llava, compressor="average", compressor_size=size, prefusion_layers=0
        )
        mini = LlavaMiniProcessor.from_llava(processor, model.config)
        question = EncodedQuestions(list(single_questions(shapes_split.samples))[:1], mini, 1, torch.device("cpu"))
        shares[size] = forward_cost(model, question)["flops"] / full["flops"]
    for size in (1, 2):
        budget = (shares[size] + shares[size + 1]) / 2
        result = most_costly_within(deep_llava.config, "average", budget, full["text_tokens"])
        assert result.settings == {"compressor.name": "average", "compressor.size": size}
        assert result.share == pytest.approx(shares[size], rel=0.005)


HUB_PARTS = {"vision": "facebook/dinov2-small", "language": "HuggingFaceTB/SmolLM2-135M-Instruct"}


@pytest.mark.parametrize("name", ["smol", "smol_grids"])
@pytest.mark.parametrize("grid", [8, 16])
def test_budget_settings_count_the_patches_of_the_cells_own_grid(name, grid):
    model = OmegaConf.create({"name": name, **HUB_PARTS, "grid": grid})
    settings = budget_settings(model, "fastv", 0.6, 40)
    llava = llava_config("smol")
    llava.vision_config.image_size = grid * llava.vision_config.patch_size
    cost, prompt = CostModel(llava), Prompt(40)
    assert cost(prompt).visual_tokens == grid**2
    reduction = ReductionConfig(**{key.removeprefix("reduction."): value for key, value in settings.items()})
    chosen = estimate_with_reduction(cost, prompt, reduction).flops("full") / cost(prompt).flops("full")
    more = dataclasses.replace(reduction, keep=reduction.keep + 1.5 / grid**2)
    assert chosen <= 0.6 < estimate_with_reduction(cost, prompt, more).flops("full") / cost(prompt).flops("full")


def test_budget_settings_read_the_folder_of_the_model_whatever_its_name(deep_llava, tmp_path):
    deep_llava.config.save_pretrained(tmp_path)
    model = OmegaConf.create({"name": "tiny", "path": str(tmp_path), "grid": None})
    expected = most_costly_within(deep_llava.config, "fastv", 0.95, 20).settings
    assert budget_settings(model, "fastv", 0.95, 20) == expected
    shipped = [OmegaConf.create({"name": name, "path": "asset:tiny", "grid": 6}) for name in ("tiny", "checkpoint")]
    assert budget_settings(shipped[0], "fastv", 0.95, 20) == budget_settings(shipped[1], "fastv", 0.95, 20) != expected


@pytest.mark.parametrize(
    ("method", "share", "message"),
    [
        ("fastv", 0.2, r"budget\.share: fastv .*\d\d\.\d%.*reduction\.keep=0.*20\.0%"),
        ("query", 0.01, r"budget\.share: query .*\d\d\.\d%.*compressor\.size=1.* 1\.0%"),
        ("fastvv", 0.5, r"budget\.method: .*'fastvv'.*fastv, vtw, pyramid_drop, dart, sparsevlm, random_drop, average"),
    ],
    ids=["reduction", "compressor", "unknown method"],
)
def test_most_costly_within_with_unknown_method_or_too_small_budget_raises(deep_llava, method, share, message):
    with pytest.raises(ValueError, match=message):
        most_costly_within(deep_llava.config, method, share, 20)
