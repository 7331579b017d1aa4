"""LLaVA-Mini run plainly: frame by frame, everything through every pre-fusion layer, masks written by hand."""

from __future__ import annotations

import torch
from torch import nn

from llava_mini.visual_layout import crops_per_frame


def causal(length, window, dtype):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    return torch.zeros(length, length, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[None, None]


def through_layers(model, hidden_states):
    """One sequence through all pre-fusion layers, (1, length, width)."""
    inner = model.model
    positions = torch.arange(hidden_states.shape[1])[None]
    for layer, kind in zip(inner.prefusion.layers, inner.prefusion.layer_types, strict=True):
        window = model.config.text_config.sliding_window if kind == "sliding_attention" else None
        by_kind = {"layer_type": kind} if model.config.text_config.model_type == "gemma3_text" else {}
        hidden_states = layer(
            hidden_states,
            attention_mask=causal(hidden_states.shape[1], window, hidden_states.dtype),
            position_ids=positions,
            position_embeddings=inner.language_model.rotary_emb(hidden_states, position_ids=positions, **by_kind),
        )
    return hidden_states


def embeddings(model, input_ids, pixel_values, attention_mask, visual_layout, answer_mask=None):
    """What the language model gets."""
    inner, config = model.model, model.config
    rows, crop = [], 0
    for row, ids in enumerate(input_ids):
        is_visual = ids == config.image_token_id
        embeds = model.get_input_embeddings()(ids.masked_fill(is_visual, 0))
        is_text = ~is_visual & (attention_mask[row] > 0)
        if answer_mask is not None:
            is_text &= ~answer_mask[row]
        visual, pictures = [], []
        for _, frames, tiles in visual_layout[visual_layout[:, 0] == row].tolist():
            fused = []
            for _ in range(frames):
                pixels = pixel_values[crop : crop + crops_per_frame(tiles)][None]
                crop += crops_per_frame(tiles)
                patches, tokens = inner.encode(pixels)
                if inner.prefusion is not None:
                    through = config.prefuse_visual_tokens and inner.compressor is not None
                    parts = [patches, tokens, embeds[is_text][None]] if through else [patches, embeds[is_text][None]]
                    out = through_layers(model, torch.cat(parts, dim=1))
                    fused.append(out[0, out.shape[1] - int(is_text.sum()) :])
                    if through:
                        tokens = out[:, patches.shape[1] : patches.shape[1] + tokens.shape[1]]
                    elif config.prefuse_visual_tokens:
                        tokens = out[:, : tokens.shape[1]]
                visual.append(tokens[0])
            if fused:
                pictures.append(torch.stack(fused).mean(dim=0))
        if pictures:
            embeds = embeds.masked_scatter(is_text[:, None], torch.stack(pictures).mean(dim=0))
        rows.append(embeds.masked_scatter(is_visual[:, None], torch.cat(visual)) if visual else embeds)
    return torch.stack(rows)


def logits(model, **inputs) -> torch.Tensor:
    embeds = embeddings(model, **inputs)
    states = model.model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    return model.lm_head(states.last_hidden_state)


def loss(model, labels, **inputs) -> torch.Tensor:
    found = logits(model, answer_mask=labels != -100, **inputs)[:, :-1]
    return nn.functional.cross_entropy(found.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
