"""Visual layout of Gemma 3n, whose layers have several residual streams and share keys."""

from __future__ import annotations

import pytest
import torch

from probes import PatchActivations, RemoveTokens, TokenMap, intervene, logit_lens, record_states
from probes.attribution import relevancy
from tests.probes.tokens.families.boxes import CoordinateImage, check_boxes
from tests.probes.tokens.families.build import LAYERS, tiny
from tests.probes.tokens.families.test_all import make_inputs


@pytest.mark.parametrize("side", ["left", "right"])
def test_gemma3n_layout_boxes_match_pixels(side: str) -> None:
    rows = {"#ab": [(97, 60)], "# and #": [(40, 133), (200, 21)]}
    tokens = check_boxes(tiny("gemma3n"), rows, side)
    places, vision = tokens.require_places(), tokens.mask("vision")
    assert places.image[vision].tolist() == [0] * 9 + [0] * 9 + [1] * 9


def test_gemma3n_layout_with_mismatched_inputs_raises_value_error() -> None:
    family, image = tiny("gemma3n"), CoordinateImage(30, 30).image
    inputs, model = dict(family(["#"], [[image]])), family.model()
    with pytest.raises(ValueError, match=r"hold 1 images.*2 images or image_sizes"):
        TokenMap.from_inputs(model, inputs, images=[image, image])


def test_probes_of_several_residual_streams_raise_value_error() -> None:
    model, inputs = tiny("gemma3n").model(), make_inputs("gemma3n", "left")
    tokens = TokenMap.from_inputs(model, inputs)
    zero = PatchActivations("vision", [1], "residual", "zero")
    for probe in (record_states(model, tokens, "vision"), intervene(model, tokens, zero)):
        with pytest.raises(ValueError, match=r"Gemma3nTextDecoderLayer has several residual streams.*attention or mlp"):
            probe.__enter__()
    with pytest.raises(ValueError, match="Gemma3nTextModel has several residual streams"):
        logit_lens(model, tokens).__enter__()
    with pytest.raises(ValueError, match="Gemma3nTextModel has several residual streams"):
        relevancy(model, tokens, inputs)


@pytest.mark.parametrize("component", ["attention", "mlp"])
def test_record_states_of_gemma3n_equals_zeroed_component(component: str) -> None:
    """A component that is patched with its own states leaves the logits, and with zeros it changes them."""
    model, inputs = tiny("gemma3n").model(), make_inputs("gemma3n", "left")
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        with record_states(model, tokens, "vision", [1], component) as states:
            plain = model(**inputs).logits
        with intervene(model, tokens, PatchActivations("vision", [1], component, states)):
            same = model(**inputs).logits
        with intervene(model, tokens, PatchActivations("vision", [1], component, "zero")):
            zeroed = model(**inputs).logits
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, zeroed)


@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_remove_tokens_where_layers_share_keys_equals_hidden_keys(family: str) -> None:
    """A generation without padding has no mask; the last layer counts the keys of the layer that it shares them with."""
    case = tiny(family)
    inputs, model = dict(case(["#what"], [[CoordinateImage(30, 30).image]])), case.model()
    tokens = TokenMap.from_inputs(model, inputs)
    generation = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    with intervene(model, tokens, RemoveTokens("vision", [LAYERS - 1])) as receipt:
        removed = model.generate(**inputs, **generation, return_dict_in_generate=True)
    assert receipt[0].tokens == {LAYERS - 1: int(tokens.mask("vision").sum())}
    eager = case.model("eager")

    def hide_keys(layer: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> tuple[object, object]:
        mask = kwargs["attention_mask"].clone()
        first = removed_keys.shape[-1] - mask.shape[-1]
        mask.masked_fill_(removed_keys[..., max(first, 0) :], torch.finfo(mask.dtype).min)
        return args, kwargs | {"attention_mask": mask}

    model_layers = eager.get_decoder().layers
    ids = inputs["input_ids"]
    for step in range(3):
        length = tokens.labels.shape[1] + step
        removed_keys = torch.nn.functional.pad(tokens.mask("vision"), (0, length - tokens.labels.shape[1]))
        handle = model_layers[LAYERS - 1].register_forward_pre_hook(hide_keys, with_kwargs=True)
        with torch.no_grad():
            extra = {name: value for name, value in inputs.items() if name.startswith(("pixel", "image"))}
            types = {
                name: torch.nn.functional.pad(value, (0, step))
                for name, value in inputs.items()
                if name.endswith("token_type_ids")
            }
            logits = eager(input_ids=ids, **extra, **types, use_cache=False).logits[:, -1]
        handle.remove()
        torch.testing.assert_close(removed.logits[step], logits, atol=1e-4, rtol=0)
        ids = torch.cat([ids, removed.sequences[:, length : length + 1]], 1)
