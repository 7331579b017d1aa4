"""Test the compressor "query", its position tables and its attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llava_mini.compressors.attention import MultiHeadAttention
from llava_mini.compressors.position_tables import resize_table, sincos_table
from tests.llava_mini.compress import build, perturb_parameters, random_inputs


def test_query_equals_explicit_multi_head_attention():
    compressor = perturb_parameters(build("query", 2))
    features = random_inputs(compressor)["features"]

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


def test_query_positions_start_as_sincos_table():
    assert torch.equal(build("query", 3).pos_embed.data, sincos_table(3, 32))
    assert build("query").pos_embed.requires_grad


def test_sincos_table_entry_encodes_column_then_row():
    table = sincos_table(3, 16)  # row-major: entry 5 is row 1, column 2; four frequencies 10000^(-i/4)
    for half, coordinate in ((0, 2), (8, 1)):
        for i in range(4):
            angle = torch.tensor(coordinate * 10000 ** (-i / 4))
            torch.testing.assert_close(table[5, half + i], angle.sin())
            torch.testing.assert_close(table[5, half + 4 + i], angle.cos())


def test_resize_table_of_one_position_is_constant():
    resized = resize_table(sincos_table(1, 1024), 24)
    expected = torch.cat([torch.zeros(256), torch.ones(256)]).repeat(2)
    torch.testing.assert_close(resized, expected.expand(576, -1), atol=1e-6, rtol=0)


def test_resize_table_equals_bicubic_kernel():
    def weight(distance):  # cubic convolution kernel of Keys with a = -0.75
        near = 1.25 * distance**3 - 2.25 * distance**2 + 1
        far = -0.75 * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        return near if distance <= 1 else far if distance < 2 else 0.0

    axis = torch.zeros(
        5, 2
    )  # five pixels from two, aligned by their outer edges; the edge pixel repeats beyond the edge
    for i in range(5):
        centre = (i + 0.5) * 2 / 5 - 0.5
        for j in range(-3, 5):
            axis[i, min(max(j, 0), 1)] += weight(abs(centre - j))
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize_table(table, 5), torch.kron(axis, axis) @ table)


def test_resize_table_keeps_row_and_column_halves_independent():
    grid = resize_table(sincos_table(4, 16), 8).unflatten(0, (8, 8))
    assert (grid[..., :8] - grid[:1, :, :8]).abs().max() < 1e-6  # the first half depends only on the column
    assert (grid[..., 8:] - grid[:, :1, 8:]).abs().max() < 1e-6  # the second half depends only on the row


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compressor_heads": 5}, "compressor_heads=5 does not divide the width 32"),
        ({"width": 30, "compressor_heads": 2}, "multiple of 4"),
    ],
)
def test_query_invalid_width_raises(fields, message):
    with pytest.raises(ValueError, match=message):
        build("query", **fields)


def test_multi_head_attention_equals_torch_attention():
    """Both load the same parameters under the same names."""
    ours, reference = MultiHeadAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    reference.load_state_dict({name: torch.randn_like(p) for name, p in reference.state_dict().items()})
    ours.load_state_dict(reference.state_dict())
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    for result, expected in zip(ours(query, key, value), reference(query, key, value), strict=True):
        torch.testing.assert_close(result, expected)
