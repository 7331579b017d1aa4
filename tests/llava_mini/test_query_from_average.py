"""Test the compressor "query_from_average", which starts as "average" and learns as "query"."""

from __future__ import annotations

import pytest
import torch

from llava_mini import LlavaMiniForConditionalGeneration
from llava_mini.compressors import COMPRESSORS
from tests.llava_mini.compress import build, perturb_parameters, random_inputs

FEATURES = random_inputs(build("average"))["features"]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_query_from_average_untrained_tokens_equal_average_to_the_bit(size):
    assert torch.equal(build("query_from_average", size)(FEATURES)[0], build("average", size)(FEATURES)[0])


def test_query_from_average_trained_tokens_are_the_sum_of_both_compressors():
    """The parameters have the names of "query", so its weights load here and back."""
    compressor = perturb_parameters(build("query_from_average", 2))
    query = build("query", 2)
    query.load_state_dict(compressor.state_dict())
    (means, cells), (detail, attention) = build("average", 2)(FEATURES), query(FEATURES)
    tokens, weights = compressor(FEATURES)
    torch.testing.assert_close(tokens, means + detail)
    torch.testing.assert_close(weights, cells / 2 + attention / 2)
    assert (tokens - means).abs().max() > 0.1


@pytest.mark.parametrize("source", ["from_llava", "from_pretrained", "random"])
def test_query_from_average_in_model_gives_logits_of_average_to_the_bit(source, tiny_llava, sample, tmp_path):
    llava = tiny_llava()
    llava.save_pretrained(tmp_path)
    ids, pixels = sample(4, 6)

    def logits(compressor: str) -> torch.Tensor:
        fields = {"compressor": compressor, "compressor_size": 2, "prefusion_layers": 0}
        if source == "from_llava":
            model = LlavaMiniForConditionalGeneration.from_llava(llava, **fields)
        elif source == "from_pretrained":
            model = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path, **fields)
        else:
            config = LlavaMiniForConditionalGeneration.from_llava(llava, **fields).config
            config.compressor = "query_from_average"
            torch.manual_seed(0)
            model = LlavaMiniForConditionalGeneration(config)
            if compressor == "average":
                model.model.compressor = COMPRESSORS["average"](config)
        with torch.no_grad():
            return model.eval()(input_ids=ids[None], pixel_values=pixels[None]).logits

    assert torch.equal(logits("query_from_average"), logits("average"))


def test_query_from_average_gradient_reaches_queries_after_one_step():
    compressor = build("query_from_average")
    optimizer = torch.optim.SGD(compressor.parameters(), lr=0.1)
    target = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(2))
    reached = []
    for _ in range(2):
        optimizer.zero_grad()
        (compressor(FEATURES)[0] - target).square().mean().backward()
        reached.append({name for name, p in compressor.named_parameters() if p.grad.any()})
        optimizer.step()
    output_map = {"attn.out_proj.weight", "attn.out_proj.bias"}
    assert reached == [output_map, set(dict(compressor.named_parameters()))]


def test_query_from_average_save_and_load_keeps_trained_output_map(tiny_mini, tmp_path):
    model = tiny_mini(compressor="query_from_average")
    perturb_parameters(model.model.compressor)
    model.save_pretrained(tmp_path)
    loaded = LlavaMiniForConditionalGeneration.from_pretrained(tmp_path)
    expected = model.model.compressor.attn.out_proj.weight
    assert torch.equal(loaded.model.compressor.attn.out_proj.weight, expected)
    assert expected.any()


def test_query_from_average_bare_attention_raises():
    with pytest.raises(ValueError, match=r"compressor_attention='bare'.*'multi_head'"):
        build("query_from_average", compressor_attention="bare")
