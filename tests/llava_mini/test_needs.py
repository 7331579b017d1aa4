"""Test the extra inputs of compressors: the vision tower's attention and keys, and the text."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_mini import PRESETS, LlavaMiniForConditionalGeneration
from llava_mini.compressors import COMPRESSORS, Compressor, register
from llava_mini.vision_tower import attention_received, query_key_projections

IMAGE_TOKEN = 99  # as in conftest.py


@pytest.fixture
def spy():
    """Register a compressor that takes every input, and return the list of its calls.

    Its tokens are the first patches plus the mean of the text.
    """
    calls = []

    @register("spy")
    class Spy(Compressor):
        needs = ("saliency", "keys", "text", "text_mask")

        def forward(self, features, saliency, keys, text, text_mask):
            calls.append({"features": features, "saliency": saliency, "keys": keys, "text": text, "mask": text_mask})
            text_means = (text * text_mask[..., None]).sum(dim=1).mean(dim=-1)
            weights = torch.eye(self.size**2, features.shape[1]).expand(len(features), -1, -1)
            return weights @ features + text_means[:, None, None], weights

    yield calls
    del COMPRESSORS["spy"]


def eager_outputs(model, pixels):
    """Return the vision tower's hidden states and attention weights from transformers' eager attention."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        out = tower(pixels, output_hidden_states=True, output_attentions=True)
    return out.hidden_states, out.attentions


@torch.no_grad()
@pytest.mark.parametrize(
    ("vision", "layer", "order"),
    [
        ("clip", -2, {}),
        ("clip", -1, {}),
        ("clip", 1, {}),
        ("clip", [-1, -3], {}),
        ("clip", -2, PRESETS["paper"]),
        ("siglip", -2, {}),
        ("dinov2", -2, {}),
    ],
)
def test_saliency_and_keys_equal_those_of_eager_vision_tower(tiny_llava, spy, sample, vision, layer, order):
    llava = tiny_llava(vision=vision, attention="sdpa")
    if isinstance(layer, list):
        llava.model.multi_modal_projector.linear_1 = nn.Linear(64, 24)
    llava.config.vision_feature_layer = layer
    model = LlavaMiniForConditionalGeneration.from_llava(llava, compressor="spy", compressor_size=2, **order)
    pixels = torch.stack([sample(4, 5, seed)[1] for seed in range(2)])
    ids = sample(4, 5)[0].expand(2, -1)
    model(input_ids=ids, pixel_values=pixels)
    (call,) = spy
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert not any(map_._forward_hooks for map_ in query_key_projections(model.model.vision_tower, layer))

    hidden_states, attentions = eager_outputs(model, pixels)
    depth = {-1: 3, -2: 2, 1: 1}.get(layer if isinstance(layer, int) else -1)  # the deepest of several layers
    attention = attentions[depth - 1].mean(dim=1)  # (crops, queries, positions)
    first = 0 if vision == "siglip" else 1
    expected = attention.mean(dim=1) if vision == "siglip" else attention[:, 0, 1:]
    torch.testing.assert_close(call["saliency"], expected)

    blocks = next(m for m in model.model.vision_tower.modules() if isinstance(m, nn.ModuleList))
    block = blocks[depth - 1]
    norm = block.norm1 if vision == "dinov2" else block.layer_norm1
    (key,) = [module for name, module in block.named_modules() if name.endswith((".k_proj", ".key"))]
    torch.testing.assert_close(call["keys"], key(norm(hidden_states[depth - 1]))[:, first:])


@torch.no_grad()
def test_attention_received_in_chunks_of_queries_equals_full_attention():
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 300, 12), torch.randn(2, 310, 12)
    attention = torch.stack(
        [
            (q @ k.transpose(1, 2) / 2).softmax(-1)  # head width 4
            for q, k in zip(queries.split(4, dim=2), keys.split(4, dim=2), strict=True)
        ]
    )
    received = attention_received(queries, keys, heads=3)
    torch.testing.assert_close(received, attention.mean(dim=(0, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_received(queries, keys, heads=3), received)


@torch.no_grad()
def test_saliency_and_keys_of_tiles_are_stitched_like_features(tiny_mini, spy):
    model = tiny_mini(compressor="spy")
    pixels = torch.randn(2 * 5, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    layout = torch.tensor([[0, 2, 2]])
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * 8, 6]])
    model(input_ids=ids, pixel_values=pixels, visual_layout=layout)
    (call,) = spy
    alone = model.model.look_at(pixels)
    for frame in range(2):
        for row in range(8):
            for column in range(8):
                tile, patch = row // 4 * 2 + column // 4, row % 4 * 4 + column % 4
                for name in ("saliency", "keys", "features"):
                    expected = getattr(alone, name)[frame * 5 + tile, patch]
                    assert torch.equal(call[name][frame, row * 8 + column], expected)


def test_vision_tower_without_needs_computes_no_saliency_or_keys(tiny_mini, sample):
    view = tiny_mini().model.look_at(sample(4, 5)[1][None])
    assert view.saliency is None
    assert view.keys is None


def test_generate_runs_vision_tower_once(tiny_mini, spy, sample):
    model = tiny_mini(compressor="spy")
    runs = []
    model.model.vision_tower.register_forward_hook(lambda *args: runs.append(1))
    ids, pixels = sample(4, 5)
    model.generate(input_ids=ids[None], pixel_values=pixels[None], max_new_tokens=3, do_sample=False)
    assert len(runs) == len(spy) == 1


def pad_left(rows):
    """Return the token IDs of these rows, padded on the left, and their attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, (torch.arange(width) >= width - torch.tensor([[len(row)] for row in rows])).long()


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("chunk", [1, 32])
@torch.no_grad()
def test_text_of_each_frame_is_question_of_its_row(tiny_mini, spy, layers, chunk):
    """The text excludes padding, placeholders, answers and other rows, with and without pre-fusion."""
    model = tiny_mini(compressor="spy", prefusion_layers=layers, frames_per_chunk=chunk)
    frames = [IMAGE_TOKEN] * 4
    ids, mask = pad_left([[11, *frames, *frames, 12, 13, 14], [21, 22], [31, *frames, 32]])
    labels = torch.where((ids == 14) | (ids == 32), ids, -100)
    layout = torch.tensor([[0, 2, 1], [2, 1, 1]])
    pixels = torch.randn(3, 3, 24, 24)
    output = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, visual_layout=layout, labels=labels)
    texts = [row for call in spy for row in zip(call["text"], call["mask"], strict=True)]
    words = [[11, 12, 13], [11, 12, 13], [31]]
    assert len(texts) == 3
    for (text, is_text), expected in zip(texts, words, strict=True):
        assert torch.equal(text[is_text], model.get_input_embeddings()(torch.tensor(expected)))

    # Another answer of the same length, or longer padding, leaves the visual tokens unchanged.
    other = torch.where(labels != -100, 40, ids)
    again = model(
        input_ids=other,
        attention_mask=mask,
        pixel_values=pixels,
        visual_layout=layout,
        labels=torch.where(labels != -100, other, -100),
    )
    assert torch.equal(again.image_hidden_states, output.image_hidden_states)
    wide = [nn.functional.pad(x, (3, 0), value=value) for x, value in ((ids, 0), (mask, 0), (labels, -100))]
    again = model(input_ids=wide[0], attention_mask=wide[1], pixel_values=pixels, visual_layout=layout, labels=wide[2])
    torch.testing.assert_close(again.image_hidden_states, output.image_hidden_states)
    # Another question in one row changes the visual tokens of its frames only.
    again = model(
        input_ids=torch.where(ids == 12, 50, ids),
        attention_mask=mask,
        pixel_values=pixels,
        visual_layout=layout,
        labels=labels,
    )
    same = (again.image_hidden_states - output.image_hidden_states).abs().amax(dim=1) < 1e-6
    assert same.tolist() == [False] * 8 + [True] * 4


@torch.no_grad()
def test_fuse_without_prefusion_leaves_text_embeddings_unchanged(tiny_mini, spy, sample):
    """Bitwise equality rules out a mean over the three frames."""
    model = tiny_mini(compressor="spy", prefusion_layers=0)
    ids, _ = sample(12, 5)
    embeds, _ = model.model.fuse(ids[None], torch.randn(3, 3, 24, 24), visual_layout=torch.tensor([[0, 3, 1]]))
    is_text = ids != IMAGE_TOKEN
    assert torch.equal(embeds[0, is_text], model.get_input_embeddings()(ids[is_text]))


def test_generate_with_beams_or_without_cache_passes_question_only(tiny_mini, spy, sample):
    """With beams the compressor gets the text once; without a cache it gets no generated tokens."""
    model = tiny_mini(compressor="spy")
    ids, pixels = sample(4, 5)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE_TOKEN]}
    cached = model.generate(input_ids=ids[None], pixel_values=pixels[None], **settings)
    plain = model.generate(input_ids=ids[None], pixel_values=pixels[None], use_cache=False, **settings)
    assert torch.equal(cached, plain)
    assert [call["text"][call["mask"]].shape for call in spy] == [(5, 24)] * 5
    spy.clear()
    model.generate(input_ids=ids[None], pixel_values=pixels[None], num_beams=3, **settings)
    assert [call["text"].shape for call in spy] == [(1, 5, 24)]


@pytest.mark.parametrize("needs", [("saliency",), ("keys",)])
def test_compressor_with_needs_unsupported_vision_tower_raises(spy, tiny_mini, needs, monkeypatch):
    monkeypatch.setattr(COMPRESSORS["spy"], "needs", needs)
    monkeypatch.setattr("llava_mini.vision_tower.QUERY_KEY_PROJECTIONS", {})
    with pytest.raises(ValueError, match="vision tower is a CLIPVisionModel") as error:
        tiny_mini(compressor="spy")
    assert "\n" not in str(error.value)


def test_query_key_projections_of_embedding_layer_raises(tiny_llava):
    tower = tiny_llava().model.vision_tower
    for layer in (0, -4, [0, -4]):
        with pytest.raises(ValueError, match="selects the embeddings"):
            query_key_projections(tower, layer)


def test_encode_pictures_compressor_reading_text_raises(tiny_mini, spy, sample):
    model = tiny_mini(compressor="spy")
    pixels = sample(4, 5)[1][None]
    with pytest.raises(ValueError, match="compressor 'spy' reads the question"):
        model.encode_pictures(pixels)
    with pytest.raises(ValueError, match=r"compressor 'spy' .*text and text_mask"):
        model.model.encode(pixels[None])
