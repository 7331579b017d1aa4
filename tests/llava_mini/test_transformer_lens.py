"""LLaVA-Mini as a TransformerBridge, against the model itself under eager attention."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from transformer_lens.model_bridge.sources import build_bridge_from_module

import llava_mini.transformer_lens  # noqa: F401
from llava_mini import PRESETS

# Hooks that transformer-lens 4.3 never calls; those of the norms only for models without norms.
UNCALLED_HOOKS = r".*\.attn\.hook_(hidden_states|[qk]_normed)"


@pytest.fixture
def make_bridge(tiny_mini):
    """Return a factory of a bridge and of the same model without a bridge."""

    def build(**fields):
        model = tiny_mini(**fields)
        bridged = tiny_mini(**fields)
        bridge = build_bridge_from_module(bridged, "LlavaMiniForConditionalGeneration", hf_config=bridged.config)
        return bridge, model

    return build


@pytest.fixture
def make_batch(sample):
    """Return a factory of batches: two rows with an image, the first padded on the left, and one without."""

    def build(model) -> dict[str, torch.Tensor]:
        count = model.config.num_visual_tokens(16)
        (short, pixels), (long, more) = sample(count, 5, seed=1), sample(count, 7, seed=2)
        rows = [short, long, long[long != model.config.image_token_id]]
        width = max(map(len, rows))
        input_ids = torch.stack([nn.functional.pad(row, (width - len(row), 0)) for row in rows])
        mask = torch.stack([nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
        layout = torch.tensor([[0, 1, 1], [1, 1, 1]])
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "pixel_values": torch.stack([pixels, more]),
            "visual_layout": layout,
        }

    return build


def record_weights(module, call):
    """Return the attention weights that the module computes while `call` runs, one tensor for each forward."""
    recorded: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: recorded.append(output[1]))
    call()
    handle.remove()
    return recorded


def record_hooks(bridge, inputs, names):
    """Return the value of each hook, and check that it fires once."""
    values: dict[str, torch.Tensor] = {}

    def store(tensor, hook):
        assert hook.name not in values, f"{hook.name} fired twice"
        values[hook.name] = tensor.detach()

    with bridge.hooks(fwd_hooks=[(name, store) for name in names]):
        bridge.original_model(**inputs)
    return values


VARIANTS = {
    "code": {},
    "paper": PRESETS["paper"],
    "average": {"compressor": "average"},
    "saliency and keys": {"compressor": "prumerge"},
    "text": {"compressor": "llama_vid"},
    "no tokens": {"compressor_size": 0},
    "no compressor": {"compressor": "none"},
    "no pre-fusion": {"prefusion_layers": 0},
    "siglip and qwen3": {"vision": "siglip", "text": "qwen3"},
}


@torch.no_grad()
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_bridge_logits_equal_the_models(make_bridge, make_batch, fields):
    bridge, model = make_bridge(**fields)
    inputs = make_batch(model)
    expected = model(**inputs).logits
    torch.testing.assert_close(bridge.original_model(**inputs).logits, expected, rtol=0, atol=0)
    # The bridge's own call counts positions from the first token after the padding.
    bridge_logits = bridge(**{"input" if name == "input_ids" else name: value for name, value in inputs.items()})
    is_token = inputs["attention_mask"].bool()
    torch.testing.assert_close(bridge_logits[is_token], expected[is_token], rtol=0, atol=1e-5)


@torch.no_grad()
def test_pattern_hooks_equal_eager_attention(make_bridge, make_batch):
    bridge, model = make_bridge()
    inputs = make_batch(model)
    names = [f"{stack}.{layer}.attn.hook_pattern" for stack in ("prefusion", "blocks") for layer in range(2)]
    names += [f"compressor.{name}" for name in ("hook_in", *(f"attn.hook_{x}" for x in ("q", "k", "v", "pattern")))]
    values = record_hooks(bridge, inputs, names)
    for layer in range(2):
        for stack, layers in (("prefusion", model.model.prefusion.layers), ("blocks", model.get_decoder().layers)):
            (weights,) = record_weights(layers[layer].self_attn, lambda: model(**inputs))
            assert torch.equal(values[f"{stack}.{layer}.attn.hook_pattern"], weights)
    # Two frames have 16 patches, 4 tokens and at most 7 words of text.
    assert values["prefusion.0.attn.hook_pattern"].shape == (2, 4, 27, 27)

    compressor = model.model.compressor
    reference = nn.MultiheadAttention(32, compressor.attn.heads, batch_first=True)
    reference.load_state_dict(compressor.attn.state_dict())
    query_positions, patch_positions = compressor.positions(4)
    patches = compressor.ln_kv(values["compressor.hook_in"])
    query = (compressor.ln_q(compressor.query) + query_positions).expand(2, -1, -1)
    _, weights = reference(query, patches + patch_positions, patches, average_attn_weights=False)
    maps = zip(reference.in_proj_weight.chunk(3), reference.in_proj_bias.chunk(3), strict=True)
    for name, x, (weight, bias) in zip("qkv", (query, patches + patch_positions, patches), maps, strict=True):
        mapped = nn.functional.linear(x, weight, bias).unflatten(-1, (8, 4))
        torch.testing.assert_close(values[f"compressor.attn.hook_{name}"], mapped, rtol=0, atol=1e-6)
    torch.testing.assert_close(values["compressor.attn.hook_pattern"], weights, rtol=0, atol=1e-6)


@torch.no_grad()
def test_pattern_hook_of_the_paper_preset_is_equation_2(make_bridge, make_batch):
    bridge, model = make_bridge(**PRESETS["paper"])
    values = record_hooks(
        bridge, make_batch(model), [f"compressor.{name}" for name in ("hook_in", "hook_out", "attn.hook_pattern")]
    )
    features, compressor = values["compressor.hook_in"], model.model.compressor
    query_positions, patch_positions = compressor.positions(4)
    weights = torch.softmax((compressor.query + query_positions) @ (features + patch_positions).mT, dim=-1)
    torch.testing.assert_close(values["compressor.attn.hook_pattern"], weights[:, None], rtol=0, atol=1e-6)
    torch.testing.assert_close(values["compressor.hook_out"], weights @ features, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_hook_of_compressor_and_prefusion_fires(make_bridge, make_batch, fields):
    bridge, model = make_bridge(**fields)
    names = {
        hook_point.name
        for name, hook_point in bridge.hook_dict.items()
        if name.startswith(("compressor.", "prefusion.")) and bridge._gated_hook_reason(hook_point.name) is None
    }
    assert any(name.startswith("prefusion.1.") for name in names) == ("prefusion_layers" not in fields)
    assert any(name.startswith("compressor.") for name in names) == (
        fields.get("compressor") != "none" and fields.get("compressor_size") != 0
    )
    has_norms = fields.get("text") == "qwen3"
    silent = {
        name for name in names if re.fullmatch(UNCALLED_HOOKS, name) and not (has_norms and name.endswith("normed"))
    }
    assert set(record_hooks(bridge, make_batch(model), names)) == names - silent


@torch.no_grad()
def test_compressor_hooks_have_the_documented_shapes(make_bridge, make_batch):
    bridge, model = make_bridge()
    frames, tokens, patches, width, heads = 2, 4, 16, 32, 8
    names = ["hook_in", "hook_out", *(f"attn.hook_{x}" for x in ("in", "out", "q", "k", "v", "z", "attn_scores"))]
    values = record_hooks(bridge, make_batch(model), [f"compressor.{name}" for name in names])
    query_shape, patches_shape = (frames, tokens, heads, width // heads), (frames, patches, heads, width // heads)
    assert [tuple(value.shape) for value in map(values.get, (f"compressor.{name}" for name in names))] == [
        (frames, patches, width),
        (frames, tokens, width),
        (frames, tokens, width),
        (frames, tokens, width),
        query_shape,
        patches_shape,
        patches_shape,
        query_shape,
        (frames, heads, tokens, patches),
    ]


@torch.no_grad()
def test_hook_that_returns_a_tensor_changes_the_output(make_bridge, make_batch):
    bridge, model = make_bridge()
    inputs = make_batch(model)
    bias = bridge.compressor.attn.original_component.out_proj.bias
    nn.init.normal_(bias)
    tokens: list[torch.Tensor] = []
    hooks = [
        ("compressor.attn.hook_pattern", lambda tensor, hook: torch.zeros_like(tensor)),
        ("compressor.hook_out", lambda tensor, hook: tokens.append(tensor)),
    ]
    with bridge.hooks(fwd_hooks=hooks):
        bridge.original_model(**inputs)
    assert torch.equal(tokens[0], bias.expand_as(tokens[0]))  # the tokens contain no patch

    bridge, model = make_bridge()
    with bridge.hooks(fwd_hooks=[("prefusion.1.hook_out", lambda tensor, hook: tensor * 0)]):
        hooked_logits = bridge.original_model(**inputs).logits
    model.model.prefusion.layers[1].register_forward_hook(lambda module, args, output: output * 0)
    torch.testing.assert_close(hooked_logits, model(**inputs).logits, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"compressor": "none"}, "compressor.hook_out"),
        ({"compressor_size": 0}, "compressor.hook_in"),
        ({"compressor": "average"}, "compressor.attn.hook_pattern"),
        ({"prefusion_layers": 0}, "prefusion.0.attn.hook_pattern"),
        ({}, "prefusion.2.hook_out"),
    ],
)
def test_hook_of_a_missing_component_raises(make_bridge, fields, name):
    bridge, _ = make_bridge(**fields)
    hooks = [(name, lambda tensor, hook: tensor)]
    with pytest.raises(KeyError, match=f"{re.escape(name)}.*does not exist"), bridge.hooks(fwd_hooks=hooks):
        pass


@torch.no_grad()
def test_run_with_cache_of_a_video_holds_all_frames(make_bridge, sample):
    bridge, model = make_bridge(frames_per_chunk=1)
    words, _ = sample(12, 6)
    inputs = {
        "input_ids": words[None],
        "pixel_values": torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(0)),
        "visual_layout": torch.tensor([[0, 3, 1]]),
    }
    expected = [
        torch.cat(record_weights(layer.self_attn, lambda: model(**inputs))) for layer in model.model.prefusion.layers
    ]
    _, cache = bridge.run_with_cache(
        inputs["input_ids"],
        **{name: inputs[name] for name in ("pixel_values", "visual_layout")},
        names_filter=lambda name: name.startswith("prefusion") and name.endswith("hook_pattern"),
    )
    for layer, weights in enumerate(expected):
        assert weights.shape[0] == 3
        torch.testing.assert_close(cache[f"prefusion.{layer}.attn.hook_pattern"], weights, rtol=0, atol=1e-6)


@torch.no_grad()
def test_generate_through_the_bridge_is_the_same(make_bridge, make_batch):
    bridge, model = make_bridge()
    inputs, fired = make_batch(model), Counter()
    hooks = [
        (name, lambda tensor, hook: fired.update([hook.name])) for name in ("compressor.hook_out", "blocks.0.hook_out")
    ]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with bridge.hooks(fwd_hooks=hooks):
        answer = bridge.original_model.generate(**inputs, **options)
    assert torch.equal(answer, model.generate(**inputs, **options))
    assert fired == {"compressor.hook_out": 1, "blocks.0.hook_out": 4}


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"vision": "dinov2"}, "vision towers.*dinov2"), ({"text": "gemma3"}, "gemma3_text has four norms")],
)
def test_bridge_of_an_unsupported_model_raises(make_bridge, fields, message):
    with pytest.raises(ValueError, match=message):
        make_bridge(**fields)


def test_import_llava_mini_does_not_import_transformer_lens():
    code = "import llava_mini, sys; sys.exit('transformer_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
