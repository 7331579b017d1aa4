"""LLaVA-Mini in bfloat16 on each device: as close to float32 as the released computation is, which rounds as often."""

from __future__ import annotations

import pytest
import torch

from experiments.benchmarks.released_ratio import build_model, make_inputs, released_logits


def relative_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of the difference, over that of the expected logits."""
    difference = logits.double().cpu() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 3])
def test_llava_mini_bfloat16_is_as_close_to_float32_as_the_released_computation(
    device: torch.device, frames: int
) -> None:
    model = build_model(width=128, vision_width=128, side=6)
    inputs = make_inputs(model, frames, text=20)
    expected = released_logits(model, **inputs)
    model.to(device)
    inputs = {name: values.to(device) for name, values in inputs.items()}
    assert relative_error(model(**inputs).logits, expected) < 1e-5, "float32 on the device"
    model.bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with device:  # the released computation makes positions on the default device
        released = relative_error(released_logits(model, **inputs), expected)
    ours = relative_error(model(**inputs).logits, expected)
    assert 1e-3 < released < 0.1, "bfloat16 has 8 bits"
    assert ours < 1.5 * released
