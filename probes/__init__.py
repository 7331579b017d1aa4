"""Probes of vision-language models: attention to the image, causal interventions, and readouts of hidden states.

The probes work on any Hugging Face model with a decoder language model and image placeholders in `input_ids`.

Example:
    >>> tokens = TokenMap.from_inputs(model, inputs)
    >>> with record_attention(model, tokens) as attention:
    ...     output = model(**inputs)
    >>> list(attention.mass.shape)  # layers, batch, heads, target groups, source groups
    [6, 1, 4, 4, 5]
    >>> with intervene(model, tokens, RemoveTokens("vision", layers=range(2, 4))) as receipt:
    ...     output = model(**inputs)
    >>> receipt[0].tokens  # visual tokens hidden in each layer
    {2: 36, 3: 36}

Submodules offer more: `probes.plots` draws figures, `probes.pruning` has FastV, DART, SparseVLM and others, and
`probes.fusion.curves` computes the curves that `fusion_depth` reads, and `probes.fusion.onset` that of `fusion_onset`.
"""

from probes.attention.record import AttentionRecord
from probes.attention.recording import record_attention
from probes.attention.sinks import Sinks, find_sinks
from probes.attribution import Relevancy, relevancy
from probes.fusion.depth import Agreement, FusionDepth, agreement, fusion_depth
from probes.fusion.onset import FusionOnset, fusion_onset
from probes.fusion.planted_models import planted
from probes.fusion.reading_layer import ReadingLayer, reading_layer
from probes.interventions import (
    BlockAttention,
    PatchActivations,
    Receipt,
    RemoveTokens,
    Swaps,
    intervene,
    swap_images,
)
from probes.readouts.contextual_lens import ContextualLens, contextual_lens
from probes.readouts.hidden_states import States, record_states
from probes.readouts.linear_probe import Readout, linear_readout
from probes.readouts.logit_lens import LogitLens, logit_lens
from probes.tokens.token_map import TokenMap

__all__ = [
    "Agreement",
    "AttentionRecord",
    "BlockAttention",
    "ContextualLens",
    "FusionDepth",
    "FusionOnset",
    "LogitLens",
    "PatchActivations",
    "ReadingLayer",
    "Readout",
    "Receipt",
    "Relevancy",
    "RemoveTokens",
    "Sinks",
    "States",
    "Swaps",
    "TokenMap",
    "agreement",
    "contextual_lens",
    "find_sinks",
    "fusion_depth",
    "fusion_onset",
    "intervene",
    "linear_readout",
    "logit_lens",
    "planted",
    "reading_layer",
    "record_attention",
    "record_states",
    "relevancy",
    "swap_images",
]
