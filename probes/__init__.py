"""Probes for vision-language models: what the language model attends to, what it needs, and what can be read off it.

Works on any Hugging Face model with a decoder language model and image placeholders in `input_ids`.

    tokens = TokenMap.from_inputs(model, inputs)
    with record_attention(model, tokens) as attention:
        model(**inputs)
    attention.mass  # [layers, batch, heads, target, source]
    with intervene(model, tokens, RemoveTokens("vision", layers=range(2, 4))) as receipt:
        model(**inputs)

Beyond what is named here: `probes.plots` draws, `probes.pruning` has FastV, VTW and PyramidDrop, `probes.fusion.curves` what
`fusion_depth` reads.
"""

from probes.attention.record import AttentionRecord
from probes.attention.recording import record_attention
from probes.attribution import Relevancy, relevancy
from probes.fusion.depth import Agreement, FusionDepth, agreement, fusion_depth
from probes.fusion.planted_models import planted
from probes.interventions import BlockAttention, PatchActivations, Receipt, RemoveTokens, intervene
from probes.readouts.hidden_states import States, record_states
from probes.readouts.linear_probe import Readout, linear_readout
from probes.readouts.logit_lens import LogitLens, logit_lens
from probes.tokens.token_map import TokenMap

__all__ = [
    "Agreement",
    "AttentionRecord",
    "BlockAttention",
    "FusionDepth",
    "LogitLens",
    "PatchActivations",
    "Readout",
    "Receipt",
    "Relevancy",
    "RemoveTokens",
    "States",
    "TokenMap",
    "agreement",
    "fusion_depth",
    "intervene",
    "linear_readout",
    "logit_lens",
    "planted",
    "record_attention",
    "record_states",
    "relevancy",
]
