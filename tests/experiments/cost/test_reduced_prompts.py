"""Costs where visual tokens leave on the way: by hand, and on the command line."""

from __future__ import annotations

import pytest

from experiments.arguments import request
from experiments.config.schema import ReductionConfig
from experiments.cost.__main__ import Request, estimates, notes
from experiments.cost.architectures import geometry, mini
from experiments.cost.estimate import Geometry, Prompt
from experiments.cost.reduced_prompts import fused_inside, published, reduced


def test_published_settings_are_those_of_conf():
    assert published("none") == ReductionConfig()
    assert published("fastv") == ReductionConfig("fastv", [2], of=32, keep=0.5)
    assert published("pyramid_drop") == ReductionConfig("pyramid_drop", [8, 16, 24], of=32, keep=0.5)
    with pytest.raises(ValueError, match="reduction: no 'fast'; use none, fastv"):
        published("fast")


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("fastv", 2 * 576 + 30 * 288), ("vtw", 15 * 576), ("pyramid_drop", 8 * (576 + 288 + 144 + 72))],
)
def test_tokens_of_all_layers(name, tokens):
    plain = Geometry(geometry("llava-1.5-7b"))
    found = reduced(plain, Prompt(60), published(name))
    assert found.prefill.linear == pytest.approx(plain.layer_linear * (tokens + 32 * 60))
    assert found.cache_bytes() == pytest.approx(plain.cache_numbers * (tokens + 32 * 60) * 2)
    assert found.tower == plain(Prompt(60)).tower


def test_inside_at_full_size():
    """Four layers over 576 patches, a token and the text; 28 over the token and the text."""
    model = Geometry(mini(geometry("llava-1.5-7b"), compressor_size=1, prefusion_layers=0, keep_patches=True))
    found = fused_inside(model, Prompt(60), 4)
    assert found.visual_tokens == 577
    assert found.prefill.linear == pytest.approx(model.layer_linear * (4 * (577 + 60) + 28 * 61))
    assert found.head.linear == pytest.approx(model.head.linear * 61)
    assert found.projector.linear == pytest.approx(model.projector.linear * 577)
    two = fused_inside(model, Prompt(60, frames=2), 4)
    assert two.prefill.linear == pytest.approx(model.layer_linear * (4 * (2 * 577 + 60) + 28 * 62))
    with pytest.raises(ValueError, match="needs a LLaVA-Mini with keep_patches"):
        fused_inside(Geometry(geometry("tiny")), Prompt(60), 2)


def test_on_the_command_line():
    asked = request(["model=tiny", "tokens=4,all", "reduction=vtw,fastv", "place=inside", "prefusion=2"], Request)
    rows = estimates(asked)
    assert rows["tokens"].tolist() == ["4", "all", "vtw", "fastv"]
    assert rows["in the LLM"].tolist() == ["40", "36", "36", "36"]
    cost = dict(zip(rows["tokens"], rows["with attention"].astype(float), strict=True))
    assert cost["4"] < cost["vtw"] < cost["fastv"] < cost["all"]
    assert "2 pre-fusion layers inside the language model" in notes(asked, rows)[0]
    for wrong, said in (("place=in", "place: no 'in'; use outside or inside"), ("reduction=x", "reduction: no 'x'")):
        with pytest.raises(ValueError, match=said):
            estimates(request(["model=tiny", wrong], Request))
