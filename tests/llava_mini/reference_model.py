"""Reference implementation of LLaVA-Mini: frame by frame, all tokens through all pre-fusion layers, explicit masks."""

from __future__ import annotations

import torch
from torch import nn

from llava_mini.visual_layout import crops_per_frame


def causal_mask(length, window, dtype):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    is_masked = (distance < 0) | (distance >= (window or length))
    return torch.zeros(length, length, dtype=dtype).masked_fill(is_masked, torch.finfo(dtype).min)[None, None]


def run_prefusion_layers(model, hidden_states):
    """Run all pre-fusion layers on one sequence of shape (1, length, width)."""
    inner = model.model
    positions = torch.arange(hidden_states.shape[1])[None]
    for layer, layer_type in zip(inner.prefusion.layers, inner.prefusion.layer_types, strict=True):
        window = model.config.text_config.sliding_window if layer_type == "sliding_attention" else None
        rotary_arguments = {"layer_type": layer_type} if model.config.text_config.model_type == "gemma3_text" else {}
        hidden_states = layer(
            hidden_states,
            attention_mask=causal_mask(hidden_states.shape[1], window, hidden_states.dtype),
            position_ids=positions,
            position_embeddings=inner.language_model.rotary_emb(
                hidden_states, position_ids=positions, **rotary_arguments
            ),
        )
    return hidden_states


def embeddings(model, input_ids, pixel_values, attention_mask, visual_layout, answer_mask=None):
    """Compute the language model's input embeddings, (batch, length, width)."""
    inner, config = model.model, model.config
    rows, crop = [], 0
    for row, ids in enumerate(input_ids):
        is_visual = ids == config.image_token_id
        embeds = model.get_input_embeddings()(ids.masked_fill(is_visual, 0))
        is_text = ~is_visual & (attention_mask[row] > 0)
        if answer_mask is not None:
            is_text &= ~answer_mask[row]
        visual, fused_texts = [], []
        for _, frames, tiles in visual_layout[visual_layout[:, 0] == row].tolist():
            fused = []
            for _ in range(frames):
                pixels = pixel_values[crop : crop + crops_per_frame(tiles)][None]
                crop += crops_per_frame(tiles)
                patches, tokens = inner.encode(pixels)
                if inner.prefusion is not None:
                    prefuses_tokens = config.prefuse_visual_tokens and inner.compressor is not None
                    parts = (
                        [patches, tokens, embeds[is_text][None]]
                        if prefuses_tokens
                        else [patches, embeds[is_text][None]]
                    )
                    out = run_prefusion_layers(model, torch.cat(parts, dim=1))
                    fused.append(out[0, out.shape[1] - int(is_text.sum()) :])
                    if prefuses_tokens:
                        tokens = out[:, patches.shape[1] : patches.shape[1] + tokens.shape[1]]
                    elif config.prefuse_visual_tokens:
                        tokens = out[:, : tokens.shape[1]]
                visual.append(tokens[0])
            if fused:
                fused_texts.append(torch.stack(fused).mean(dim=0))
        if fused_texts:
            embeds = embeds.masked_scatter(is_text[:, None], torch.stack(fused_texts).mean(dim=0))
        rows.append(embeds.masked_scatter(is_visual[:, None], torch.cat(visual)) if visual else embeds)
    return torch.stack(rows)


def logits(model, **inputs) -> torch.Tensor:
    """Compute the logits, (batch, length, vocabulary)."""
    embeds = embeddings(model, **inputs)
    states = model.model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    return model.lm_head(states.last_hidden_state)


def loss(model, labels, **inputs) -> torch.Tensor:
    """Compute the language modelling loss; pre-fusion leaves out the supervised tokens."""
    predictions = logits(model, answer_mask=labels != -100, **inputs)[:, :-1]
    return nn.functional.cross_entropy(predictions.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
