"""Runs a Llama decoder by hand in plain tensor operations, on one unpadded row, with any edges of attention cut."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import rotate_half

IMAGE_TOKEN = 63


def live(inputs: Mapping[str, Tensor], row: int) -> Tensor:
    return inputs["attention_mask"][row].bool()


@torch.no_grad()
def embed(model: LlavaForConditionalGeneration, inputs: Mapping[str, Tensor], row: int) -> Tensor:
    """Input embeddings `[1, tokens, width]` of one row without its padding, the picture's features in place."""
    input_ids = inputs["input_ids"][row, live(inputs, row)][None]
    hidden = model.get_input_embeddings()(input_ids)
    images = (inputs["input_ids"] == IMAGE_TOKEN).any(dim=1)
    if images[row]:
        image = inputs["pixel_values"][images[:row].sum()][None]
        hidden[input_ids == IMAGE_TOKEN] = model.model.get_image_features(image).pooler_output[0]
    return hidden


@torch.no_grad()
def attend(attention: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Tensor:
    """Self-attention over `visible` `[queries, keys]`; a query that sees nothing takes nothing in."""

    def heads(projection: nn.Module) -> Tensor:
        return projection(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    query, key, value = heads(attention.q_proj), heads(attention.k_proj), heads(attention.v_proj)
    query, key = (states * cos[:, None] + rotate_half(states) * sin[:, None] for states in (query, key))
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, dim=1).transpose(2, 3) * attention.head_dim**-0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1).nan_to_num()
    mixed = weights @ value.repeat_interleave(groups, dim=1)
    return attention.o_proj(mixed.transpose(1, 2).flatten(2))


@torch.no_grad()
def run(
    model: LlavaForConditionalGeneration, hidden: Tensor, cut: Mapping[int, Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits `[tokens, vocabulary]` and the states after each layer; `cut[layer]` `[queries, keys]`: edges to take."""
    decoder, cut, after = model.get_decoder(), cut or {}, []
    causal = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
    cos, sin = decoder.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for number, layer in enumerate(decoder.layers):
        visible = causal & ~cut[number] if number in cut else causal
        hidden = hidden + attend(layer.self_attn, layer.input_layernorm(hidden), cos, sin, visible)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        after.append(hidden)
    return model.lm_head(decoder.norm(hidden))[0], after
