"""Probes for vision-language models: what the language model attends to, and what it needs.

Works on any Hugging Face model with a decoder language model and image placeholders in `input_ids`.

    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens) as attention:
        model(**inputs)
    attention.mass  # [layers, batch, heads, target, source]
    with intervene(model, tokens, RemoveTokens("vision", layers=range(2, 4))) as receipt:
        model(**inputs)
"""

from probes.attention import AttentionRecord, record_attention
from probes.fusion import FusionDepth, fusion_depth
from probes.interventions import Receipt, RemoveTokens, intervene
from probes.tokens import TokenMap

__all__ = [
    "AttentionRecord",
    "FusionDepth",
    "Receipt",
    "RemoveTokens",
    "TokenMap",
    "fusion_depth",
    "intervene",
    "record_attention",
]
