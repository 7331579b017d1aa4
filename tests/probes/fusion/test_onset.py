"""The fusion onset: against closed forms, interventions on whole calls, and models with a known answer."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from probes.fusion.curves import removal_curve
from probes.fusion.depth import fusion_depth
from probes.fusion.onset import fusion_onset, onset_curve
from probes.fusion.planted_models import planted
from probes.hooks.decoder import find_decoder
from probes.hooks.partial_call import can_run_subset
from probes.interventions import RemoveTokens, intervene
from probes.tokens.token_map import TokenMap

LAYERS = 6


def repeat(*scores: float, samples: int = 40) -> np.ndarray:
    return np.repeat(np.array(scores, dtype=float)[:, None], samples, axis=1)


@pytest.mark.parametrize("onset", range(1, LAYERS + 1))
def test_fusion_onset_of_step_is_step(onset: int) -> None:
    result = fusion_onset(repeat(*[float(k < onset) for k in range(LAYERS + 1)]))
    assert (result.onset, result.low, result.high) == (onset, onset, onset)
    assert (result.reads, result.layers, result.samples) == ((onset,), LAYERS, 40)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["onset"] == onset


@pytest.mark.parametrize(("threshold", "onset"), [(0.1, 2), (0.2, 2), (0.21, 3), (0.6, 3), (0.61, 4), (1.0, 4)])
def test_fusion_onset_of_gradual_loss_is_first_share_above_threshold(threshold: float, onset: int) -> None:
    """The total is 0.5, and the shares lost are 0, 0, 0.2, 0.6 and 1."""
    assert fusion_onset(repeat(0.9, 0.9, 0.8, 0.6, 0.4), threshold=threshold).onset == onset


def test_fusion_onset_with_later_recovery_is_after_recovery() -> None:
    assert fusion_onset(repeat(1.0, 0.5, 1.0, 0.0)).onset == 3


def test_fusion_onset_without_loss_is_none() -> None:
    """Half of the samples gain what the other half loses."""
    signs = np.tile([1.0, -1.0], 20)
    result = fusion_onset(np.arange(4.0)[:, None] * signs)
    assert (result.onset, result.low, result.high, result.reads) == (None, None, None, ())
    assert str(result) == "none of 3 layers (n=40, onset)"


def test_fusion_onset_with_gain_from_hiding_is_none() -> None:
    assert fusion_onset(repeat(0.0, 0.0, 1.0, 1.0)).onset is None


def test_fusion_onset_interval_contains_truth_of_noisy_step() -> None:
    """Samples score 0.8 before the step at 3 and 0.3 after it. Of 100 draws, at most 10 intervals may miss."""
    draw = np.random.default_rng(0)
    chance = np.where(np.arange(7) < 3, 0.8, 0.3)
    results = [fusion_onset((draw.random((7, 200)) < chance[:, None]).astype(float), resamples=400) for _ in range(100)]
    hits = sum(result.low is not None and result.low <= 3 <= (result.high or 0) for result in results)
    assert hits >= 90
    assert any(result.low != result.high for result in results)


def test_fusion_onset_of_noise_is_none_in_95_percent() -> None:
    """Curves of pure noise: the interval of the total lies above 0 in 2.5% of them, or 11 of 200 with luck."""
    draw = np.random.default_rng(0)
    found = [fusion_onset(draw.normal(size=(13, 80)), resamples=400).onset is not None for _ in range(200)]
    assert sum(found) <= 11


@pytest.mark.parametrize(
    ("values", "threshold", "message"),
    [
        (np.zeros((4, 1)), 0.1, r"\[4, 1\].*2 samples"),
        (np.zeros(4), 0.1, r"\[4\].*layers \+ 1"),
        (np.full((4, 3), np.nan), 0.1, "not finite"),
        (np.zeros((4, 3)), 0.0, "threshold is 0.0"),
        (np.zeros((4, 3)), 1.5, "threshold is 1.5"),
    ],
)
def test_fusion_onset_with_invalid_values_raises_value_error(
    values: np.ndarray, threshold: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fusion_onset(values, threshold=threshold)


class LayerWithOwnArgument(LlamaDecoderLayer):
    """A layer that cannot run on some tokens only, since it may get an unknown value for each token."""

    def forward(self, hidden_states: Any, position_embeddings: Any, own: Any = None, **kwargs: Any) -> Any:
        return super().forward(hidden_states, position_embeddings=position_embeddings, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("runs_text_alone", [True, False])
def test_onset_curve_equals_hiding_image_in_whole_calls(
    make_llava: Callable[..., Any], make_inputs: Callable[..., Any], runs_text_alone: bool
) -> None:
    model, inputs = make_llava(), make_inputs("left")
    if not runs_text_alone:
        find_decoder(model).layers[1].__class__ = LayerWithOwnArgument
    assert can_run_subset(find_decoder(model), 8) == runs_text_alone
    tokens = TokenMap.from_inputs(model, inputs)

    def score(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1].log_softmax(-1)[:, 5]

    expected = []
    for end in range(4):
        with intervene(model, tokens, RemoveTokens("vision", range(end), how="mask")):
            expected.append(score(model(**inputs).logits))
    curve = onset_curve(model, tokens, inputs, score)
    assert curve == pytest.approx(torch.stack(expected).numpy(), abs=1e-4)
    assert (abs(np.diff(curve[:, :2], axis=0)) > 1e-4).all(), "each layer matters in this model"
    assert onset_curve(model, tokens, inputs, score, ends=[0, 3]) == pytest.approx(curve[[0, 3]], abs=1e-6)
    with pytest.raises(ValueError, match=r"ends \[-1, 4\].*3 layers"):
        onset_curve(model, tokens, inputs, score, ends=[-1, 0, 4])


@pytest.mark.parametrize(("first", "second"), [(1, 4), (2, 5)])
def test_onset_of_model_that_reads_twice_is_second_and_depth_is_first(first: int, second: int) -> None:
    """Two layers read the whole colour, so the image may leave after the first, or arrive before the second."""
    reference = planted(first, layers=LAYERS)
    layers = reference.model.model.language_model.layers
    layers[second - 1].self_attn.load_state_dict(copy.deepcopy(layers[first - 1].self_attn.state_dict()))
    samples = reference.samples(16)
    arguments = reference.model, TokenMap.from_inputs(reference.model, samples.inputs), samples.inputs, samples.score
    onset, depth = fusion_onset(onset_curve(*arguments)), fusion_depth(removal_curve(*arguments), "removal")
    assert (onset.onset, onset.low, onset.high) == (second,) * 3
    assert (depth.depth, depth.low, depth.high) == (first,) * 3
