"""Probes of Qwen3.5, whose first layer has linear attention and whose other layers have softmax attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probes import RemoveTokens, TokenMap, intervene, logit_lens, record_attention, record_states
from probes.attribution import relevancy
from probes.fusion.curves import attention_curve, knockout_curve, removal_curve
from probes.hooks.decoder import decoder_layers, find_decoder
from probes.interventions import BlockAttention
from probes.replay import replay
from tests.probes.tokens.families.boxes import check_boxes
from tests.probes.tokens.families.build import LAYERS, tiny
from tests.probes.tokens.families.test_all import (
    STEPS,
    check_statistics,
    join_steps,
    make_inputs,
    statistics_from_matrices,
)

WITH_ATTENTION = (1, 2)
REFUSED = r"layers \[0\] of Qwen3_5TextModel have linear_attn, no self_attn: choose from .*\[1, 2\]"


@pytest.mark.parametrize("side", ["left", "right"])
def test_qwen3_5_layout_boxes_match_pixels(side: str) -> None:
    rows = {"a#b": [(97, 60)], "#": [(23, 75)], "#and#in one row": [(120, 31), (9, 9)]}
    assert check_boxes(tiny("qwen3_5"), rows, side).require_places().image.amax(1).tolist() == [0, 0, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_record_attention_of_hybrid_model_equals_eager_attention(side: str) -> None:
    """By default the layers with softmax attention are recorded."""
    inputs, model = make_inputs("qwen3_5", side), tiny("qwen3_5").model()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        with record_attention(model, tokens) as attention:
            model(**inputs)
        weights = tiny("qwen3_5").model("eager")(**inputs, output_attentions=True).attentions
    assert attention.layers == WITH_ATTENTION
    weights = torch.stack([layer for layer in weights if layer is not None])
    check_statistics(attention, statistics_from_matrices(weights, tokens.labels, tokens, attention.targets))


def test_record_attention_of_hybrid_model_in_generation_equals_eager_attention() -> None:
    inputs = make_inputs("qwen3_5", "left")
    generation = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True}
    model = tiny("qwen3_5").model()
    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens, layers=WITH_ATTENTION) as attention:
        recorded = model.generate(**inputs, **generation)
    eager = tiny("qwen3_5").model("eager").generate(**inputs, **generation, output_attentions=True)
    assert torch.equal(recorded.sequences, eager.sequences)
    steps = [[layer for layer in step if layer is not None] for step in eager.attentions]
    weights = torch.stack([join_steps(layer, tokens.labels.shape[1]) for layer in zip(*steps, strict=True)])
    labels = torch.nn.functional.pad(tokens.labels, (0, STEPS - 1), value=tokens.index("response"))
    check_statistics(attention, statistics_from_matrices(weights, labels, tokens, attention.targets))


@pytest.mark.parametrize("how", ["mask", "drop"])
def test_interventions_on_hybrid_model_equal_masked_eager_attention(how: Any) -> None:
    inputs, model = make_inputs("qwen3_5", "left"), tiny("qwen3_5").model()
    tokens = TokenMap.from_inputs(model, inputs)
    text = ~tokens.mask("pad") & ~tokens.mask("vision")
    blocked = {
        "remove": tokens.mask("vision")[:, None, None, :],
        "block": tokens.mask("instruction")[:, None, :, None] & tokens.mask("vision")[:, None, None, :],
    }
    interventions = {
        "remove": RemoveTokens("vision", WITH_ATTENTION, how=how),
        "block": BlockAttention("vision", "instruction", WITH_ATTENTION),
    }
    for name, intervention in interventions.items():
        eager = tiny("qwen3_5").model("eager")

        def hide(layer: Any, args: Any, kwargs: dict[str, Any], edges: torch.Tensor = blocked[name]) -> Any:
            least = torch.finfo(torch.float32).min
            return args, kwargs | {"attention_mask": kwargs["attention_mask"].masked_fill(edges, least)}

        for layer in WITH_ATTENTION:
            decoder_layers(find_decoder(eager))[layer].register_forward_pre_hook(hide, with_kwargs=True)
        with torch.no_grad():
            with intervene(model, tokens, intervention):
                changed = model(**inputs, use_cache=False).logits
            expected = eager(**inputs, use_cache=False).logits
        torch.testing.assert_close(changed[text], expected[text], atol=1e-4, rtol=0, msg=name)


def test_states_and_lens_of_hybrid_model_cover_every_layer() -> None:
    inputs, model = make_inputs("qwen3_5", "left"), tiny("qwen3_5").model()
    tokens = TokenMap.from_inputs(model, inputs)
    real = ~tokens.mask("pad")
    with torch.no_grad(), record_states(model, tokens, real) as states, logit_lens(model, tokens, top=1) as lens:
        output = model(**inputs, output_hidden_states=True)
    for layer in range(LAYERS - 1):
        torch.testing.assert_close(states[layer], output.hidden_states[layer + 1][real])
    expected = output.logits[real].log_softmax(-1).amax(-1, keepdim=True)
    torch.testing.assert_close(lens.logprobs[-1], expected, rtol=0, atol=1e-5)


def test_probes_of_layers_with_linear_attention_raise_value_error() -> None:
    inputs, model = make_inputs("qwen3_5", "left"), tiny("qwen3_5").model()
    tokens = TokenMap.from_inputs(model, inputs)

    def score(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1, 5]

    for probe in (
        record_attention(model, tokens, layers=[0, 1]),
        intervene(model, tokens, RemoveTokens("vision", range(LAYERS))),
        intervene(model, tokens, BlockAttention("vision", "instruction", [0])),
        replay(model, [0], rows=tokens.mask("instruction")),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            probe.__enter__()
    for curve in (removal_curve, knockout_curve):
        with pytest.raises(ValueError, match=REFUSED):
            curve(model, tokens, inputs, score)
    with pytest.raises(ValueError, match=REFUSED):
        attention_curve(model, tokens, inputs)
    with pytest.raises(ValueError, match=r"Qwen3_5DecoderLayer has no self_attn"):
        record_states(model, tokens, "vision", component="attention").__enter__()
    with pytest.raises(ValueError, match=r"layers \[0\] of Qwen3_5TextModel have no attention weights"):
        relevancy(model, tokens, inputs)
