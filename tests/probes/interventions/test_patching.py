"""`PatchActivations` against a decoder in plain tensor operations with the activations replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from probes.hooks.decoder import find_decoder
from probes.interventions import PatchActivations, RemoveTokens, intervene
from probes.readouts.hidden_states import record_states
from probes.tokens.token_map import TokenMap
from tests.probes import reference_llama
from tests.probes.tokens.families.build import tiny
from tests.tiny_models import tiny_llama

Model = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]
COMPONENTS = ("residual", "attention", "mlp")
ROWS = [(i % 4, 2 + i, 9 - i) for i in range(8)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def logits_with_patch(
    model: Model, inputs: Inputs, row: int, at: Tensor, layers: Any, component: str, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the logits of a row where `change` replaces the `component` `[n, width]` at the positions `at`."""
    chosen = at[row, reference_llama.unpadded(inputs, row)]

    def patch(layer: int, name: str, states: Tensor) -> Tensor:
        if layer in layers and name == component and chosen.any():
            states = states.clone()
            states[0, chosen] = change(states[0, chosen])
        return states

    return reference_llama.run_decoder(model, reference_llama.embed_row(model, inputs, row), patch=patch)[0]


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("values", ["zero", "mean", "vector"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_patch_activations_zero_mean_or_vector_equals_patched_run(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], component: Any, values: str, side: str
) -> None:
    inputs, model = make_inputs(side), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    vector = torch.linspace(-1, 1, 32)
    change = {
        "zero": lambda states: 0 * states,
        "mean": lambda states: states.mean(0).expand_as(states),
        "vector": lambda states: vector.expand_as(states),
    }[values]
    patch_values: Any = {0: vector, 2: vector} if values == "vector" else values
    patch = PatchActivations("vision", [0, 2], component, patch_values)
    with torch.no_grad():
        plain = model(**inputs).logits
        with intervene(model, tokens, patch) as receipt:
            logits = model(**inputs).logits
    for row in range(3):
        expected = logits_with_patch(model, inputs, row, tokens.mask("vision"), [0, 2], component, change)
        close(logits[row, reference_llama.unpadded(inputs, row)], expected)
    assert (logits - plain)[:2, -1 if side == "left" else 7].abs().max() > 1e-3, "the patch changes the logits"
    assert receipt[0].calls == {0: 1, 2: 1}
    assert receipt[0].tokens == {0: 8, 2: 8}


@pytest.mark.parametrize("component", COMPONENTS)
def test_patch_activations_states_of_another_run_equals_patched_run(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], component: Any
) -> None:
    """States of other images, with padding on the other side: they are matched by order, not by position."""
    model, inputs, source = make_llava(), make_inputs("left"), make_inputs("right")
    source["pixel_values"] = source["pixel_values"].flip(0)
    tokens, source_tokens = TokenMap.from_inputs(model, inputs), TokenMap.from_inputs(model, source)
    with torch.no_grad():
        with record_states(model, source_tokens, "vision", component=component) as states:
            model(**source)
        with intervene(model, tokens, PatchActivations("vision", [1], component, states)):
            logits = model(**inputs).logits
    for row in range(3):
        row_states = states[1][states.index[:, 0] == row]
        expected = logits_with_patch(
            model, inputs, row, tokens.mask("vision"), [1], component, lambda _, new=row_states: new
        )
        close(logits[row, reference_llama.unpadded(inputs, row)], expected)


def test_patch_activations_restoring_all_states_restores_logits(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Causal tracing: noise in the image, then the clean states of all positions of one layer."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    all_positions = torch.ones_like(tokens.labels, dtype=torch.bool)
    corrupt = PatchActivations("vision", [0], "residual", "noise", std=1.0)
    with torch.no_grad():
        with record_states(model, tokens, all_positions) as states:
            clean = model(**inputs).logits
        with intervene(model, tokens, corrupt):
            corrupted = model(**inputs).logits
        with intervene(model, tokens, corrupt, PatchActivations(all_positions, [1], "residual", states)):
            restored = model(**inputs).logits
        with intervene(model, tokens, PatchActivations(all_positions, range(3), "residual", states)):
            assert torch.equal(model(**inputs).logits, clean), "the run's own states change no bit"
    unpadded = inputs["attention_mask"].bool()
    assert torch.equal(restored[unpadded], clean[unpadded])
    assert (corrupted - clean)[:2, -1].abs().min(dim=-1).values.max() > 0


def test_patch_activations_noise_has_std_and_depends_on_seed_and_layer(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """The noise has the given std, is the same for the same seed and in each sample, and differs by layer."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)

    def states(*patches: PatchActivations) -> Any:
        recording = record_states(model, tokens, "vision", component="mlp")
        with torch.no_grad(), intervene(model, tokens, *patches), recording as recorded:
            model(**inputs)
        return recorded

    def noise(seed: int) -> Tensor:
        patch = PatchActivations("vision", [0, 1], "mlp", "noise", std=0.5, seed=seed)
        return torch.stack([states(patch)[0] - plain[0], states(patch)[1] - second[1]])

    plain = states()
    # Layer 1 after noise in layer 0 only.
    second = states(PatchActivations("vision", [0], "mlp", "noise", std=0.5, seed=3))
    noise_of_seed_3 = noise(3)
    close(noise(3), noise_of_seed_3)
    assert abs(noise_of_seed_3.std() - 0.5) < 0.1
    assert abs(noise_of_seed_3.mean()) < 0.1
    close(noise_of_seed_3[:, :4], noise_of_seed_3[:, 4:])
    assert (noise_of_seed_3[0] - noise_of_seed_3[1]).abs().mean() > 0.3
    assert (noise_of_seed_3[0] - noise(4)[0]).abs().mean() > 0.3


@pytest.mark.parametrize("values", ["zero", "mean", "noise"])
def test_patch_activations_batch_equals_single_rows(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], values: Any
) -> None:
    """Eight left-padded rows with different numbers of visual tokens, through four generated ones."""
    inputs, model = make_rows(ROWS, "left"), make_llama()
    del inputs["pixel_values"]
    std = 1.0 if values == "noise" else 0.0
    patches = [PatchActivations(group, [1], "mlp", values, std=std) for group in ("vision", "response")]
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with intervene(model, TokenMap.from_inputs(model, inputs), *patches) as receipt:
        logits = torch.stack(model.generate(**inputs, **options).logits)
    assert [effect.tokens for effect in receipt] == [{1: 44}, {1: 24}]
    assert [effect.calls for effect in receipt] == [{1: 1}, {1: 3}]
    for row in range(8):
        unpadded = reference_llama.unpadded(inputs, row)
        single = {name: tensor[row, unpadded][None] for name, tensor in inputs.items()}
        with intervene(model, TokenMap.from_inputs(model, single), *patches):
            close(torch.stack(model.generate(**single, **options).logits)[:, 0], logits[:, row])


def test_patch_activations_noise_of_any_width_is_same_in_batch_and_row(make_rows: Callable[..., Inputs]) -> None:
    """A row gets the same noise alone and in a batch with longer rows; torch draws normal numbers in blocks of 16."""
    model: Any = tiny_llama(hidden_size=40)
    inputs = make_rows([(1, 3, 2), (1, 7, 2)], "left")
    del inputs["pixel_values"]
    single = {name: tensor[:1, reference_llama.unpadded(inputs, 0)] for name, tensor in inputs.items()}
    patch, logits = PatchActivations("vision", [0], "residual", "noise", std=1.0), []
    for batch in (inputs, single):
        with torch.no_grad(), intervene(model, TokenMap.from_inputs(model, batch), patch):
            logits.append(model(**batch).logits[0, -6:])
    close(*logits)


@pytest.mark.parametrize("component", COMPONENTS)
def test_patch_activations_under_drop_patches_selected_tokens(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], component: Any
) -> None:
    """If a layer runs on fewer tokens, values still go to the selected tokens."""
    inputs, model = make_rows(ROWS, "left"), make_llama()
    del inputs["pixel_values"]
    tokens = TokenMap.from_inputs(model, inputs)
    count = int(tokens.mask("instruction").sum())
    values = {1: torch.linspace(-2, 2, count * 32).view(count, 32)}
    patch, logits = PatchActivations("instruction", [1], component, values), []
    for how in ("mask", "drop"):
        with torch.no_grad(), intervene(model, tokens, RemoveTokens("vision", [1], how=how), patch) as receipt:
            logits.append(model(**inputs).logits)
        assert receipt[1].tokens == {1: count}
    unpadded = inputs["attention_mask"].bool()
    close(logits[0][unpadded], logits[1][unpadded])


@pytest.mark.parametrize("options", [{}, {"how": "drop"}, {"how": "drop", "keep_cache": True}])
def test_patch_activations_of_removed_tokens_acts_in_either_order(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], options: dict[str, Any]
) -> None:
    """Layer 2 reads the patched states, not those that removal passes through layer 1."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    pair = RemoveTokens("vision", [1], **options), PatchActivations("vision", [1], "residual", "zero")
    with torch.no_grad(), intervene(model, tokens, pair[0]):
        passed = model(**inputs).logits
    logits = []
    for order in (pair, pair[::-1]):
        with (
            torch.no_grad(),
            record_states(model, tokens, "vision", [1]) as patched,
            intervene(model, tokens, *order) as receipt,
        ):
            logits.append(model(**inputs).logits)
        assert not patched[1].any()
        assert {effect.name: effect.tokens[1] for effect in receipt} == {
            "RemoveTokens(vision)": 8,
            "PatchActivations(vision, residual)": 8,
        }
    close(*logits)
    assert not torch.allclose(logits[0], passed, atol=1e-3)


def test_patch_activations_dropped_tokens_raise(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]
) -> None:
    """The filler of shorter rows is not patched either."""
    inputs, model = make_rows(ROWS, "left"), make_llama()
    del inputs["pixel_values"]
    pair = RemoveTokens("vision", [1], how="drop"), PatchActivations("vision", [1], "mlp", "zero")
    raises = pytest.raises(RuntimeError, match=r"PatchActivations\(vision, mlp\) did nothing in layers \[1\]")
    with raises, torch.no_grad(), intervene(model, TokenMap.from_inputs(model, inputs), *pair):
        model(**inputs)


def test_patch_activations_beam_search_patches_each_beam(
    make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]
) -> None:
    """Each beam of a sample gets this sample's values."""
    inputs, model = make_rows(ROWS[:3], "left"), make_llama()
    del inputs["pixel_values"]
    tokens = TokenMap.from_inputs(model, inputs)
    count = int(tokens.mask("vision").sum())
    values = {1: torch.linspace(-2, 2, count * 32).view(count, 32)}
    first_logits = {}
    for beams in (1, 2):
        with intervene(model, tokens, PatchActivations("vision", [1], "residual", values)):
            out = model.generate(
                **inputs,
                max_new_tokens=1,
                do_sample=False,
                num_beams=beams,
                output_logits=True,
                return_dict_in_generate=True,
            )
        first_logits[beams] = out.logits[0]
    close(first_logits[2][::2], first_logits[1])
    close(first_logits[2][1::2], first_logits[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vision", [1], "residual", "median"), "unknown values='median'.*'zero', 'mean' or 'noise'"),
        (("vision", [1], "residual", "noise"), "std=0 .*'noise'"),
        (("vision", [1], "residual", "zero", "both", 1.0), "std=1 .*'noise'"),
        (("vision", [1], "output", "zero"), "unknown component 'output'"),
        (("picture", [1], "mlp", "zero"), "unknown group 'picture'"),
        (("vision", [5], "mlp", "zero"), r"layers \[5\] are outside the model"),
        (("vision", [0, 1], "mlp", {1: torch.zeros(32)}), r"values lack layers \[0\].*layers \[1\]"),
        (
            ("vision", [1], "mlp", {1: torch.zeros(7, 32)}),
            r"values of layer 1 have shape \[7, 32\]: .*8 positions of width 32.*\[8, 32\] or \[32\]",
        ),
        (("vision", [1], "mlp", {1: torch.zeros(8, 16)}), r"have shape \[8, 16\]"),
        (
            ("vision", [1], "mlp", {1: torch.eye(8, 32).log().where(torch.arange(8)[:, None] == 5, 0)}),
            r"layer 1.*row 5",
        ),
        (("vision", [1], "mlp", {1: torch.full((32,), torch.nan)}), r"values of layer 1: .*not finite"),
    ],
)
def test_patch_activations_invalid_argument_raises(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], arguments: tuple[Any, ...], message: str
) -> None:
    model = make_llava()
    tokens = TokenMap.from_inputs(model, make_inputs())
    with pytest.raises(ValueError, match=message):
        intervene(model, tokens, PatchActivations(*arguments)).__enter__()


def test_patch_activations_states_that_do_not_fit_raise(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_states(model, tokens, "vision", [1], "mlp") as states:
        model(**inputs)
    with pytest.raises(ValueError, match=r"values are of component 'mlp'.*'attention'"):
        intervene(model, tokens, PatchActivations("vision", [1], "attention", states)).__enter__()
    with pytest.raises(ValueError, match=r"values lack layers \[0\]"):
        intervene(model, tokens, PatchActivations("vision", [0], "mlp", states)).__enter__()
    with pytest.raises(ValueError, match=r"have shape \[8, 32\]: .*17 positions"):
        intervene(model, tokens, PatchActivations("instruction", [1], "mlp", states)).__enter__()
    raises = pytest.raises(RuntimeError, match=r"PatchActivations\(vision, mlp\) did nothing in layers \[1\]")
    with raises, torch.no_grad(), intervene(model, tokens, PatchActivations("vision", [1], "mlp", states, "decode")):
        model(**inputs)


@torch.no_grad()
def test_residual_with_deepstack_is_recorded_and_patched_with_the_features() -> None:
    """Qwen3-VL adds features of the image to the visual tokens after its first layer."""
    family = tiny("qwen3_vl")
    model = family.model()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8)) for _ in range(2)]
    first, second = (dict(family(["see # ? tell"], [[image]], "left")) for image in images)
    tokens = TokenMap.from_inputs(model, first)
    decoder = find_decoder(model)
    inputs_of_second_layer = []
    hook = decoder.layers[1].register_forward_pre_hook(
        lambda layer, args, kwargs: inputs_of_second_layer.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    every = ~tokens.mask("pad")
    with hook, record_states(model, tokens, every, layers=[0, 1]) as states:
        expected = model(**second).logits
    close(states[0], inputs_of_second_layer[0][every])
    with intervene(model, tokens, PatchActivations(every, [1], "residual", states)):
        close(model(**first).logits[:, -1], expected[:, -1])
    with (
        pytest.raises(ValueError, match=r"layer 0 .DeepStack.*layers from 1 on"),
        intervene(model, tokens, PatchActivations("vision", [0], "residual", {0: states[0].mean(0)})),
    ):
        model(**first)
    with intervene(model, tokens, PatchActivations("instruction", [0], "residual", "zero")) as receipt:
        model(**first)
    assert receipt[0].calls == {0: 1}, "features are added to visual tokens alone"
