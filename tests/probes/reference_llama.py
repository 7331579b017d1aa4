"""Runs a Llama decoder by hand in plain tensor operations, on one unpadded row, with any edges of attention cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import rotate_half

IMAGE_TOKEN = 63


def unpadded(inputs: Mapping[str, Tensor], row: int) -> Tensor:
    return inputs["attention_mask"][row].bool()


@torch.no_grad()
def embed_row(model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], row: int) -> Tensor:
    """Input embeddings `[1, tokens, width]` of one row without its padding, the picture's features in place."""
    input_ids = inputs["input_ids"][row, unpadded(inputs, row)][None]
    hidden = model.get_input_embeddings()(input_ids)
    images = (inputs["input_ids"] == IMAGE_TOKEN).any(dim=1)
    if images[row]:
        image = inputs["pixel_values"][images[:row].sum()][None]
        hidden[input_ids == IMAGE_TOKEN] = model.model.get_image_features(image).pooler_output[0]
    return hidden


@torch.no_grad()
def attention_weights(attention: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
    """`[1, heads, queries, keys]` over `visible` `[queries, keys]`; zeros for a query that sees nothing."""

    def heads(projection: nn.Module) -> Tensor:
        states = projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        return states * cos[:, None] + rotate_half(states) * sin[:, None]

    query, key = heads(attention.q_proj), heads(attention.k_proj)
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(2, 3)
    return (scores * attention.head_dim**-0.5).masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num()


@torch.no_grad()
def attention_output(attention: nn.Module, hidden: Tensor, weights: Tensor) -> Tensor:
    value = attention.v_proj(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
    mixed = weights @ value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))


@torch.no_grad()
def run_decoder(
    model: LlavaForConditionalGeneration,
    hidden: Tensor,
    cut: Mapping[int, Tensor] | None = None,
    look: Callable[[int, Tensor], None] = lambda layer, weights: None,
    patch: Callable[[int, str, Tensor], Tensor] = lambda layer, component, states: states,
) -> tuple[Tensor, list[Tensor]]:
    """Logits `[tokens, vocabulary]` and the states after each layer.

    `cut[layer]` `[queries, keys]`: edges to take; `look` sees each layer's weights, and may add to `cut`; `patch`
    changes what leaves attention, mlp and layer ("residual").
    """
    decoder, cut, after = model.get_decoder(), {} if cut is None else cut, []
    causal = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
    cos, sin = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for number, layer in enumerate(decoder.layers):
        visible = causal & ~cut[number] if number in cut else causal
        normed = layer.input_layernorm(hidden)
        found = attention_weights(layer.self_attn, normed, cos, sin, visible)
        look(number, found)
        hidden = hidden + patch(number, "attention", attention_output(layer.self_attn, normed, found))
        hidden = hidden + patch(number, "mlp", layer.mlp(layer.post_attention_layernorm(hidden)))
        hidden = patch(number, "residual", hidden)
        after.append(hidden)
    return model.lm_head(decoder.norm(hidden))[0], after
