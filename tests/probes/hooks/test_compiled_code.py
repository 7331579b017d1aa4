"""Probes of models that `torch.compile` or `generate` has compiled, against the same probes of an eager model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig, LlavaForConditionalGeneration

from probes import BlockAttention, PatchActivations, RemoveTokens, TokenMap, intervene, record_attention, record_states
from probes.fusion.curves import answer_logprob, knockout_curve
from probes.hooks.compiled_code import EagerExecution
from probes.hooks.decoder import decoder_layers, find_decoder

Model = LlavaForConditionalGeneration
Inputs = dict[str, torch.Tensor]
CUTS = [
    RemoveTokens("vision", [0, 1, 2]),
    BlockAttention("vision", "response", [0, 1, 2]),
    PatchActivations("response", [1], "mlp", "zero"),
]
GENERATION = {
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "do_sample": False,
    "cache_implementation": "static",
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def generated_logits(model: Model, inputs: Inputs, compiled: bool) -> torch.Tensor:
    """Return the logits of five steps; with `compiled`, `generate` compiles the decoding step as it does on a GPU."""
    options: dict[str, Any] = dict(GENERATION)
    if compiled:
        options["compile_config"] = CompileConfig(backend="eager", mode=None)
        options["compile_config"]._compile_all_devices = True
    return torch.stack(model.generate(**inputs, **options).logits)


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: type(cut).__name__)
def test_intervene_after_generate_compiled_decoding_equals_eager_generate(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], cut: Any
) -> None:
    eager, model, inputs = make_llava(), make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    plain = generated_logits(model, inputs, compiled=True)
    with intervene(eager, tokens, cut) as expected_receipt:
        expected = generated_logits(eager, inputs, compiled=False)
    with intervene(model, tokens, cut) as receipt:
        actual = generated_logits(model, inputs, compiled=True)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, plain, atol=1e-2)
    assert receipt[0].calls == expected_receipt[0].calls
    torch.testing.assert_close(generated_logits(model, inputs, compiled=True), plain)


def test_generate_compiled_after_block_has_no_intervention_left(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    """The first compilable call is inside the block: hooks must not be compiled into it."""
    model, inputs = make_llava(), make_inputs()
    expected = generated_logits(make_llava(), inputs, compiled=False)
    with intervene(model, TokenMap.from_inputs(model, inputs), CUTS[0]):
        generated_logits(model, inputs, compiled=True)
    torch.testing.assert_close(generated_logits(model, inputs, compiled=True), expected)


def test_record_attention_after_generate_compiled_decoding_records_each_step(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs]
) -> None:
    eager, model, inputs = make_llava(), make_llava(), make_inputs()
    tokens = TokenMap.from_inputs(model, inputs)
    generated_logits(model, inputs, compiled=True)
    with record_attention(eager, tokens) as expected:
        generated_logits(eager, inputs, compiled=False)
    with record_attention(model, tokens) as actual:
        generated_logits(model, inputs, compiled=True)
    assert torch.equal(actual.queries, expected.queries)
    torch.testing.assert_close(actual.mass, expected.mass, equal_nan=True)


def compiled(what: Any) -> Any:
    return torch.compile(what, backend="eager")


def compile_model(model: Model) -> Any:
    return compiled(model)


def compile_model_in_place(model: Model) -> Any:
    model.compile(backend="eager")
    return model


def compile_forward(model: Model) -> Any:
    model.forward = compiled(model.forward)
    return model


def compile_layers_in_place(model: Model) -> Any:
    for layer in decoder_layers(find_decoder(model)):
        layer.compile(backend="eager")
    return model


def replace_layers(model: Model) -> Any:
    layers = find_decoder(model).layers
    for number, layer in enumerate(layers):
        layers[number] = compiled(layer)
    return model


def replace_attention(model: Model) -> Any:
    for layer in decoder_layers(find_decoder(model)):
        layer.self_attn = compiled(layer.self_attn)
    return model


def replace_language_model(model: Model) -> Any:
    model.model.language_model = compiled(model.model.language_model)
    return model


COMPILATIONS = [
    compile_model,
    compile_model_in_place,
    compile_forward,
    compile_layers_in_place,
    replace_layers,
    replace_attention,
    replace_language_model,
]


@torch.no_grad()
@pytest.mark.parametrize("compilation", COMPILATIONS)
def test_probes_of_compiled_model_equal_probes_of_eager_model(
    make_llava: Callable[..., Model], make_inputs: Callable[..., Inputs], compilation: Callable[[Model], Any]
) -> None:
    eager, inputs = make_llava(), make_inputs()
    model = compilation(make_llava())
    plain = model(**inputs).logits  # compiles

    def measure(model: Any) -> list[torch.Tensor]:
        tokens, results = TokenMap.from_inputs(model, inputs), []
        for cut in (RemoveTokens("vision", [1, 2], how="drop"), BlockAttention("vision", "instruction", [1])):
            with intervene(model, tokens, cut):
                results.append(model(**inputs).logits)
        with record_attention(model, tokens) as attention:
            model(**inputs)
        with record_attention(model, tokens, backend="nnsight") as other:
            model(**inputs)
        with record_states(model, tokens, "vision", component="attention") as states:
            model(**inputs)
        curve = knockout_curve(model, tokens, inputs, answer_logprob(tokens, torch.tensor([5, 6, 7])))
        return [*results, attention.mass, other.mass, states[1], torch.from_numpy(curve)]

    for actual, expected in zip(measure(model), measure(eager), strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(**inputs).logits, plain)


def test_eager_execution_overlapping_blocks_restore_stance_once(make_llava: Callable[..., Model]) -> None:
    decoder = find_decoder(make_llava())
    compiles = compiled(lambda x: torch.compiler.is_compiling())
    first, second = EagerExecution(decoder), EagerExecution(decoder)
    first.__enter__()
    second.__enter__()
    first.__exit__()
    assert not compiles(torch.ones(1))
    second.__exit__()
    assert compiles(torch.ones(1))
