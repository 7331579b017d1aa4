from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from probes.interventions import PatchActivations, RemoveTokens, intervene
from probes.readouts.hidden_states import record_states
from probes.tokens.token_map import TokenMap
from tests.probes import by_hand
from tests.probes.conftest import text_config

Model = LlavaForConditionalGeneration
Inputs = dict[str, Tensor]
COMPONENTS = ("residual", "attention", "mlp")
ROWS = [(i % 4, 2 + i, 9 - i) for i in range(8)]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def by_hand_in(
    model: Model, inputs: Inputs, row: int, at: Tensor, layers: Any, component: str, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """Logits of a row where `change` replaces `component` at its positions `at`, given what is there `[n, width]`."""
    chosen = at[row, by_hand.live(inputs, row)]

    def patch(layer: int, name: str, states: Tensor) -> Tensor:
        if layer in layers and name == component and chosen.any():
            states = states.clone()
            states[0, chosen] = change(states[0, chosen])
        return states

    return by_hand.run(model, by_hand.embed(model, inputs, row), patch=patch)[0]


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("values", ["zero", "mean", "vector"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ablation(
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
    given: Any = {0: vector, 2: vector} if values == "vector" else values
    patch = PatchActivations("vision", [0, 2], component, given)
    with torch.no_grad():
        plain = model(**inputs).logits
        with intervene(model, tokens, patch) as receipt:
            logits = model(**inputs).logits
    for row in range(3):
        expected = by_hand_in(model, inputs, row, tokens.mask("vision"), [0, 2], component, change)
        close(logits[row, by_hand.live(inputs, row)], expected)
    assert (logits - plain)[:2, -1 if side == "left" else 7].abs().max() > 1e-3, "it bites"
    assert receipt[0].calls == {0: 1, 2: 1}
    assert receipt[0].tokens == {0: 8, 2: 8}


@pytest.mark.parametrize("component", COMPONENTS)
def test_patching_from_another_run(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], component: Any
) -> None:
    """Values of other pictures, with the padding on the other side: by order of sample and position, not by place."""
    model, inputs, source = make_llava(), make_inputs("left"), make_inputs("right")
    source["pixel_values"] = source["pixel_values"].flip(0)
    tokens, source_tokens = TokenMap.from_inputs(model, inputs), TokenMap.from_inputs(model, source)
    with torch.no_grad():
        with record_states(model, source_tokens, "vision", component=component) as states:
            model(**source)
        with intervene(model, tokens, PatchActivations("vision", [1], component, states)):
            logits = model(**inputs).logits
    for row in range(3):
        given = states[1][states.index[:, 0] == row]
        expected = by_hand_in(model, inputs, row, tokens.mask("vision"), [1], component, lambda _, given=given: given)
        close(logits[row, by_hand.live(inputs, row)], expected)


def test_restoring_everything_restores_the_answer(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """Causal tracing: noise in the picture, then the clean states of all positions of one layer."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    everything = torch.ones_like(tokens.labels, dtype=torch.bool)
    corrupt = PatchActivations("vision", [0], "residual", "noise", std=1.0)
    with torch.no_grad():
        with record_states(model, tokens, everything) as states:
            clean = model(**inputs).logits
        with intervene(model, tokens, corrupt):
            corrupted = model(**inputs).logits
        with intervene(model, tokens, corrupt, PatchActivations(everything, [1], "residual", states)):
            restored = model(**inputs).logits
        with intervene(model, tokens, PatchActivations(everything, range(3), "residual", states)):
            assert torch.equal(model(**inputs).logits, clean), "its own states change no bit"
    live = inputs["attention_mask"].bool()
    assert torch.equal(restored[live], clean[live])
    assert (corrupted - clean)[:2, -1].abs().min(dim=-1).values.max() > 0


def test_noise(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    """Of the size asked for, the same for the same seed, another in each layer, the same in each sample."""
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)

    def states(*patches: PatchActivations) -> Any:
        recording = record_states(model, tokens, "vision", component="mlp")
        with torch.no_grad(), intervene(model, tokens, *patches), recording as found:
            model(**inputs)
        return found

    def noise(seed: int) -> Tensor:
        patch = PatchActivations("vision", [0, 1], "mlp", "noise", std=0.5, seed=seed)
        return torch.stack([states(patch)[0] - plain[0], states(patch)[1] - second[1]])

    plain = states()
    # Layer 1 after the noise of layer 0 alone
    second = states(PatchActivations("vision", [0], "mlp", "noise", std=0.5, seed=3))
    three = noise(3)
    close(noise(3), three)
    assert abs(three.std() - 0.5) < 0.1
    assert abs(three.mean()) < 0.1
    close(three[:, :4], three[:, 4:])
    assert (three[0] - three[1]).abs().mean() > 0.3
    assert (three[0] - noise(4)[0]).abs().mean() > 0.3


@pytest.mark.parametrize("values", ["zero", "mean", "noise"])
def test_a_batch_equals_its_rows(make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], values: Any) -> None:
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
        live = by_hand.live(inputs, row)
        single = {name: tensor[row, live][None] for name, tensor in inputs.items()}
        with intervene(model, TokenMap.from_inputs(model, single), *patches):
            close(torch.stack(model.generate(**single, **options).logits)[:, 0], logits[:, row])


def test_noise_of_any_width(make_rows: Callable[..., Inputs]) -> None:
    """A row has the same noise alone as in a batch with longer rows; torch draws normal numbers in blocks of 16."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(text_config(hidden_size=40, image_token_id=by_hand.IMAGE_TOKEN)).eval()
    inputs = make_rows([(1, 3, 2), (1, 7, 2)], "left")
    del inputs["pixel_values"]
    single = {name: tensor[:1, by_hand.live(inputs, 0)] for name, tensor in inputs.items()}
    patch, logits = PatchActivations("vision", [0], "residual", "noise", std=1.0), []
    for some in (inputs, single):
        with torch.no_grad(), intervene(model, TokenMap.from_inputs(model, some), patch):
            logits.append(model(**some).logits[0, -6:])
    close(*logits)


@pytest.mark.parametrize("component", COMPONENTS)
def test_under_a_drop(make_llama: Callable[..., Any], make_rows: Callable[..., Inputs], component: Any) -> None:
    """Where a layer runs on fewer tokens, values still go to the tokens that are meant."""
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
    live = inputs["attention_mask"].bool()
    close(logits[0][live], logits[1][live])


def test_what_is_dropped_cannot_be_patched(make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]) -> None:
    """Not even those that fill up the shorter rows."""
    inputs, model = make_rows(ROWS, "left"), make_llama()
    del inputs["pixel_values"]
    pair = RemoveTokens("vision", [1], how="drop"), PatchActivations("vision", [1], "mlp", "zero")
    told = pytest.raises(RuntimeError, match=r"PatchActivations\(vision, mlp\) did nothing in layers \[1\]")
    with told, torch.no_grad(), intervene(model, TokenMap.from_inputs(model, inputs), *pair):
        model(**inputs)


def test_beams(make_llama: Callable[..., Any], make_rows: Callable[..., Inputs]) -> None:
    """Each beam of a sample gets this sample's values."""
    inputs, model = make_rows(ROWS[:3], "left"), make_llama()
    del inputs["pixel_values"]
    tokens = TokenMap.from_inputs(model, inputs)
    count = int(tokens.mask("vision").sum())
    values = {1: torch.linspace(-2, 2, count * 32).view(count, 32)}
    said = {}
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
        said[beams] = out.logits[0]
    close(said[2][::2], said[1])
    close(said[2][1::2], said[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vision", [1], "residual", "median"), "unknown values='median': it is 'zero', 'mean' or 'noise'"),
        (("vision", [1], "residual", "noise"), "std=0: values='noise' need a positive std"),
        (("vision", [1], "residual", "zero", "both", 1.0), "std=1: values='noise' need a positive std, and no others"),
        (("vision", [1], "output", "zero"), "unknown component 'output'"),
        (("picture", [1], "mlp", "zero"), "unknown group 'picture'"),
        (("vision", [5], "mlp", "zero"), r"layers \[5\] are outside the model"),
        (("vision", [0, 1], "mlp", {1: torch.zeros(32)}), r"values lack layers \[0\]: they are of layers \[1\]"),
        (
            ("vision", [1], "mlp", {1: torch.zeros(7, 32)}),
            r"values of layer 1 have shape \[7, 32\]: 8 positions of width 32 are patched, \[8, 32\] or \[32\] is needed",
        ),
        (("vision", [1], "mlp", {1: torch.zeros(8, 16)}), r"have shape \[8, 16\]"),
    ],
)
def test_bad_input(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], arguments: tuple[Any, ...], message: str
) -> None:
    model = make_llava()
    tokens = TokenMap.from_inputs(model, make_inputs())
    with pytest.raises(ValueError, match=message):
        intervene(model, tokens, PatchActivations(*arguments)).__enter__()


def test_states_that_do_not_fit(make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]) -> None:
    inputs, model = make_inputs(), make_llava()
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad(), record_states(model, tokens, "vision", [1], "mlp") as states:
        model(**inputs)
    with pytest.raises(ValueError, match="values are of component 'mlp', not 'attention'"):
        intervene(model, tokens, PatchActivations("vision", [1], "attention", states)).__enter__()
    with pytest.raises(ValueError, match=r"values lack layers \[0\]"):
        intervene(model, tokens, PatchActivations("vision", [0], "mlp", states)).__enter__()
    with pytest.raises(ValueError, match=r"have shape \[8, 32\]: 17 positions"):
        intervene(model, tokens, PatchActivations("instruction", [1], "mlp", states)).__enter__()
    told = pytest.raises(RuntimeError, match=r"PatchActivations\(vision, mlp\) did nothing in layers \[1\]")
    with told, torch.no_grad(), intervene(model, tokens, PatchActivations("vision", [1], "mlp", states, "decode")):
        model(**inputs)
