"""The compressor "query", its positions and its attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_mini.compressors.query import Attention, resize_table, sincos_table
from tests.llava_mini.compress import build, inputs, shake


def test_query_is_multi_head_attention_by_hand():
    compressor = shake(build("query", 2))
    features = inputs(compressor)["features"]

    def norm(x, layer):
        return (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, correction=0, keepdim=True) + 1e-5
        ).sqrt() * layer.weight + layer.bias

    def heads(x):
        return x.unflatten(-1, (8, 4)).transpose(-2, -3)

    value = norm(features, compressor.ln_kv)
    w_q, w_k, w_v = compressor.attn.in_proj_weight.chunk(3)
    b_q, b_k, b_v = compressor.attn.in_proj_bias.chunk(3)
    q = heads((norm(compressor.query, compressor.ln_q) + compressor.pos_embed) @ w_q.T + b_q)
    k = heads((value + resize_table(compressor.pos_embed, 6)) @ w_k.T + b_k)
    v = heads(value @ w_v.T + b_v)
    attention = (q @ k.transpose(-1, -2) / 4**0.5).softmax(-1)
    out = (attention @ v).transpose(-2, -3).flatten(
        -2
    ) @ compressor.attn.out_proj.weight.T + compressor.attn.out_proj.bias

    tokens, weights = compressor(features)
    torch.testing.assert_close(tokens, out)
    torch.testing.assert_close(weights, attention.mean(1))


def test_query_starts_from_the_sine_cosine_table():
    assert torch.equal(build("query", 3).pos_embed.data, sincos_table(3, 32))
    assert build("query").pos_embed.requires_grad


def test_sincos_table_entries():
    table = sincos_table(3, 16)  # row-major: entry 5 is row 1, column 2; four frequencies 10000^(-i/4)
    for half, coordinate in ((0, 2), (8, 1)):
        for i in range(4):
            angle = torch.tensor(coordinate * 10000 ** (-i / 4))
            torch.testing.assert_close(table[5, half + i], angle.sin())
            torch.testing.assert_close(table[5, half + 4 + i], angle.cos())


def test_one_token_has_one_position_for_all_patches():
    resized = resize_table(sincos_table(1, 1024), 24)
    expected = torch.cat([torch.zeros(256), torch.ones(256)]).repeat(2)
    torch.testing.assert_close(resized, expected.expand(576, -1), atol=1e-6, rtol=0)


def test_resizing_is_bicubic():
    def weight(distance):  # Keys' kernel with a = -0.75
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        return near if distance <= 1 else far if distance < 2 else 0.0

    axis = torch.zeros(5, 2)  # five pixels from two, aligned by their outer edges; beyond an edge its pixel repeats
    for i in range(5):
        centre = (i + 0.5) * 2 / 5 - 0.5
        for j in range(-3, 5):
            axis[i, min(max(j, 0), 1)] += weight(abs(centre - j))
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize_table(table, 5), torch.kron(axis, axis) @ table)


def test_resized_table_keeps_rows_and_columns_apart():
    grid = resize_table(sincos_table(4, 16), 8).unflatten(0, (8, 8))
    assert (grid[..., :8] - grid[:1, :, :8]).abs().max() < 1e-6  # the first half depends on the column alone
    assert (grid[..., 8:] - grid[:, :1, 8:]).abs().max() < 1e-6  # the second half on the row alone


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compressor_heads": 5}, "compressor_heads=5 does not divide the width 32"),
        ({"width": 30, "compressor_heads": 2}, "multiple of 4"),
    ],
)
def test_query_names_a_wrong_width(fields, message):
    with pytest.raises(ValueError, match=message):
        build("query", **fields)


def test_attention_is_torchs_own():
    """With the same parameters under the same names."""
    ours, torchs = Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    torchs.load_state_dict({name: torch.randn_like(p) for name, p in torchs.state_dict().items()})
    ours.load_state_dict(torchs.state_dict())
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    for mine, theirs in zip(ours(query, key, value), torchs(query, key, value), strict=True):
        torch.testing.assert_close(mine, theirs)
