"""`record_attention` on each device, under each kernel that computes a layer's output, against eager attention."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.masking_utils import flash_attention_mask

from probes import TokenMap, record_attention
from tests.probes.attention_reference import check_record, expected_statistics

Model = LlavaForConditionalGeneration
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.03}  # eager attention rounds its weights to bfloat16 (8 bits)
MATH, FLASH, EFFICIENT = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION


def flash_of_torch(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Run torch's flash kernel on one row without padding, as an implementation with the masks of flash attention."""
    assert attention_mask is None
    with sdpa_kernel(FLASH):
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
    return output.transpose(1, 2), None


def check_against_eager(model: Model, eager: Model, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    """Check all statistics of one pass, and that recording changes no logit."""
    tokens = TokenMap.from_inputs(model, inputs)
    with torch.no_grad():
        plain = model(**inputs).logits
        with record_attention(model, tokens) as attention:
            recorded = model(**inputs).logits
        attentions = [layer.cpu() for layer in eager(**inputs, output_attentions=True).attentions]
    expected = expected_statistics(attentions, tokens, attention.targets)
    names = ("mass", "entropy", "received")
    check_record(attention, {name: expected[name] for name in names}, atol=TOLERANCES[dtype])
    assert torch.equal(plain, recorded)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kernel", "padded"),
    [(MATH, False), (MATH, True), (FLASH, False), (EFFICIENT, True)],
    ids=["math", "math padded", "flash", "efficient padded"],
)
def test_record_attention_sdpa_kernel_equals_eager_weights(
    make_llava: Callable[..., Model],
    make_prompt: Callable[..., dict[str, Any]],
    device: torch.device,
    kernel: SDPBackend,
    padded: bool,
    dtype: torch.dtype,
) -> None:
    if device.type == "cpu" and kernel == EFFICIENT:
        pytest.skip("a GPU's kernel")
    if device.type == "cuda" and (kernel, dtype) == (FLASH, torch.float32):
        pytest.skip("this kernel takes no float32 on a GPU")
    model, eager = (make_llava(name).to(device, dtype) for name in ("sdpa", "eager"))
    model.model.vision_tower.set_attn_implementation("eager")  # its heads are narrower than the kernels take
    with sdpa_kernel(kernel):
        check_against_eager(model, eager, make_prompt(padded, device, dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
def test_record_attention_flash_masks_equals_eager_weights(
    make_llava: Callable[..., Model],
    make_prompt: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("this kernel takes no float32 on a GPU")
    # transformers looks on the hub for any other implementation with "flash" in its name.
    monkeypatch.setitem(AttentionInterface._global_mapping, "stand_in", flash_of_torch)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "stand_in", flash_attention_mask)
    model, eager = (make_llava(name).to(device, dtype) for name in ("sdpa", "eager"))
    model.get_decoder().set_attn_implementation("stand_in")
    check_against_eager(model, eager, make_prompt(False, device, dtype), dtype)


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn is not installed")
@pytest.mark.parametrize("padded", [False, True], ids=["one row", "padded"])
def test_record_attention_flash_attn_package_equals_eager_weights(
    make_llava: Callable[..., Model], make_prompt: Callable[..., dict[str, Any]], device: torch.device, padded: bool
) -> None:
    if device.type == "cpu":
        pytest.skip("a GPU's package")
    model, eager = (make_llava(name).to(device, torch.bfloat16) for name in ("sdpa", "eager"))
    model.get_decoder().set_attn_implementation("flash_attention_2")
    check_against_eager(model, eager, make_prompt(padded, device, torch.bfloat16), torch.bfloat16)


def test_record_attention_generate_keeps_output_and_equals_eager_weights(
    make_llava: Callable[..., Model], make_prompt: Callable[..., dict[str, Any]], device: torch.device
) -> None:
    """The steps of decoding are those of one eager pass over prompt and answer."""
    model, eager = (make_llava(name).to(device) for name in ("sdpa", "eager"))
    inputs = make_prompt(True, device)
    length, tokens = inputs["input_ids"].shape[1], TokenMap.from_inputs(model, inputs)
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with record_attention(model, tokens) as attention:
        recorded = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, recorded)
    fed = recorded[:, :-1]  # the last token is never fed back
    is_response = torch.arange(fed.shape[1], device=device) >= length
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, fed.shape[1] - length), value=1)
    full = inputs | {"input_ids": fed, "attention_mask": mask}
    tokens = TokenMap.from_inputs(eager, full | {"labels": fed.masked_fill(~is_response, -100)})
    with torch.no_grad():
        attentions = [layer.cpu() for layer in eager(**full, output_attentions=True).attentions]
    check_record(attention, expected_statistics(attentions, tokens, attention.targets))
