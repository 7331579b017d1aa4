"""Probes of a model whose layers lie on two devices, as a `device_map` puts them, equal those on one device.

The devices are two fake ones on any machine, and the GPU and the CPU where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import LlavaForConditionalGeneration

from llava_mini import LlavaMiniForConditionalGeneration
from probes import (
    BlockAttention,
    PatchActivations,
    RemoveTokens,
    TokenMap,
    intervene,
    logit_lens,
    record_attention,
    record_states,
    relevancy,
)
from probes.fusion.curves import answer_logprob, attention_curve, knockout_curve, removal_curve, text_states
from probes.pruning import dart, fastv, pyramid_drop, sparsevlm, vtw
from probes.replay import replay
from tests.devices.fake_devices import FIRST, SECOND, FakeDevices
from tests.tiny_models import IMAGE_TOKEN

Model = LlavaForConditionalGeneration
Probe = Callable[[Any, TokenMap, dict[str, Any]], Any]
LANGUAGE = "model.language_model"
PARTS_BY_DEVICE = (
    ("model.vision_tower", "model.multi_modal_projector", f"{LANGUAGE}.embed_tokens", f"{LANGUAGE}.layers.0"),
    (f"{LANGUAGE}.layers.1", f"{LANGUAGE}.layers.2", f"{LANGUAGE}.norm", "lm_head"),
)


@pytest.fixture(params=["fake", "cuda"])
def devices(request: pytest.FixtureRequest) -> Iterator[tuple[torch.device, torch.device]]:
    if request.param == "fake":
        with FakeDevices():
            yield FIRST, SECOND
    elif torch.cuda.is_available():
        yield torch.device("cuda:0"), torch.device("cpu")
    else:
        pytest.skip("this machine has no CUDA")


def logits_within(context: Callable[..., Any]) -> Probe:
    """Return a probe that takes the logits inside a context manager."""

    def probe(model: Any, tokens: TokenMap, inputs: dict[str, Any]) -> torch.Tensor:
        with context(model, tokens):
            return model(**inputs).logits

    return probe


def intervention(cut: Any) -> Probe:
    return logits_within(lambda model, tokens: intervene(model, tokens, cut))


def recording(**arguments: Any) -> Probe:
    def probe(model: Any, tokens: TokenMap, inputs: dict[str, Any]) -> list[torch.Tensor]:
        with record_attention(model, tokens, **arguments) as attention:
            model(**inputs)
        return [getattr(attention, name) for name in ("mass", *arguments.get("statistics", ("entropy", "received")))]

    return probe


def recorded_decoding(model: Any, tokens: TokenMap, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with record_attention(model, tokens) as attention:
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return [answer, attention.mass]


def recorded_states(model: Any, tokens: TokenMap, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with record_states(model, tokens, "vision") as states:
        model(**inputs)
    return [states[layer] for layer in range(3)]


def lens(model: Any, tokens: TokenMap, inputs: dict[str, Any]) -> torch.Tensor:
    with logit_lens(model, tokens) as result:
        model(**inputs)
    return result.logprobs


def replayed(model: Any, tokens: TokenMap, inputs: dict[str, Any]) -> torch.Tensor:
    with replay(model, [1, 2]) as resume_from:
        model(**inputs, use_cache=False)
        with resume_from(2), intervene(model, tokens, RemoveTokens("vision", [2])):
            return model(**inputs, use_cache=False).logits


def within_dropping(inner: Probe) -> Probe:
    """Return a probe that runs where tokens are dropped, so that layers run on fewer tokens."""

    def probe(model: Any, tokens: TokenMap, inputs: dict[str, Any]) -> Any:
        with intervene(model, tokens, RemoveTokens("vision", [1, 2], how="drop")):
            return inner(model, tokens, inputs)

    return probe


def curve(function: Callable[..., Any], *, scored: bool) -> Probe:
    def probe(model: Any, tokens: TokenMap, inputs: dict[str, Any]) -> Any:
        answers = torch.arange(5, 5 + len(inputs["input_ids"]))
        return function(model, tokens, inputs, *([answer_logprob(tokens, answers)] if scored else []))

    return probe


PROBES: dict[str, Probe] = {
    "logits": lambda model, tokens, inputs: model(**inputs).logits,
    "removal": intervention(RemoveTokens("vision", [1, 2])),
    "dropping": intervention(RemoveTokens("vision", [1, 2], how="drop")),
    "knock-out": intervention(BlockAttention("vision", "instruction", [0, 1])),
    "patching": intervention(PatchActivations("vision", [0, 1], "mlp", "mean")),
    "noise": intervention(PatchActivations("vision", [1], "residual", "noise", std=0.5)),
    "fastv": logits_within(lambda model, tokens: fastv(model, tokens, 1, 0.5)),
    "vtw": logits_within(lambda model, tokens: vtw(model, tokens, 1)),
    "pyramid drop": logits_within(lambda model, tokens: pyramid_drop(model, tokens, [1, 2])),
    "dart": logits_within(lambda model, tokens: dart(model, tokens, 1, 0.5)),
    "sparsevlm": logits_within(lambda model, tokens: sparsevlm(model, tokens, [1], 0.5)),
    "recording": recording(),
    "contribution": recording(statistics=["contribution", "sink_rate", "value_norm"]),
    "decoding": recorded_decoding,
    "states": recorded_states,
    "dropping, recorded": within_dropping(recording()),
    "dropping, decoded": within_dropping(recorded_decoding),
    "dropping, states": within_dropping(recorded_states),
    "dropping, patched": within_dropping(intervention(PatchActivations("instruction", [1, 2], "mlp", "zero"))),
    "dropping, knock-out": within_dropping(intervention(BlockAttention("system", "instruction", [1, 2]))),
    "lens": lens,
    "replay": replayed,
    "relevancy": lambda model, tokens, inputs: relevancy(model, tokens, inputs).rollout,
    "attention curve": curve(attention_curve, scored=False),
    "removal curve": curve(removal_curve, scored=True),
    "knock-out curve": curve(knockout_curve, scored=True),
    "text states": curve(text_states, scored=False),
}


def place_on(model: Any, devices: tuple[torch.device, torch.device], on_second: tuple[str, ...] = ()) -> Any:
    """Put the parts of a model on two devices as transformers does for a `device_map`."""
    names = dict(zip(devices, PARTS_BY_DEVICE, strict=True))
    device_map = {part: device for device, parts in names.items() for part in parts}
    others = [f"{LANGUAGE}.rotary_emb", "model.compressor", "model.prefusion.layers.0", "model.prefusion.layers.1"]
    device_map |= {name: devices[name in on_second] for name in others if name in dict(model.named_modules())}
    return dispatch_model(model, device_map, main_device=devices[0])


@pytest.mark.parametrize("name", PROBES)
def test_probe_of_model_on_two_devices_equals_that_on_one(
    make_llava: Callable[..., Model],
    make_prompt: Callable[..., dict[str, Any]],
    devices: tuple[torch.device, torch.device],
    name: str,
) -> None:
    if name == "relevancy" and devices[0] == FIRST:
        pytest.skip("gradients need the device's own library")
    inputs, model = make_prompt(True, torch.device("cpu")), make_llava()
    gradients = torch.enable_grad() if name == "relevancy" else torch.no_grad()
    with gradients:
        expected = PROBES[name](model, TokenMap.from_inputs(model, inputs), inputs)
        model = place_on(model, devices)
        assert {parameter.device for parameter in model.parameters()} == set(devices)
        inputs = {key: values.to(devices[0]) for key, values in inputs.items()}
        found = PROBES[name](model, TokenMap.from_inputs(model, inputs), inputs)
    for ours, theirs in zip(*(x if isinstance(x, list) else [x] for x in (found, expected)), strict=True):
        ours, theirs = (torch.as_tensor(values) for values in (ours, theirs))
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-5, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    "on_second",
    [
        (),
        ("model.compressor",),
        ("model.prefusion.layers.1",),
        ("model.compressor", "model.prefusion.layers.0", "model.prefusion.layers.1"),  # as an automatic device map does
    ],
    ids=len,
)
@torch.no_grad()
def test_llava_mini_on_two_devices_equals_that_on_one(
    make_llava: Callable[..., Model], devices: tuple[torch.device, torch.device], on_second: tuple[str, ...]
) -> None:
    """Most of the language model runs on the second device."""
    torch.manual_seed(0)
    model = LlavaMiniForConditionalGeneration.from_llava(make_llava(), compressor="query", prefusion_layers=2).eval()
    inputs = {
        "input_ids": torch.tensor([[5, IMAGE_TOKEN, 6, 7], [8, IMAGE_TOKEN, 9, 10]]),
        "attention_mask": torch.ones(2, 4, dtype=torch.long),
        "pixel_values": torch.randn(2, 3, 32, 32),
        "visual_layout": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    }
    expected = model(**inputs).logits
    answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    model = place_on(model, devices, on_second)
    inputs = {key: values.to(devices[0]) for key, values in inputs.items()}
    torch.testing.assert_close(model(**inputs).logits.cpu(), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False).cpu(), answer)
