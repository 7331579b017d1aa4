"""Test learned compressors against torch's own modules or explicit loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llava_mini.compressors.position_tables import resize_table, sincos_table
from tests.llava_mini.compress import build, perturb_parameters, random_inputs

FEATURES = random_inputs(build("average"))["features"]


def torch_attention(attention: nn.Module) -> nn.MultiheadAttention:
    """Return torch's attention with the parameters of ours."""
    reference = nn.MultiheadAttention(attention.in_proj_weight.shape[1], attention.heads, batch_first=True)
    reference.load_state_dict(attention.state_dict())
    return reference


def norm(x, layer, dim=-1):
    shape = [-1 if i == dim % x.ndim else 1 for i in range(x.ndim)]
    centred = x - x.mean(dim, keepdim=True)
    scaled = centred / (centred.square().mean(dim, keepdim=True) + layer.eps).sqrt()
    return scaled * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize("name", ["nested_query", "qformer", "token_packer"])
def test_compressor_heads_not_dividing_width_raises(name):
    with pytest.raises(ValueError, match="compressor_heads=5 does not divide the width 32"):
        build(name, compressor_heads=5)


# nested_query


def test_nested_query_equals_torch_attention_over_positions():
    compressor = perturb_parameters(build("nested_query", 2))
    table = sincos_table(16, 32)
    query, key = norm(compressor.query[:4] + table[:4], compressor.ln_q), norm(resize_table(table, 6), compressor.ln_k)
    attention = torch_attention(compressor.attn)
    tokens, weights = compressor(FEATURES)
    for image, token, weight in zip(FEATURES, tokens, weights, strict=True):
        expected = attention(query, key, norm(image, compressor.ln_v))
        torch.testing.assert_close((token, weight), expected)


def test_nested_query_smaller_size_gives_first_tokens():
    large = perturb_parameters(build("nested_query", 16))
    tokens, weights = large(FEATURES)
    for size in (1, 3, 15):
        small = build("nested_query", size)
        small.load_state_dict(large.state_dict())
        torch.testing.assert_close(small(FEATURES), (tokens[:, : size**2], weights[:, : size**2]))


def test_nested_query_in_training_repeats_first_m_queries_with_uniform_m():
    """m is drawn uniformly for each image, and the first m tokens repeat in turn."""
    compressor = perturb_parameters(build("nested_query", 2))
    features = FEATURES[:1].expand(400, -1, -1)
    alone = compressor(FEATURES[:1])
    compressor.train()
    tokens, weights = compressor(features)
    counts = torch.zeros(5)
    for token, weight in zip(tokens, weights, strict=True):
        m = len(token.unique(dim=0))
        counts[m] += 1
        turn = [i % m for i in range(4)]
        torch.testing.assert_close((token, weight), (alone[0][0, turn], alone[1][0, turn]))
    assert counts[0] == 0
    assert (counts[1:] - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5


def test_nested_query_backward_reaches_drawn_queries_only():
    compressor = build("nested_query", 3).train()
    for _ in range(5):
        compressor.zero_grad()
        tokens, _ = compressor(FEATURES[:1])
        (tokens * torch.randn(tokens.shape)).sum().backward()
        drawn = len(tokens[0].unique(dim=0))
        assert compressor.query.grad.any(dim=1).tolist() == [i < drawn for i in range(256)]


def test_nested_query_size_over_16_raises():
    with pytest.raises(ValueError, match=r"nested_query: compressor_size=17 .*289 .*256; it may be at most 16"):
        build("nested_query", 17)


def test_nested_query_width_not_multiple_of_4_raises():
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        build("nested_query", width=30, compressor_heads=2)(FEATURES[..., :30])


# qformer


def test_qformer_equals_torch_transformer_decoder():
    compressor = perturb_parameters(build("qformer", 3))
    layers = []
    for layer in compressor.layers:
        layers.append(nn.TransformerDecoderLayer(32, 8, 128, dropout=0.0, activation="gelu", batch_first=True).eval())
        layers[-1].load_state_dict(layer.state_dict())
    patches = norm(FEATURES, compressor.ln_kv)
    tokens = norm(compressor.query, compressor.ln_q).expand(3, -1, -1)
    for layer in layers[:-1]:
        tokens = layer(tokens, patches)
    before = tokens + layers[-1].self_attn(tokens, tokens, tokens)[0]
    _, weights = layers[-1].multihead_attn(norm(before, layers[-1].norm1), patches, patches)
    torch.testing.assert_close(compressor(FEATURES), (layers[-1](tokens, patches), weights))
    assert len(layers) == 2


# pixel_shuffle


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_pixel_shuffle_equals_loops_over_blocks(size):
    compressor = build("pixel_shuffle", size)
    block = 6 // size
    tokens, weights = compressor(FEATURES)
    for i in range(size):
        for j in range(size):
            inside = [6 * (i * block + r) + j * block + c for r in range(block) for c in range(block)]
            expected = torch.stack([compressor.linear.weight @ x[inside].flatten() for x in FEATURES])
            torch.testing.assert_close(tokens[:, i * size + j], expected)
            uniform = torch.zeros(3, 36)
            uniform[:, inside] = 1 / block**2
            torch.testing.assert_close(weights[:, i * size + j], uniform)


def test_pixel_shuffle_size_not_dividing_grid_raises_with_possible_sizes():
    with pytest.raises(
        ValueError, match="compressor_size=4 does not divide the 6 x 6 grid of patches; it may be 1, 2, 3, 6"
    ):
        build("pixel_shuffle", 4)


def test_pixel_shuffle_image_in_tiles_raises():
    with pytest.raises(ValueError, match=r"pixel_shuffle .*6 x 6 grid of patches, got 12 x 12.*tiles"):
        build("pixel_shuffle")(torch.randn(1, 144, 32))


# conv


def regnet_block(x, block):
    """Compute the block by sums over shifted grids; x: (batch, width, rows, columns)."""

    def mix(x, conv):  # 1 x 1
        bias = 0 if conv.bias is None else conv.bias[:, None, None]
        return torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], x) + bias

    def silu(x):
        return x * torch.sigmoid(x)

    first, norm_1, _, depthwise, norm_2, _ = block.mix
    y = silu(norm(mix(x, first), norm_1, 1))
    padded, (rows, columns) = F.pad(y, (1, 1, 1, 1)), y.shape[2:]
    y = sum(
        padded[:, :, r : r + rows, c : c + columns] * depthwise.weight[:, 0, r, c, None, None]
        for r in range(3)
        for c in range(3)
    )
    y = silu(norm(y, norm_2, 1))
    squeeze, _, excite, _ = block.gate
    y = y * torch.sigmoid(mix(silu(mix(y.mean((2, 3), keepdim=True), squeeze)), excite))
    last, norm_3 = block.out
    return silu(x + norm(mix(y, last), norm_3, 1))


@pytest.mark.parametrize(("size", "side"), [(1, 6), (2, 6), (4, 6), (3, 12)])
def test_conv_equals_explicit_regnet_blocks_and_adaptive_pooling(size, side):
    compressor = perturb_parameters(build("conv", size))
    features = torch.randn(2, side**2, 32, generator=torch.Generator().manual_seed(3))
    x = (features + resize_table(compressor.pos_embed, side)).transpose(1, 2).unflatten(2, (side, side))
    for block in compressor.before:
        x = regnet_block(x, block)
    x = F.adaptive_avg_pool2d(x, size)
    for block in compressor.after:
        x = regnet_block(x, block)
    expected = x.flatten(2).transpose(1, 2) @ compressor.readout.weight.T + compressor.readout.bias
    tokens, weights = compressor(features)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights, build("average", size)(features)[1])
    assert len(compressor.before) == len(compressor.after) == 3


# token_packer


def token_packer_by_loops(compressor, image, size, query_channels):
    """Return tokens, (tokens, width), and weights, (tokens, patches), of one image.

    `query_channels` is the slice of the width that the queries are made from.
    """
    attention, tokens, weights = torch_attention(compressor.attn), [], []
    for i in range(size):
        for j in range(size):
            rows, columns = (range(x * 6 // size, -(-(x + 1) * 6 // size)) for x in (i, j))
            inside = [6 * r + c for r in rows for c in columns]
            patches = image[inside]
            coarse = patches.mean(0, keepdim=True)
            query = norm(coarse[:, query_channels] @ compressor.query.weight.T, compressor.ln_q)
            key = norm(compressor.key(patches), compressor.ln_k)
            value = norm(compressor.value(patches), compressor.ln_v)
            detail, weight = attention(query, key, value)
            tokens.append(coarse + detail)
            weights.append(torch.zeros(36).index_copy(0, torch.tensor(inside), weight[0]))
    return torch.cat(tokens), torch.stack(weights)


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_token_packer_equals_attention_within_each_cell(size):
    compressor = perturb_parameters(build("token_packer", size))
    tokens, weights = compressor(FEATURES)
    for image, token, weight in zip(FEATURES, tokens, weights, strict=True):
        torch.testing.assert_close((token, weight), token_packer_by_loops(compressor, image, size, slice(None)))


def test_token_packer_several_layers_queries_come_from_last():
    compressor = perturb_parameters(build("token_packer", 3, vision_feature_layer=[-3, -2]))
    features = torch.cat([FEATURES, FEATURES.flip(1)], dim=-1)
    tokens, weights = compressor(features)
    expected = token_packer_by_loops(compressor, features[0], 3, slice(32, None))
    torch.testing.assert_close((tokens[0], weights[0]), expected)


def test_token_packer_after_projection_queries_come_from_full_width():
    compressor = perturb_parameters(
        build("token_packer", 2, vision_feature_layer=[-3, -2], compress_before_projection=False)
    )
    features = FEATURES[..., :24]
    tokens, weights = compressor(features)
    torch.testing.assert_close((tokens[0], weights[0]), token_packer_by_loops(compressor, features[0], 2, slice(None)))
