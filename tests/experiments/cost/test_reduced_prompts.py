"""Test costs of prompts whose visual tokens leave between layers, against sums over layers."""

from __future__ import annotations

import pytest

from experiments.arguments import parse_arguments
from experiments.config.schema import ReductionConfig
from experiments.cost.__main__ import CostRequest, cost_notes, cost_table
from experiments.cost.architectures import llava_config, llava_mini_config
from experiments.cost.estimate import CostModel, Prompt
from experiments.cost.reduced_prompts import (
    estimate_with_inside_prefusion,
    estimate_with_reduction,
    published_reduction,
)


def test_published_reduction_returns_settings_of_conf():
    assert published_reduction("none") == ReductionConfig()
    assert published_reduction("fastv") == ReductionConfig("fastv", [2], reference_depth=32, keep=0.5)
    assert published_reduction("pyramid_drop") == ReductionConfig(
        "pyramid_drop", [8, 16, 24], reference_depth=32, keep=0.5
    )
    with pytest.raises(ValueError, match=r"reduction: .*'fast'.*none, fastv"):
        published_reduction("fast")


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("fastv", 2 * 576 + 30 * 288), ("vtw", 15 * 576), ("pyramid_drop", 8 * (576 + 288 + 144 + 72))],
)
def test_estimate_with_reduction_counts_tokens_of_all_layers(name, tokens):
    cost_model = CostModel(llava_config("llava-1.5-7b"))
    estimate = estimate_with_reduction(cost_model, Prompt(60), published_reduction(name))
    assert estimate.prefill.linear == pytest.approx(cost_model.linear_flops_per_token * (tokens + 32 * 60))
    assert estimate.cache_bytes() == pytest.approx(cost_model.cache_values_per_token * (tokens + 32 * 60) * 2)
    assert estimate.tower == cost_model(Prompt(60)).tower


def test_estimate_with_inside_prefusion_counts_tokens_of_all_layers():
    """Four layers process 576 patches, one token and the text; 28 process the token and the text."""
    model = CostModel(
        llava_mini_config(llava_config("llava-1.5-7b"), compressor_size=1, prefusion_layers=0, keep_patches=True)
    )
    estimate = estimate_with_inside_prefusion(model, Prompt(60), 4)
    assert estimate.visual_tokens == 577
    assert estimate.prefill.linear == pytest.approx(model.linear_flops_per_token * (4 * (577 + 60) + 28 * 61))
    assert estimate.head.linear == pytest.approx(model.head.linear * 61)
    assert estimate.projector.linear == pytest.approx(model.projector.linear * 577)
    two_frames = estimate_with_inside_prefusion(model, Prompt(60, frames=2), 4)
    assert two_frames.prefill.linear == pytest.approx(model.linear_flops_per_token * (4 * (2 * 577 + 60) + 28 * 62))
    with pytest.raises(ValueError, match="needs a LLaVA-Mini with keep_patches"):
        estimate_with_inside_prefusion(CostModel(llava_config("tiny")), Prompt(60), 2)


def test_cost_table_with_reductions_and_inside_prefusion_orders_costs():
    request = parse_arguments(
        ["model=tiny", "tokens=4,all", "reduction=vtw,fastv", "place=inside", "prefusion=2"], CostRequest, None
    )
    rows = cost_table(request)
    assert rows["tokens"].tolist() == ["4", "all", "vtw", "fastv"]
    assert rows["in the LLM"].tolist() == ["40", "36", "36", "36"]
    cost = dict(zip(rows["tokens"], rows["with attention"].astype(float), strict=True))
    assert cost["4"] < cost["vtw"] < cost["fastv"] < cost["all"]
    assert "2 pre-fusion layers inside the language model" in cost_notes(request, rows)[0]
    for argument, message in (("place=in", r"place: .*'in'.*outside or inside"), ("reduction=x", r"reduction: .*'x'")):
        with pytest.raises(ValueError, match=message):
            cost_table(parse_arguments(["model=tiny", argument], CostRequest, None))
