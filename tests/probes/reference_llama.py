"""Reference Llama decoder in plain tensor operations, for one unpadded row, with any attention edges blocked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import rotate_half

IMAGE_TOKEN = 63


def unpadded(inputs: Mapping[str, Tensor], row: int) -> Tensor:
    """Return the mask of the row's positions that are not padding `[positions]`."""
    return inputs["attention_mask"][row].bool()


@torch.no_grad()
def embed_row(model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], row: int) -> Tensor:
    """Return the input embeddings of one row `[1, tokens, width]`, without padding and with image features inserted."""
    input_ids = inputs["input_ids"][row, unpadded(inputs, row)][None]
    hidden = model.get_input_embeddings()(input_ids)
    has_image = (inputs["input_ids"] == IMAGE_TOKEN).any(dim=1)
    if has_image[row]:
        image = inputs["pixel_values"][has_image[:row].sum()][None]
        hidden[input_ids == IMAGE_TOKEN] = model.model.get_image_features(image).pooler_output[0]
    return hidden


@torch.no_grad()
def attention_weights(attention: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
    """Return the attention weights `[1, heads, queries, keys]` over the visible edges `[queries, keys]`.

    A query without visible keys gets zeros.
    """

    def rotated_heads(projection: nn.Module) -> Tensor:
        states = projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        return states * cos[:, None] + rotate_half(states) * sin[:, None]

    query, key = rotated_heads(attention.q_proj), rotated_heads(attention.k_proj)
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(2, 3)
    return (scores * attention.head_dim**-0.5).masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num()


@torch.no_grad()
def attention_output(attention: nn.Module, hidden: Tensor, weights: Tensor) -> Tensor:
    """Return the output of an attention module with the given weights `[1, heads, queries, keys]`."""
    value = attention.v_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    mixed = weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))


@torch.no_grad()
def run_decoder(
    model: LlavaForConditionalGeneration,
    hidden: Tensor,
    blocked: Mapping[int, Tensor] | None = None,
    on_weights: Callable[[int, Tensor], None] = lambda layer, weights: None,
    patch: Callable[[int, str, Tensor], Tensor] = lambda layer, component, states: states,
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits `[tokens, vocabulary]` and the states after each layer.

    Args:
        model: The model whose weights are used.
        hidden: Input embeddings `[1, tokens, width]`.
        blocked: For each layer, the attention edges to block `[queries, keys]`.
        on_weights: Receives each layer's attention weights; it may add later layers to `blocked`.
        patch: Replaces the output of "attention", "mlp" and the layer ("residual").
    """
    decoder, blocked, states = model.get_decoder(), {} if blocked is None else blocked, []
    causal = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
    cos, sin = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for number, layer in enumerate(decoder.layers):
        visible = causal & ~blocked[number] if number in blocked else causal
        normed = layer.input_layernorm(hidden)
        weights = attention_weights(layer.self_attn, normed, cos, sin, visible)
        on_weights(number, weights)
        hidden = hidden + patch(number, "attention", attention_output(layer.self_attn, normed, weights))
        hidden = hidden + patch(number, "mlp", layer.mlp(layer.post_attention_layernorm(hidden)))
        hidden = patch(number, "residual", hidden)
        states.append(hidden)
    return model.lm_head(decoder.norm(hidden))[0], states
