"""Learned compressors, each against torch's own modules or slow loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llava_mini.compressors.query import resize_table, sincos_table
from tests.llava_mini.compress import build, inputs, shake

FEATURES = inputs(build("average"))["features"]


def attention_of(compressor: nn.Module) -> nn.MultiheadAttention:
    torchs = nn.MultiheadAttention(compressor.in_proj_weight.shape[1], compressor.heads, batch_first=True)
    torchs.load_state_dict(compressor.state_dict())
    return torchs


def norm(x, layer, dim=-1):
    shape = [-1 if i == dim % x.ndim else 1 for i in range(x.ndim)]
    centred = x - x.mean(dim, keepdim=True)
    scaled = centred / (centred.square().mean(dim, keepdim=True) + layer.eps).sqrt()
    return scaled * layer.weight.view(shape) + layer.bias.view(shape)


@pytest.mark.parametrize("name", ["nested_query", "qformer", "token_packer"])
def test_heads_must_divide_the_width(name):
    with pytest.raises(ValueError, match="compressor_heads=5 does not divide the width 32"):
        build(name, compressor_heads=5)


# nested_query


def test_nested_queries_attend_to_positions():
    compressor = shake(build("nested_query", 2))
    table = sincos_table(16, 32)
    query, key = norm(compressor.query[:4] + table[:4], compressor.ln_q), norm(resize_table(table, 6), compressor.ln_k)
    attention = attention_of(compressor.attn)
    tokens, weights = compressor(FEATURES)
    for picture, token, weight in zip(FEATURES, tokens, weights, strict=True):
        expected = attention(query, key, norm(picture, compressor.ln_v))
        torch.testing.assert_close((token, weight), expected)


def test_nested_queries_serve_any_smaller_size():
    large = shake(build("nested_query", 16))
    tokens, weights = large(FEATURES)
    for size in (1, 3, 15):
        small = build("nested_query", size)
        small.load_state_dict(large.state_dict())
        torch.testing.assert_close(small(FEATURES), (tokens[:, : size**2], weights[:, : size**2]))


def test_nested_queries_train_on_any_first_ones():
    """All numbers of queries are drawn alike, for each picture, and repeat in turn."""
    compressor = shake(build("nested_query", 2))
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


def test_only_the_nested_queries_that_were_drawn_learn():
    compressor = build("nested_query", 3).train()
    for _ in range(5):
        compressor.zero_grad()
        tokens, _ = compressor(FEATURES[:1])
        (tokens * torch.randn(tokens.shape)).sum().backward()
        drawn = len(tokens[0].unique(dim=0))
        assert compressor.query.grad.any(dim=1).tolist() == [i < drawn for i in range(256)]


def test_there_are_256_nested_queries():
    with pytest.raises(ValueError, match="compressor_size=17 asks for 289 of 256 queries; it may be at most 16"):
        build("nested_query", 17)


def test_nested_queries_name_a_wrong_width():
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        build("nested_query", width=30, compressor_heads=2)(FEATURES[..., :30])


# qformer


def test_qformer_is_torchs_decoder():
    compressor = shake(build("qformer", 3))
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
def test_pixel_shuffle_by_loops(size):
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


def test_pixel_shuffle_names_the_sizes_it_can_make():
    with pytest.raises(ValueError, match="does not divide the 6 x 6 grid of patches; it may be 1, 2, 3, 6"):
        build("pixel_shuffle", 4)


def test_pixel_shuffle_refuses_tiles():
    with pytest.raises(
        ValueError, match="made for a 6 x 6 grid of patches, got 12 x 12: it takes no pictures in tiles"
    ):
        build("pixel_shuffle")(torch.randn(1, 144, 32))


# conv


def regnet_block(x, block):
    """By sums over shifted grids. x: (batch, width, rows, columns)."""

    def mix(x, conv):  # 1 x 1
        bias = 0 if conv.bias is None else conv.bias[:, None, None]
        return torch.einsum("oi,bihw->bohw", conv.weight[:, :, 0, 0], x) + bias

    def silu(x):
        return x * torch.sigmoid(x)

    first, norm_1, _, around, norm_2, _ = block.mix
    y = silu(norm(mix(x, first), norm_1, 1))
    padded, (rows, columns) = F.pad(y, (1, 1, 1, 1)), y.shape[2:]
    y = sum(
        padded[:, :, r : r + rows, c : c + columns] * around.weight[:, 0, r, c, None, None]
        for r in range(3)
        for c in range(3)
    )
    y = silu(norm(y, norm_2, 1))
    squeeze, _, excite, _ = block.gate
    y = y * torch.sigmoid(mix(silu(mix(y.mean((2, 3), keepdim=True), squeeze)), excite))
    last, norm_3 = block.out
    return silu(x + norm(mix(y, last), norm_3, 1))


@pytest.mark.parametrize(("size", "side"), [(1, 6), (2, 6), (4, 6), (3, 12)])
def test_conv_by_hand(size, side):
    compressor = shake(build("conv", size))
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


def packed_by_loops(compressor, picture, size, last):
    """(tokens, width) and (tokens, patches) of one picture; `last` is what of the width the query is made from."""
    attention, tokens, weights = attention_of(compressor.attn), [], []
    for i in range(size):
        for j in range(size):
            rows, columns = (range(x * 6 // size, -(-(x + 1) * 6 // size)) for x in (i, j))
            inside = [6 * r + c for r in rows for c in columns]
            patches = picture[inside]
            coarse = patches.mean(0, keepdim=True)
            query = norm(coarse[:, last] @ compressor.query.weight.T, compressor.ln_q)
            key = norm(compressor.key(patches), compressor.ln_k)
            value = norm(compressor.value(patches), compressor.ln_v)
            detail, weight = attention(query, key, value)
            tokens.append(coarse + detail)
            weights.append(torch.zeros(36).index_copy(0, torch.tensor(inside), weight[0]))
    return torch.cat(tokens), torch.stack(weights)


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_token_packer_cell_by_cell(size):
    compressor = shake(build("token_packer", size))
    tokens, weights = compressor(FEATURES)
    for picture, token, weight in zip(FEATURES, tokens, weights, strict=True):
        torch.testing.assert_close((token, weight), packed_by_loops(compressor, picture, size, slice(None)))


def test_token_packer_asks_with_the_last_layer():
    compressor = shake(build("token_packer", 3, vision_feature_layer=[-3, -2]))
    features = torch.cat([FEATURES, FEATURES.flip(1)], dim=-1)
    tokens, weights = compressor(features)
    expected = packed_by_loops(compressor, features[0], 3, slice(32, None))
    torch.testing.assert_close((tokens[0], weights[0]), expected)


def test_token_packer_asks_with_all_that_was_projected():
    compressor = shake(build("token_packer", 2, vision_feature_layer=[-3, -2], compress_before_projection=False))
    features = FEATURES[..., :24]
    tokens, weights = compressor(features)
    torch.testing.assert_close((tokens[0], weights[0]), packed_by_loops(compressor, features[0], 2, slice(None)))
